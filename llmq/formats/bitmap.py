"""Unstructured sparsity: the kept values row by row, and one bit a weight that says where."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats._checks import check_matrix, check_sparse


class BitmapWeight(NamedTuple):
    """Canonical storage of an unstructured sparse weight [N, K]."""

    weight: Tensor  # [kept values], row by row
    weight_bitmask: Tensor  # uint8 [N, ceil(K/8)]: bit i of byte j is column 8j+i
    row_offsets: Tensor  # int64 [N+1]: row n's values are weight[row_offsets[n]:row_offsets[n+1]]


def encode(values: Tensor, mask: Tensor | None = None) -> BitmapWeight:
    """Keep the values under a mask.

    Args:
        values: int8 codes or finite floating point [N, K].
        mask: bool [N, K], True where kept, which may hold 0; None keeps what is not zero.

    Raises:
        TypeError, ValueError: if values or mask are of the wrong type, shape or not finite.
    """
    mask = check_sparse(values, mask)
    N, K = values.shape
    padded = torch.nn.functional.pad(mask, (0, -K % 8)).reshape(N, -(-K // 8), 8)
    powers = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=values.device)
    bitmask = (padded * powers).sum(-1, dtype=torch.uint8)
    offsets = torch.zeros(N + 1, dtype=torch.int64, device=values.device)
    offsets[1:] = mask.sum(-1).cumsum(0)
    return BitmapWeight(values[mask], bitmask, offsets)


def decode_mask(weight_bitmask: Tensor, K: int) -> Tensor:
    """Return the bool mask [N, K] of a bitmask uint8 [N, ceil(K/8)].

    Raises:
        TypeError: if the bitmask is not uint8.
        ValueError: if its rows are not of K bits, or a bit past column K is set.
    """
    check_matrix("weight_bitmask", weight_bitmask, "ceil(K/8)")
    if weight_bitmask.dtype != torch.uint8:
        raise TypeError(f"weight_bitmask must be uint8, got {weight_bitmask.dtype}")
    if weight_bitmask.shape[1] != -(-K // 8):
        raise ValueError(
            f"weight_bitmask of {K} inputs must be [N, {-(-K // 8)}], got "
            f"{list(weight_bitmask.shape)}"
        )
    if K % 8 and (weight_bitmask[:, -1] >> K % 8).any():
        raise ValueError(f"weight_bitmask has bits set past the last of {K} inputs")
    shifts = torch.arange(8, dtype=torch.uint8, device=weight_bitmask.device)
    bits = (weight_bitmask[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :K].bool()


def decode(weight: Tensor, weight_bitmask: Tensor, row_offsets: Tensor, K: int) -> Tensor:
    """Return the values [N, K] in their dtype, zero where none is kept.

    Raises:
        TypeError, ValueError: if the three tensors do not belong together.
    """
    mask = decode_mask(weight_bitmask, K)
    N = mask.shape[0]
    if tuple(row_offsets.shape) != (N + 1,) or row_offsets.dtype != torch.int64:
        raise ValueError(
            f"row_offsets must be int64 [{N + 1}], got {row_offsets.dtype} "
            f"{list(row_offsets.shape)}"
        )
    counts = mask.sum(-1)
    wrong = row_offsets.diff() != counts
    if row_offsets[0] != 0 or wrong.any():
        row = int(wrong.int().argmax()) if N else 0
        raise ValueError(
            f"row_offsets {row_offsets[row : row + 2].tolist()} of row {row} do not match its "
            f"{int(counts[row]) if N else 0} bits in weight_bitmask"
        )
    if weight.dim() != 1 or weight.numel() != int(row_offsets[-1]):
        raise ValueError(
            f"weight must be the [{int(row_offsets[-1])}] values that weight_bitmask counts, got "
            f"{list(weight.shape)}"
        )
    values = weight.new_zeros(mask.shape)
    values[mask] = weight
    return values
