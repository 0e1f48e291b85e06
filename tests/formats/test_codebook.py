"""Codebooks: levels, codes, and that they are never worse than evenly spaced levels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.formats import codebook, uniform
from tests.helpers import (
    SHAPES,
    Errors,
    assert_equal,
    assert_raises,
    assert_within,
    generator,
    seeds,
    wide_weight,
)

GRANULARITIES = [("tensor", None), ("channel", None), ("group", 16)]


def _weights(kind: str) -> Tensor:
    g = generator(0)
    normal = torch.randn(48, 96, generator=g)
    return {
        "normal": normal,
        "evenly spread": torch.rand(48, 96, generator=g) * 2 - 1,
        "heavy tails": normal / torch.rand(48, 96, generator=g).clamp(min=0.02),
        "positive": normal.abs(),
        "rows of any size": wide_weight(48, 96),
        "one outlier": normal.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(-1e4)),
    }[kind]


def _error(
    format_: object, weight: Tensor, bits: int, granularity: str, group: int | None
) -> float:
    settings = {"bits": bits, "granularity": granularity, "group_size": group}
    decoded = format_.decode(*format_.encode(weight, **settings), bits=bits, K=weight.shape[1])
    return float((decoded.double() - weight.double()).norm())


@pytest.mark.parametrize(("granularity", "group"), GRANULARITIES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "kind",
    ["normal", "evenly spread", "heavy tails", "positive", "rows of any size", "one outlier"],
)
def test_no_worse_than_uniform(kind: str, bits: int, granularity: str, group: int | None) -> None:
    settings = (_weights(kind), bits, granularity, group)
    # Levels are fitted to a histogram of 65,536 bins, which misplaces one value in a thousand.
    assert _error(codebook, *settings) <= _error(uniform, *settings) * 1.001


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_shapes_that_hurt(N: int, K: int, bits: int) -> None:
    weight = wide_weight(N, K)
    for granularity in ("tensor", "channel"):
        encoded = codebook.encode(weight, bits=bits, granularity=granularity)
        assert encoded.weight.shape == (N, K if bits == 8 else (K + 1) // 2)
        assert encoded.weight_scale.shape == (N, 1)
        decoded = codebook.decode(*encoded, bits=bits, K=K)
        assert decoded.dtype == torch.float32 and decoded.shape == weight.shape
        if K and 2**bits // max(N, 1) >= K:  # a level for every value
            bin_width = encoded.weight_scale.abs() * 2 / 65536
            assert_within(decoded, weight, bin_width, granularity)


@settings(max_examples=30)
@given(N=st.integers(1, 9), G=st.integers(1, 3), bits=st.sampled_from([8, 4]), seed=seeds)
def test_levels_ascend_and_codes_are_the_nearest(N: int, G: int, bits: int, seed: int) -> None:
    weight = wide_weight(N, G * 32, seed)
    encoded = codebook.encode(weight, bits=bits, granularity="group", group_size=32)
    levels = encoded.weight_codebook
    assert levels.shape == (1, 2**bits) and levels.dtype == torch.float32
    assert (levels.diff() >= 0).all() and levels.abs().max() <= 1
    decoded = codebook.decode(*encoded, bits=bits, K=G * 32)
    scale = encoded.weight_scale.double().repeat_interleave(32, 1)
    best = (weight.double()[..., None] - levels.double()[0] * scale[..., None]).abs().amin(-1)
    # Quotient, middle of two levels and product round to float32: near ties go either way.
    slack = scale.abs() * 4 * 2.0**-24
    assert_within((decoded.double() - weight.double()).abs(), best, slack, "distance to level")


def test_256_fitted_levels_have_16_bits() -> None:
    """So that kernels look up two bytes; fewer values than levels are kept as they are."""
    weight = torch.randn(40, 64, generator=generator(0))
    steps = codebook.encode(weight, bits=8, granularity="channel").weight_codebook * 2**14
    assert_equal(steps, steps.round(), "steps of the grid")
    assert len(steps.unique()) > 250 and steps.abs().max() <= 2**14
    few = torch.randn(2, 8, generator=generator(0))
    encoded = codebook.encode(few, bits=8, granularity="tensor")
    assert_within(codebook.decode(*encoded, bits=8, K=8), few, few.abs().max() * 2**-23, "few")


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_groups_decode_to_zero(bits: int) -> None:
    weight = torch.randn(6, 32, generator=generator(0))
    weight[2] = 0
    weight[4, :16] = 0
    encoded = codebook.encode(weight, bits=bits, granularity="group", group_size=16)
    decoded = codebook.decode(*encoded, bits=bits, K=32)
    assert not decoded[2].any() and not decoded[4, :16].any()
    empty = codebook.encode(weight * 0, bits=bits, granularity="channel")
    assert torch.isfinite(empty.weight_codebook).all()
    assert not codebook.decode(*empty, bits=bits, K=32).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_threads_and_layout_change_nothing(bits: int, threads: int) -> None:
    weight = wide_weight(300, 512)
    found = codebook.encode(weight.T.contiguous().T, bits=bits, granularity="channel")
    torch.set_num_threads(1)
    expected = codebook.encode(weight, bits=bits, granularity="channel")
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert_equal(a, b, f"{name} with {threads} threads")


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("bits", [8, 4])
def test_given_levels_are_kept(bits: int, rows: int) -> None:
    weight = torch.randn(4, 64, generator=generator(0))
    fitted = codebook.encode(weight, bits=bits, granularity="group", group_size=32)
    table = fitted.weight_codebook.repeat(rows, 1)
    again = codebook.encode(
        weight, bits=bits, granularity="group", group_size=32, weight_codebook=table
    )
    assert_equal(again.weight_codebook, table)
    errors = [
        float((codebook.decode(*e, bits=bits, K=64) - weight).norm()) for e in (fitted, again)
    ]
    assert errors[1] <= errors[0] * 1.05


def test_decode_with_one_codebook_a_row() -> None:
    table = torch.arange(32.0).reshape(2, 16)
    codes = uniform.pack_int4(torch.tensor([[0, 1, 15], [2, 3, 4]]))
    decoded = codebook.decode(codes, table, torch.tensor([[2.0], [-1.0]]), bits=4, K=3)
    assert decoded.tolist() == [[0.0, 2.0, 30.0], [-18.0, -19.0, -20.0]]


def test_codes_are_unsigned_bytes() -> None:
    table = torch.arange(256.0)[None]
    codes = torch.tensor([[0, 127, -128, -1]], dtype=torch.int8)
    decoded = codebook.decode(codes, table, torch.ones(1, 1), bits=8, K=4)
    assert decoded.tolist() == [[0.0, 127.0, 128.0, 255.0]]


W = torch.randn(4, 6, generator=generator(0))
CODES = codebook.encode(W, bits=8, granularity="channel")
TABLE = CODES.weight_codebook
ERRORS: Errors = {
    "nan": (
        lambda: codebook.encode(W / 0 * 0, bits=8, granularity="channel"),
        ValueError,
        "weight has 24 NaN",
    ),
    "3-D": (lambda: codebook.encode(W[None], bits=8, granularity="channel"), ValueError, "[N, K]"),
    "bool": (lambda: codebook.encode(W > 0, bits=8, granularity="channel"), TypeError, "bool"),
    "bits": (lambda: codebook.encode(W, bits=2, granularity="channel"), ValueError, "got 2"),
    "group": (
        lambda: codebook.encode(W, bits=4, granularity="group", group_size=5),
        ValueError,
        "group_size=5 does not divide the 6 inputs",
    ),
    "table of the wrong size": (
        lambda: codebook.encode(W, bits=4, granularity="channel", weight_codebook=TABLE),
        ValueError,
        "must be float32 [1 or 4, 16], got torch.float32 [1, 256]",
    ),
    "table that descends": (
        lambda: codebook.encode(W, bits=8, granularity="channel", weight_codebook=TABLE.flip(1)),
        ValueError,
        "must ascend to a positive level",
    ),
    "decode table": (
        lambda: codebook.decode(CODES.weight, TABLE[:, :9], CODES.weight_scale, bits=8, K=6),
        ValueError,
        "got torch.float32 [1, 9]",
    ),
    "decode rows": (
        lambda: codebook.decode(CODES.weight[:3], TABLE, CODES.weight_scale, bits=8, K=6),
        ValueError,
        "stored as [4, 6], got [3, 6]",
    ),
    "decode K": (
        lambda: codebook.decode(CODES.weight, TABLE, CODES.weight_scale, bits=4, K=6),
        ValueError,
        "stored as [4, 3], got [4, 6]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_was_given(case: str) -> None:
    assert_raises(*ERRORS[case])
