"""Bitmap-sparse weights: exact round trips, layout, and encodings that do not fit together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.formats import bitmap
from tests.helpers import (
    SHAPES,
    Errors,
    assert_equal,
    assert_raises,
    random_mask,
    seeds,
    sizes,
    wide_weight,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def _round_trip(N: int, K: int, dtype: torch.dtype, kept: float, seed: int) -> None:
    values = (wide_weight(N, K, seed).clamp(-100, 100)).to(dtype)
    for mask in (random_mask(N, K, seed, kept), None):
        encoded = bitmap.encode(values, mask)
        mask = values != 0 if mask is None else mask
        assert_equal(bitmap.decode_mask(encoded.weight_bitmask, K), mask, "mask")
        expected = torch.where(mask, values, torch.zeros((), dtype=dtype))
        assert_equal(bitmap.decode(*encoded, K), expected, "values")
        assert encoded.weight.numel() == int(mask.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_round_trip(N: int, K: int, dtype: torch.dtype) -> None:
    for kept in (0.0, 0.5, 1.0):
        _round_trip(N, K, dtype, kept, seed=0)


@given(N=sizes, K=sizes, dtype=st.sampled_from(DTYPES), kept=st.floats(0, 1), seed=seeds)
def test_round_trip_of_any_shape(
    N: int, K: int, dtype: torch.dtype, kept: float, seed: int
) -> None:
    _round_trip(N, K, dtype, kept, seed)


def test_layout() -> None:
    values = torch.zeros(2, 10, dtype=torch.int8)
    values[0, 0], values[0, 9], values[1, 3] = 5, -7, 9
    encoded = bitmap.encode(values)
    assert encoded.weight_bitmask.tolist() == [[0b1, 0b10], [0b1000, 0]]
    assert encoded.weight.tolist() == [5, -7, 9]
    assert encoded.row_offsets.tolist() == [0, 2, 3]


def test_a_kept_zero_stays_in_the_mask() -> None:
    encoded = bitmap.encode(torch.zeros(1, 4), torch.tensor([[True, False, False, True]]))
    assert encoded.weight.tolist() == [0.0, 0.0]
    assert bitmap.decode_mask(encoded.weight_bitmask, 4).tolist() == [[True, False, False, True]]


V = wide_weight(3, 10) + 1
MASK = random_mask(3, 10)
E = bitmap.encode(V, MASK)


def _offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values)


ERRORS: Errors = {
    "1-D": (lambda: bitmap.encode(V[0]), ValueError, "values must be [N, K], got shape [10]"),
    "int32": (lambda: bitmap.encode(V.int()), TypeError, "got torch.int32"),
    "inf": (lambda: bitmap.encode(V / 0), ValueError, "values has 30 NaN or infinite"),
    "mask of floats": (lambda: bitmap.encode(V, MASK.float()), TypeError, "mask must be bool"),
    "mask of another shape": (
        lambda: bitmap.encode(V, MASK[:, :5]),
        ValueError,
        "mask must be [3, 10] as values, got [3, 5]",
    ),
    "bitmask too short": (
        lambda: bitmap.decode(E.weight, E.weight_bitmask[:, :1], E.row_offsets, 10),
        ValueError,
        "weight_bitmask of 10 inputs must be [N, 2], got [3, 1]",
    ),
    "bitmask dtype": (
        lambda: bitmap.decode(E.weight, E.weight_bitmask.int(), E.row_offsets, 10),
        TypeError,
        "must be uint8, got torch.int32",
    ),
    "bits past K": (
        lambda: bitmap.decode(E.weight, E.weight_bitmask | 128, E.row_offsets, 10),
        ValueError,
        "past the last of 10 inputs",
    ),
    "too few offsets": (
        lambda: bitmap.decode(E.weight, E.weight_bitmask, E.row_offsets[:-1], 10),
        ValueError,
        "row_offsets must be int64 [4], got torch.int64 [3]",
    ),
    "offsets that descend": (
        lambda: bitmap.decode(E.weight, E.weight_bitmask, E.row_offsets.flip(0), 10),
        ValueError,
        "of row 0 do not match its",
    ),
    "offsets past the popcount": (
        lambda: bitmap.decode(E.weight, E.weight_bitmask, E.row_offsets + _offsets(0, 0, 1, 1), 10),
        ValueError,
        "of row 1 do not match its",
    ),
    "offsets from 1": (
        lambda: bitmap.decode(E.weight, E.weight_bitmask, E.row_offsets + 1, 10),
        ValueError,
        "of row 0 do not match its",
    ),
    "values cut off": (
        lambda: bitmap.decode(E.weight[:-1], E.weight_bitmask, E.row_offsets, 10),
        ValueError,
        f"weight must be the [{E.weight.numel()}] values that weight_bitmask counts",
    ),
    "values too many": (
        lambda: bitmap.decode(E.weight.repeat(2), E.weight_bitmask, E.row_offsets, 10),
        ValueError,
        f"got [{2 * E.weight.numel()}]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_was_given(case: str) -> None:
    assert_raises(*ERRORS[case])
