"""Block-sparse weights: exact round trips, layout, and indices that leave the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq.formats import block
from tests.helpers import Errors, assert_equal, assert_raises, random_mask, seeds, wide_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def _round_trip(
    rows: int, columns: int, shape: tuple[int, int], dtype: torch.dtype, kept: float, seed: int
) -> None:
    (R, C), N, K = shape, rows * shape[0], columns * shape[1]
    values = wide_weight(N, K, seed).clamp(-100, 100).to(dtype)
    blocks = random_mask(rows, columns, seed, kept)
    mask = blocks.repeat_interleave(R, 0).repeat_interleave(C, 1)
    kept_values = torch.where(mask, values, torch.zeros((), dtype=dtype))
    encoded = block.encode(values, shape, mask)
    assert encoded.weight.shape == (int(blocks.sum()), R, C)
    assert_equal(block.decode(*encoded, K, N), kept_values, "values")
    found = block.decode_mask(encoded.block_index, encoded.block_offsets, K, N, shape)
    assert_equal(found, mask, "mask")
    assert_equal(block.decode(*block.encode(kept_values, shape), K, N), kept_values, "no mask")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("rows", "columns", "shape"),
    [
        (0, 0, (4, 4)),
        (0, 3, (2, 5)),
        (3, 0, (2, 5)),
        (1, 1, (1, 1)),
        (5, 7, (3, 2)),
        (2, 3, (32, 32)),
    ],
    ids=str,
)
def test_round_trip(
    rows: int, columns: int, shape: tuple[int, int], kept: float, dtype: torch.dtype
) -> None:
    _round_trip(rows, columns, shape, dtype, kept, seed=0)


@given(
    rows=st.integers(0, 6),
    columns=st.integers(0, 6),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    kept=st.floats(0, 1),
    seed=seeds,
)
def test_round_trip_of_any_shape(
    rows: int, columns: int, shape: tuple[int, int], dtype: torch.dtype, kept: float, seed: int
) -> None:
    _round_trip(rows, columns, shape, dtype, kept, seed)


def test_layout() -> None:
    values = torch.arange(24.0).reshape(4, 6)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 5] = mask[2, 0] = mask[3, 4] = True  # one element keeps its block of 2 × 3
    encoded = block.encode(values, (2, 3), mask)
    assert encoded.block_index.tolist() == [1, 0, 1]
    assert encoded.block_offsets.tolist() == [0, 1, 3]
    assert encoded.weight[0].tolist() == [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0]]


V = torch.arange(1.0, 25).reshape(4, 6)
E = block.encode(V, (2, 3))


def _decode(index: list[int], offsets: list[int], weight: Tensor = E.weight) -> Tensor:
    as_int32 = (torch.tensor(values, dtype=torch.int32) for values in (index, offsets))
    return block.decode(weight, *as_int32, 6, 4)


ERRORS: Errors = {
    "does not divide": (
        lambda: block.encode(V, (3, 3)),
        ValueError,
        "blocks of 3×3 do not divide the weight [4, 6]",
    ),
    "empty block": (lambda: block.encode(V, (0, 3)), ValueError, "blocks of 0×3"),
    "mask dtype": (lambda: block.encode(V, (2, 3), V), TypeError, "mask must be bool"),
    "mask shape": (lambda: block.encode(V, (2, 3), V[:2] > 0), ValueError, "got [2, 6]"),
    "inf": (lambda: block.encode(V / 0, (2, 3)), ValueError, "values has 24 NaN or infinite"),
    "dtype": (lambda: block.encode(V.int(), (2, 3)), TypeError, "torch.int32"),
    "column past the end": (
        lambda: _decode([0, 1, 0, 2], [0, 2, 4]),
        ValueError,
        "block_index must be 0..1 (weight [4, 6], blocks 2×3), got 0..2",
    ),
    "negative column": (lambda: _decode([-1, 1, 0, 1], [0, 2, 4]), ValueError, "got -1..1"),
    "repeated": (
        lambda: _decode([0, 1, 1, 1], [0, 2, 4]),
        ValueError,
        "block row 1 has 1 after 1",
    ),
    "descending": (lambda: _decode([1, 0, 0, 1], [0, 2, 4]), ValueError, "block row 0 has 0 after"),
    "offsets descend": (lambda: _decode([0, 1, 0, 1], [0, 5, 4]), ValueError, "must ascend from 0"),
    "offsets too few": (lambda: _decode([0, 1, 0, 1], [0, 4]), ValueError, "in 2 steps"),
    "offsets past the blocks": (lambda: _decode([0, 1, 0, 1], [0, 2, 5]), ValueError, "4 blocks"),
    "offsets from 1": (lambda: _decode([0, 1, 0, 1], [1, 2, 4]), ValueError, "ascend from 0"),
    "values cut off": (
        lambda: _decode([0, 1, 0, 1], [0, 2, 4], E.weight[:3]),
        ValueError,
        "weight must be [4, R, C] as block_index, got [3, 2, 3]",
    ),
    "index dtype": (
        lambda: block.decode(E.weight, E.block_index.long(), E.block_offsets, 6, 4),
        TypeError,
        "block_index must be int32 [n], got torch.int64 [4]",
    ),
    "block of the mask": (
        lambda: block.decode_mask(E.block_index, E.block_offsets, 6, 4, (4, 3)),
        ValueError,
        "in 1 steps (weight [4, 6], blocks 4×3)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_was_given(case: str) -> None:
    assert_raises(*ERRORS[case])
