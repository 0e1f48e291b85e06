"""Block sparsity: whole R × C blocks are kept or dropped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats._checks import check_sparse


class BlockWeight(NamedTuple):
    """Canonical storage of a block-sparse weight [N, K] with B kept blocks."""

    weight: Tensor  # [B, R, C], block row by block row
    block_index: Tensor  # int32 [B]: block column, ascending within a block row
    block_offsets: Tensor  # int32 [N/R + 1]: block row i's blocks are offsets[i]..offsets[i+1]-1


def encode(values: Tensor, block: tuple[int, int], mask: Tensor | None = None) -> BlockWeight:
    """Keep the blocks that a mask touches, whole.

    Args:
        values: int8 codes or finite floating point [N, K].
        block: (R, C), rows and columns of a block, which divide N and K.
        mask: bool [N, K]; None keeps the blocks with any value that is not zero.

    Raises:
        TypeError: if values or mask are of the wrong type.
        ValueError: if blocks do not divide the weight, or values or mask have the wrong shape.
    """
    mask = check_sparse(values, mask)
    N, K = values.shape
    R, C = _check_block(N, K, block)
    kept = mask.reshape(N // R, R, K // C, C).any(-1).any(1)
    blocks = values.reshape(N // R, R, K // C, C).transpose(1, 2)[kept]
    offsets = torch.zeros(N // R + 1, dtype=torch.int32, device=values.device)
    offsets[1:] = kept.sum(-1).cumsum(0)
    return BlockWeight(blocks.contiguous(), kept.nonzero()[:, 1].to(torch.int32), offsets)


def _check_block(N: int, K: int, block: tuple[int, int]) -> tuple[int, int]:
    R, C = block
    if R < 1 or C < 1 or N % R or K % C:
        raise ValueError(f"blocks of {R}×{C} do not divide the weight [{N}, {K}]")
    return R, C


def _kept(
    block_index: Tensor, block_offsets: Tensor, N: int, K: int, block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the block row and block column of each kept block, int64 [B]."""
    R, C = _check_block(N, K, block)
    rows, columns = N // R, K // C
    for name, tensor in (("block_index", block_index), ("block_offsets", block_offsets)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise TypeError(f"{name} must be int32 [n], got {tensor.dtype} {list(tensor.shape)}")
    B = block_index.numel()
    counts = block_offsets.diff().long()
    if (
        counts.numel() != rows
        or (counts < 0).any()
        or int(block_offsets[0]) != 0
        or int(block_offsets[-1]) != B
    ):
        raise ValueError(
            f"block_offsets must ascend from 0 to the {B} blocks of block_index in {rows} steps "
            f"(weight [{N}, {K}], blocks {R}×{C}), got {list(block_offsets.shape)}"
        )
    if B and not 0 <= int(block_index.min()) <= int(block_index.max()) < columns:
        raise ValueError(
            f"block_index must be 0..{columns - 1} (weight [{N}, {K}], blocks {R}×{C}), got "
            f"{int(block_index.min())}..{int(block_index.max())}"
        )
    row = torch.repeat_interleave(torch.arange(rows, device=counts.device), counts)
    # Ascending within a row and rows ascending: one increasing sequence, so none repeats.
    wrong = (row * columns + block_index).diff() <= 0
    if wrong.any():
        at = int(wrong.int().argmax()) + 1
        raise ValueError(
            f"block_index must ascend within a block row without repeats; block row "
            f"{int(row[at])} has {int(block_index[at])} after {int(block_index[at - 1])}"
        )
    return row, block_index.long()


def decode_mask(
    block_index: Tensor, block_offsets: Tensor, K: int, N: int, block: tuple[int, int]
) -> Tensor:
    """Return the bool mask [N, K], True in every element of a kept block.

    Raises:
        TypeError, ValueError: if index and offsets do not belong together or leave the weight.
    """
    row, column = _kept(block_index, block_offsets, N, K, block)
    R, C = block
    kept = torch.zeros(N // R, K // C, dtype=torch.bool, device=row.device)
    kept[row, column] = True
    return kept.repeat_interleave(R, 0).repeat_interleave(C, 1)


def decode(weight: Tensor, block_index: Tensor, block_offsets: Tensor, K: int, N: int) -> Tensor:
    """Return the values [N, K] in their dtype, zero where no block is kept.

    Raises:
        TypeError, ValueError: if the tensors do not belong together or leave the weight.
    """
    if weight.dim() != 3 or weight.shape[0] != block_index.numel():
        raise ValueError(
            f"weight must be [{block_index.numel()}, R, C] as block_index, got {list(weight.shape)}"
        )
    R, C = weight.shape[1:]
    row, column = _kept(block_index, block_offsets, N, K, (R, C))
    values = weight.new_zeros(N // R, K // C, R, C)
    values[row, column] = weight
    return values.transpose(1, 2).reshape(N, K)
