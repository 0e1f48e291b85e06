"""Block sparsity: whole R × C blocks are kept or dropped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats._checks import check_mask


class BlockWeight(NamedTuple):
    """Canonical storage of a block-sparse weight [N, K]."""

    weight: Tensor  # [B, R, C]
    block_index: Tensor  # int32 [B]: block column
    block_offsets: Tensor  # int32 [N/R + 1]


def encode(values: Tensor, block: tuple[int, int], mask: Tensor | None = None) -> BlockWeight:
    """Keep the blocks of values [N, K] that `mask` touches (default: those with a non-zero)."""
    N, K = values.shape
    R, C = block
    if N % R or K % C:
        raise ValueError(f"blocks of {R}×{C} do not divide the weight [{N}, {K}]")
    mask = values != 0 if mask is None else mask
    check_mask(values, mask)
    kept = mask.reshape(N // R, R, K // C, C).any(-1).any(1)
    blocks = values.reshape(N // R, R, K // C, C).transpose(1, 2)[kept]
    offsets = torch.zeros(N // R + 1, dtype=torch.int32, device=values.device)
    offsets[1:] = kept.sum(-1).cumsum(0)
    return BlockWeight(blocks.contiguous(), kept.nonzero()[:, 1].to(torch.int32), offsets)


def _rows(block_index: Tensor, block_offsets: Tensor, columns: int) -> Tensor:
    counts = block_offsets.diff().long()
    if (
        (counts < 0).any()
        or int(block_offsets[-1]) != block_index.numel()
        or int(block_offsets[0]) != 0
        or (
            block_index.numel()
            and not 0 <= int(block_index.min()) <= int(block_index.max()) < columns
        )
    ):
        raise ValueError("block: index and offsets do not belong together or exceed the weight")
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)


def decode_mask(
    block_index: Tensor, block_offsets: Tensor, K: int, N: int, block: tuple[int, int]
) -> Tensor:
    """Return the bool mask [N, K]."""
    R, C = block
    kept = torch.zeros(N // R, K // C, dtype=torch.bool, device=block_index.device)
    kept[_rows(block_index, block_offsets, K // C), block_index.long()] = True
    return kept.repeat_interleave(R, 0).repeat_interleave(C, 1)


def decode(weight: Tensor, block_index: Tensor, block_offsets: Tensor, K: int, N: int) -> Tensor:
    """Return the values [N, K], zero where no block is kept."""
    _, R, C = weight.shape
    values = weight.new_zeros(N // R, K // C, R, C)
    values[_rows(block_index, block_offsets, K // C), block_index.long()] = weight
    return values.transpose(1, 2).reshape(N, K)
