"""Unstructured sparsity: the kept values row by row, and one bit a weight that says where."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats._checks import check_mask


class BitmapWeight(NamedTuple):
    """Canonical storage of an unstructured sparse weight [N, K]."""

    weight: Tensor  # [kept values]
    weight_bitmask: Tensor  # uint8 [N, ceil(K/8)]: bit i of byte j is column 8j+i
    row_offsets: Tensor  # int64 [N+1]


def encode(values: Tensor, mask: Tensor | None = None) -> BitmapWeight:
    """Keep values [N, K] under `mask` (default: those that are not zero)."""
    mask = values != 0 if mask is None else mask
    check_mask(values, mask)
    N, K = values.shape
    padded = torch.nn.functional.pad(mask, (0, -K % 8)).reshape(N, (K + 7) // 8, 8)
    powers = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=values.device)
    bitmask = (padded * powers).sum(-1, dtype=torch.uint8)
    offsets = torch.zeros(N + 1, dtype=torch.int64, device=values.device)
    offsets[1:] = mask.sum(-1).cumsum(0)
    return BitmapWeight(values[mask], bitmask, offsets)


def decode_mask(weight_bitmask: Tensor, K: int) -> Tensor:
    """Return the bool mask [N, K]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=weight_bitmask.device)
    bits = (weight_bitmask[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :K].bool()


def decode(weight: Tensor, weight_bitmask: Tensor, row_offsets: Tensor, K: int) -> Tensor:
    """Return the values [N, K], zero where none is kept."""
    mask = decode_mask(weight_bitmask, K)
    counts = mask.sum(-1)
    if weight.numel() != int(counts.sum()) or not torch.equal(row_offsets.diff(), counts):
        raise ValueError("bitmap: values, bitmask and row_offsets do not belong together")
    values = weight.new_zeros(mask.shape)
    values[mask] = weight
    return values
