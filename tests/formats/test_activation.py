"""int8 activations: every bit against scalar float32 arithmetic, and what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq.formats.activation import quantize_activation
from tests.helpers import assert_equal, assert_within, seeds, wide_weight


def _scalar(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The definition, one float32 operation at a time."""
    codes, scales = torch.zeros(x.shape, dtype=torch.int8), []
    for row, values in enumerate(x.float().numpy()):
        for start in range(0, len(values), group):
            amax = np.float32(max((abs(v) for v in values[start : start + group]), default=0))
            scales.append(amax / np.float32(127))
            inverse = np.float32(127) / amax if amax > 1e-30 else np.float32(0)
            for k in range(start, start + group):
                codes[row, k] = int(np.rint(values[k] * inverse))
    return codes, torch.tensor(np.array(scales, dtype=np.float32)).reshape(len(x), -1)


@given(
    M=st.integers(1, 4),
    G=st.integers(1, 4),
    group=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=seeds,
)
def test_equals_scalar_arithmetic(
    M: int, G: int, group: int, dtype: torch.dtype, seed: int
) -> None:
    x = wide_weight(M, G * group, seed, dtype)
    codes, scale = quantize_activation(x, group)
    expected_codes, expected_scale = _scalar(x, group)
    assert_equal(codes, expected_codes, "codes")
    assert_equal(scale, expected_scale, "scale")


def _scalar_static(x: Tensor, scale: float) -> Tensor:
    """The definition for a scale that is given, one float32 operation at a time."""
    codes, inverse = torch.zeros(x.shape, dtype=torch.int8), np.float32(1) / np.float32(scale)
    for row, values in enumerate(x.float().numpy()):
        for k, value in enumerate(values):
            with np.errstate(over="ignore"):
                codes[row, k] = int(np.clip(np.rint(value * inverse), -127, 127))
    return codes


@given(
    K=st.integers(1, 9),
    scale=st.floats(2.0**-99, 2.0**120, width=32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=seeds,
)
def test_a_given_scale_equals_scalar_arithmetic(
    K: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    x = wide_weight(4, K, seed, dtype)
    codes, x_scale = quantize_activation(x, 0, torch.tensor([scale]))
    assert_equal(codes, _scalar_static(x, scale), "codes")
    assert_equal(x_scale, torch.full((4, 1), scale), "scale")


def test_inputs_beyond_a_given_scale_saturate() -> None:
    x = torch.tensor([[126.5, 127.5, 128.5, -1e38], [-127.4, 2.5, -0.5, 3e-39]])
    codes, scale = quantize_activation(x, 4, torch.ones(1))
    assert codes.tolist() == [[126, 127, 127, -127], [-127, 2, 0, 0]]
    assert_equal(scale, torch.ones(2, 1))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_gives_nan_in_its_token_alone_on_a_given_scale(bad: float) -> None:
    x = torch.ones(2, 3, 4)
    x[1, 1, 2] = bad
    codes, scale = quantize_activation(x, 0, torch.tensor([0.5]))
    assert codes[1, 1].tolist() == [0] * 4 and int(codes.sum()) == 5 * 4 * 2
    assert int(scale.isnan().sum()) == 1 and scale[1, 1].isnan()


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-31, float("inf"), float("nan")])
def test_a_given_scale_that_is_none_gives_nan(bad: float) -> None:
    codes, scale = quantize_activation(torch.ones(2, 3), 0, torch.tensor([bad]))
    assert not codes.any() and scale.isnan().all()


@pytest.mark.parametrize("shape", [(0,), (5,), (0, 4), (3, 0), (2, 0, 6), (2, 3, 6)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    codes, scale = quantize_activation(torch.randn(shape))
    assert codes.shape == shape and codes.dtype == torch.int8
    assert scale.shape == (*shape[:-1], 1) and scale.dtype == torch.float32
    if shape[-1] == 6:
        assert quantize_activation(torch.randn(shape), 2)[1].shape == (*shape[:-1], 3)


def test_moves_by_half_a_step_at_most() -> None:
    x = wide_weight(50, 96)
    codes, scale = quantize_activation(x, 32)
    step = scale.repeat_interleave(32, 1)
    # The inverse, the product with it and the scale round once each, in up to 127 steps.
    assert_within(codes * step, x, step.double() * (0.5 + 4 * 127 * 2**-24), "decoded")


def test_ties_go_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0])
    assert quantize_activation(x)[0].tolist() == [127, 0, 2, 2, 0, -2, -127]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_gives_nan_in_its_group_alone(bad: float) -> None:
    x = torch.ones(2, 4)
    x[1, 2] = bad
    codes, scale = quantize_activation(x, 2)
    assert codes.tolist() == [[127] * 4, [127, 127, 0, 0]]
    assert_equal(scale.isnan(), torch.tensor([[False, False], [False, True]]))


@pytest.mark.parametrize("tiny", [0.0, 1e-30, 1e-38, 1e-45])
def test_tokens_of_almost_nothing_are_zeros(tiny: float) -> None:
    codes, scale = quantize_activation(torch.full((1, 3), tiny))
    assert not codes.any() and 0 <= float(scale) <= 1e-31


@pytest.mark.parametrize("stride", [1, 2])
def test_non_contiguous(stride: int) -> None:
    x = torch.randn(6, 8 * stride).T[::stride]
    for found, expected in zip(
        quantize_activation(x, 3), quantize_activation(x.contiguous(), 3), strict=True
    ):
        assert_equal(found, expected)


@pytest.mark.parametrize(
    ("group", "scale", "message"),
    [
        (0, torch.ones(2), r"activation_scale must be float32 \[1\], got torch.float32 \[2\]"),
        (0, torch.ones(1).half(), r"must be float32 \[1\], got torch.float16"),
        (3, torch.ones(1), "one scale for all inputs has no groups, got group size 3"),
    ],
    ids=["shape", "dtype", "groups"],
)
def test_errors_of_given_scales(group: int, scale: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_activation(torch.ones(2, 6), group, scale)


@pytest.mark.parametrize(
    ("x", "group", "error", "message"),
    [
        (torch.ones(2, 6), 4, ValueError, "group size 4 does not divide K=6"),
        (torch.ones(2, 6), -1, ValueError, "group size -1"),
        (torch.ones(2, 6, dtype=torch.int8), 0, TypeError, "got torch.int8"),
        (torch.tensor(1.0), 0, ValueError, "got a scalar"),
        ([1.0], 0, TypeError, "got list"),
    ],
    ids=["group", "negative", "integers", "scalar", "list"],
)
def test_errors_name_what_was_given(x: object, group: int, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_activation(x, group)
