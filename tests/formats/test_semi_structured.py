"""2:4 weights: exact round trips, layout, and metadata that is no 2:4 pattern."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq.formats import semi_structured
from tests.helpers import Errors, assert_equal, assert_raises, generator, seeds, sizes, wide_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def _two_of_four(N: int, K: int, seed: int) -> Tensor:
    order = torch.rand(N, K // 4, 4, generator=generator(seed)).argsort(-1)
    return (order < 2).reshape(N, K)


def _round_trip(N: int, K: int, dtype: torch.dtype, seed: int) -> None:
    values = wide_weight(N, K, seed).clamp(-100, 100).to(dtype)
    mask = _two_of_four(N, K, seed)
    encoded = semi_structured.encode(values, mask)
    assert encoded.weight.shape == (N, K // 2)
    assert encoded.weight_meta.shape == (N, (K + 7) // 8)
    assert_equal(semi_structured.decode_mask(encoded.weight_meta, K), mask, "mask")
    kept = torch.where(mask, values, torch.zeros((), dtype=dtype))
    assert_equal(semi_structured.decode(*encoded, K), kept, "values")
    # Values that are 2:4 already need no mask, even where a group has less than two non-zeros.
    assert_equal(semi_structured.decode(*semi_structured.encode(kept), K), kept, "no mask")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(0, 0), (0, 4), (3, 0), (1, 4), (2, 8), (17, 12), (15, 68)])
def test_round_trip(N: int, K: int, dtype: torch.dtype) -> None:
    _round_trip(N, K, dtype, seed=0)


@given(N=sizes, groups=st.integers(0, 12), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_round_trip_of_any_shape(N: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    _round_trip(N, 4 * groups, dtype, seed)


def test_layout() -> None:
    values = torch.tensor([[0, 5, 0, 6, 7, 8, 0, 0, 0, 0, 0, 9]], dtype=torch.int8)
    encoded = semi_structured.encode(values)
    # Positions 1, 3 and 0, 1 share a byte; the zero that goes with 9 is the group's first.
    assert encoded.weight.tolist() == [[5, 6, 7, 8, 0, 9]]
    assert encoded.weight_meta.tolist() == [[0b0100_1101, 0b1100]]


V = torch.arange(1.0, 17).reshape(2, 8)
MASK = torch.tensor([True, False, True, False]).repeat(2, 2)
E = semi_structured.encode(V, MASK)
ERRORS: Errors = {
    "K": (lambda: semi_structured.encode(V[:, :6]), ValueError, "multiple of 4 inputs, got [2, 6]"),
    "values not 2:4": (
        lambda: semi_structured.encode(torch.where(torch.arange(8) < 4, V * MASK, V)),
        ValueError,
        "values [2, 8] must keep 2 of every 4 inputs; row 0, columns 4..7 keep 4",
    ),
    "mask keeps one": (
        lambda: semi_structured.encode(V, MASK & (torch.arange(8) < 6)),
        ValueError,
        "mask [2, 8] must keep 2 of every 4 inputs; row 0, columns 4..7 keep 1",
    ),
    "mask dtype": (lambda: semi_structured.encode(V, MASK.int()), TypeError, "must be bool"),
    "mask shape": (lambda: semi_structured.encode(V, MASK[:1]), ValueError, "got [1, 8]"),
    "nan": (lambda: semi_structured.encode(V / 0, MASK), ValueError, "values has 16 NaN"),
    "integers": (lambda: semi_structured.encode(V.long(), MASK), TypeError, "torch.int64"),
    "3-D": (lambda: semi_structured.encode(V[None], MASK), ValueError, "got shape [1, 2, 8]"),
    "not ascending": (
        lambda: semi_structured.decode(E.weight, torch.full_like(E.weight_meta, 0x18), 8),
        ValueError,
        "positions [1, 0] of row 0, columns 4..7 are not ascending",
    ),
    "repeated": (
        lambda: semi_structured.decode(E.weight, torch.full_like(E.weight_meta, 0x88 | 2), 8),
        ValueError,
        "positions [2, 2] of row 0, columns 0..3 are not ascending",
    ),
    "past K": (
        lambda: semi_structured.decode(E.weight[:, :2], E.weight_meta, 4),
        ValueError,
        "positions past the last of 4 inputs",
    ),
    "meta cut off": (
        lambda: semi_structured.decode(E.weight, E.weight_meta, 12),
        ValueError,
        "weight_meta of 12 inputs must be [N, 2]",
    ),
    "meta dtype": (
        lambda: semi_structured.decode(E.weight, E.weight_meta.int(), 8),
        TypeError,
        "must be uint8, got torch.int32",
    ),
    "values cut off": (
        lambda: semi_structured.decode(E.weight[:, :3], E.weight_meta, 8),
        ValueError,
        "weight must be [2, 4] as weight_meta, got [2, 3]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_was_given(case: str) -> None:
    assert_raises(*ERRORS[case])
