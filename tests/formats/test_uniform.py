"""Uniform codes: rounding, ranges, packing, and how far a weight may move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq.formats import uniform
from tests.helpers import (
    SHAPES,
    Errors,
    assert_equal,
    assert_raises,
    assert_within,
    generator,
    seeds,
    sizes,
    wide_weight,
)

# bits, symmetric → codes that a scale covers on each side of zero
STEPS = {(8, True): 127, (8, False): 255, (4, True): 7, (4, False): 15}


def _assert_half_step(weight: Tensor, bits: int, granularity: str, group: int | None) -> None:
    """Check for symmetric and asymmetric codes that no value moves by more than half a step."""
    for symmetric in (True, False):
        encoded = uniform.encode(
            weight, bits=bits, granularity=granularity, group_size=group, symmetric=symmetric
        )
        decoded = uniform.decode(*encoded, bits=bits, K=weight.shape[1])
        G = encoded.weight_scale.shape[1]
        step = encoded.weight_scale.double().repeat_interleave(weight.shape[1] // G, 1)
        # Quotient, product and scale itself round once each, in multiples of up to 255 steps.
        assert_within(decoded, weight.float(), step * (0.5 + 3 * 255 * 2**-24), f"{symmetric=}")
        assert_equal(decoded[weight == 0], torch.zeros(int((weight == 0).sum())), "zeros")


@pytest.mark.parametrize(
    ("x", "scale", "zero_point", "bits", "codes"),
    [
        pytest.param([1.2, 2.5, 3.8], 1.0, None, 8, [1, 2, 4], id="seed"),
        pytest.param([-2.5, -1.5, -0.5, 0.5, 1.5], 1.0, None, 8, [-2, -2, 0, 0, 2], id="ties"),
        pytest.param([1e30, -1e30, 127.6], 1.0, None, 8, [127, -128, 127], id="clamped"),
        pytest.param([0.0, 1.0, -1.0], 0.5, 3, 8, [3, 5, 1], id="zero point"),
        pytest.param([0.0, 7.0, -9.0], 1.0, None, 4, [8, 15, 0], id="4 bits"),
        pytest.param([0.0, 20.0, -2.0], 1.0, 1, 4, [1, 15, 0], id="4 bits, zero point"),
        pytest.param([], 1.0, None, 8, [], id="empty"),
    ],
)
def test_quantize(x: list, scale: float, zero_point: int | None, bits: int, codes: list) -> None:
    found = uniform.quantize(torch.tensor(x), scale, zero_point, bits)
    assert_equal(found, torch.tensor(codes, dtype=torch.int8))


def test_quantize_broadcasts_and_divides_in_float32() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 300.0]], dtype=torch.bfloat16)
    scale, zero = torch.tensor([[1.0], [3.0]]), torch.tensor([[0], [-1]], dtype=torch.int8)
    codes = uniform.quantize(x, scale, zero)
    assert_equal(codes, torch.tensor([[1, 2], [0, 99]], dtype=torch.int8))
    assert_equal(uniform.dequantize(codes, scale, zero), torch.tensor([[1.0, 2.0], [3.0, 300.0]]))


@given(N=sizes, K=sizes, seed=seeds)
def test_packing_is_exact(N: int, K: int, seed: int) -> None:
    codes = torch.randint(0, 16, (N, K), dtype=torch.int8, generator=generator(seed))
    packed = uniform.pack_int4(codes)
    assert packed.dtype == torch.int8 and packed.shape == (N, (K + 1) // 2)
    assert_equal(uniform.unpack_int4(packed, K), codes)


def test_packing_layout() -> None:
    packed = uniform.pack_int4(torch.tensor([[1, 2, 15], [0, 8, 7]]))
    assert packed.view(torch.uint8).tolist() == [[0x21, 0x0F], [0x80, 0x07]]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_shapes_that_hurt(N: int, K: int, bits: int, granularity: str) -> None:
    _assert_half_step(wide_weight(N, K), bits, granularity, None)


@given(N=sizes, G=st.integers(1, 5), group=st.integers(1, 9), bits=st.sampled_from([8, 4]), s=seeds)
def test_groups_move_by_half_a_step_at_most(N: int, G: int, group: int, bits: int, s: int) -> None:
    _assert_half_step(wide_weight(N, G * group, s), bits, "group", group)


@given(
    st.lists(
        st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=False), min_size=1, max_size=9
    ),
    st.sampled_from([8, 4]),
)
def test_any_row_moves_by_half_a_step_at_most(row: list[float], bits: int) -> None:
    _assert_half_step(torch.tensor([row]), bits, "channel", None)


@pytest.mark.parametrize(("bits", "symmetric"), STEPS)
def test_scale_covers_the_range(bits: int, symmetric: bool) -> None:
    weight = torch.tensor([[-1.0, 0.5, 3.0], [2.0, 5.0, 4.0], [-6.0, -3.0, -4.0]])
    encoded = uniform.encode(weight, bits=bits, granularity="channel", symmetric=symmetric)
    span = torch.tensor([[3.0], [5.0], [6.0]]) if symmetric else torch.tensor([[4.0], [5.0], [6.0]])
    steps = STEPS[bits, symmetric]
    assert_within(encoded.weight_scale, span / steps, span * 2.0**-23, "scale")
    if symmetric:
        assert encoded.weight_zero_point is None
    else:
        low = -128 if bits == 8 else 0
        expected = [[low + round(steps / 4)], [low], [low + steps]]
        assert_equal(encoded.weight_zero_point, torch.tensor(expected, dtype=torch.int8))


def test_symmetric_codes_are_symmetric() -> None:
    weight = wide_weight(50, 64)
    assert uniform.encode(weight, bits=8, granularity="channel").weight.min() == -127
    packed = uniform.encode(weight, bits=4, granularity="channel").weight
    assert uniform.unpack_int4(packed, 64).min() == 1


@pytest.mark.parametrize(("bits", "symmetric"), STEPS)
def test_zero_groups(bits: int, symmetric: bool) -> None:
    weight = torch.zeros(2, 6)
    weight[1, 3:] = 1.0
    encoded = uniform.encode(
        weight, bits=bits, granularity="group", group_size=3, symmetric=symmetric
    )
    assert encoded.weight_scale[:, 0].tolist() == [1.0, 1.0]
    assert_within(
        uniform.decode(*encoded, bits=bits, K=6), weight, torch.tensor(2.0**-23), "decoded"
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_a_tensor(symmetric: bool) -> None:
    encoded = uniform.encode(wide_weight(7, 5), bits=8, granularity="tensor", symmetric=symmetric)
    assert encoded.weight_scale.shape == (7, 1) and encoded.weight_scale.is_contiguous()
    assert (encoded.weight_scale == encoded.weight_scale[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_layout_and_dtype_of_the_weight_do_not_matter(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 10, generator=generator(0)).to(dtype)
    plain = uniform.encode(weight.float().contiguous(), bits=4, granularity="channel")
    for same in (weight, weight.T.contiguous().T, weight.repeat_interleave(2, 1)[:, ::2]):
        found = uniform.encode(same, bits=4, granularity="channel")
        assert_equal(found.weight, plain.weight)
        assert_equal(found.weight_scale, plain.weight_scale)


@given(N=st.integers(1, 9), K=st.integers(1, 20), seed=seeds)
def test_coding_what_was_decoded_changes_no_code(N: int, K: int, seed: int) -> None:
    encoded = uniform.encode(wide_weight(N, K, seed), bits=8, granularity="channel")
    decoded = uniform.decode(*encoded, bits=8, K=K)
    assert_equal(uniform.encode(decoded, bits=8, granularity="channel").weight, encoded.weight)


W = torch.ones(4, 6)
NAN = torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]])
CODES = uniform.encode(W, bits=8, granularity="channel")
ERRORS: Errors = {
    "nan": (lambda: uniform.encode(NAN, bits=8, granularity="channel"), ValueError, "2 NaN or inf"),
    "too large": (
        lambda: uniform.encode(
            torch.full((1, 1), 1e39, dtype=torch.float64), bits=8, granularity="channel"
        ),
        ValueError,
        "1 NaN or infinite values of 1",
    ),
    "1-D": (lambda: uniform.encode(W[0], bits=8, granularity="channel"), ValueError, "[N, K]"),
    "integers": (
        lambda: uniform.encode(W.int(), bits=8, granularity="channel"),
        TypeError,
        "float16), got torch.int32",
    ),
    "list": (lambda: uniform.encode([1.0], bits=8, granularity="channel"), TypeError, "got list"),
    "bits": (lambda: uniform.encode(W, bits=3, granularity="channel"), ValueError, "8 or 4, got 3"),
    "granularity": (lambda: uniform.encode(W, bits=8, granularity="row"), ValueError, "'row'"),
    "group": (
        lambda: uniform.encode(W, bits=8, granularity="group", group_size=4),
        ValueError,
        "group_size=4 does not divide the 6 inputs",
    ),
    "no group": (
        lambda: uniform.encode(W, bits=8, granularity="group"),
        ValueError,
        "group_size=None",
    ),
    "group of channel": (
        lambda: uniform.encode(W, bits=8, granularity="channel", group_size=3),
        ValueError,
        'needs granularity="group"',
    ),
    "quantize scale": (lambda: uniform.quantize(W, 0.0), ValueError, "scale must be positive"),
    "quantize nan scale": (lambda: uniform.quantize(W, W * torch.nan), ValueError, "positive and"),
    "quantize zero point": (lambda: uniform.quantize(W, 1.0, 16, 4), ValueError, "0..15, got"),
    "quantize half": (lambda: uniform.quantize(W, 1.0, 0.5), ValueError, "must be an integer"),
    "quantize nan": (lambda: uniform.quantize(NAN, 1.0), ValueError, "x has 2 NaN"),
    "quantize integers": (lambda: uniform.quantize(W.int(), 1.0), TypeError, "x must be floating"),
    "pack floats": (lambda: uniform.pack_int4(W), TypeError, "must be integers, got torch.float32"),
    "pack range": (lambda: uniform.pack_int4(W.int() * 16), ValueError, "0..15, got 16..16"),
    "unpack": (lambda: uniform.unpack_int4(CODES.weight, 9), ValueError, "need 5 bytes, got 6"),
    "unpack dtype": (lambda: uniform.unpack_int4(W, 12), TypeError, "int8, got torch.float32"),
    "decode truncated": (
        lambda: uniform.decode(CODES.weight[:, :5], CODES.weight_scale, None, bits=8, K=6),
        ValueError,
        "stored as [4, 6], got [4, 5]",
    ),
    "decode dtype": (
        lambda: uniform.decode(W, CODES.weight_scale, None, bits=8, K=6),
        TypeError,
        "int8 codes",
    ),
    "decode groups": (
        lambda: uniform.decode(CODES.weight, torch.ones(4, 4), None, bits=8, K=6),
        ValueError,
        "4 groups do not divide 6",
    ),
    "decode zero point": (
        lambda: uniform.decode(
            CODES.weight, CODES.weight_scale, torch.zeros(4, 2, dtype=torch.int8), bits=8, K=6
        ),
        ValueError,
        "[4, 1] as weight_scale, got [4, 2]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_was_given(case: str) -> None:
    assert_raises(*ERRORS[case])
