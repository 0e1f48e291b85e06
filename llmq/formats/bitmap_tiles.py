"""Bitmap tiles: an unstructured sparse weight as tensor cores read it (`csrc/cuda/kernels.h`).

Indexing in plain PyTorch, on any device, bit for bit in both directions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.formats import bitmap
from llmq.formats.bitmap import BitmapWeight

_HEADER = 32  # bytes before the masks of a strip's chunk
# Dimensions of a weight cut into strips and chunks: rows 32·S + 16·r + 8·h + g, inputs chunk·C +
# 64·along + 32·step + 16·unit + 4·t + i.
_SPLIT = ("S", "r", "h", "g", "C", "along", "step", "unit", "t", "i")
_VALUES = tuple(map(_SPLIT.index, ("S", "C", "r", "along", "step", "h", "g", "t", "unit", "i")))


def _sizes(N: int, K: int, value_bytes: int) -> tuple[int, ...]:
    chunk = 128 // value_bytes
    return (-(-N // 32), 2, 2, 8, -(-K // chunk), chunk // 64, 2, 2, 4, 4)


def _to_records(rows: Tensor, value_bytes: int) -> Tensor:
    """Return [N, K] as [strips · chunks, weights] in the order of the values, zeros filled up."""
    N, K = rows.shape
    filled = F.pad(rows, (0, -K % (128 // value_bytes), 0, -N % 32))
    split = filled.view(_sizes(N, K, value_bytes)).permute(_VALUES)
    return split.reshape(-1, 32 * 128 // value_bytes)


def _from_records(records: Tensor, value_bytes: int, N: int, K: int) -> Tensor:
    sizes = _sizes(N, K, value_bytes)
    split = records.view([sizes[i] for i in _VALUES]).permute([_VALUES.index(i) for i in range(10)])
    return split.reshape(32 * sizes[0], -1)[:N, :K]


def _places(mask: Tensor, offsets: Tensor) -> Tensor:
    """Return where each kept value of `mask` [records, weights] stands."""
    return (offsets[:, :-1].reshape(-1, 1) + mask.cumsum(1) - 1)[mask]


def pack(weight: Tensor, weight_bitmask: Tensor, row_offsets: Tensor, K: int) -> BitmapWeight:
    """Return canonical `bitmap` tensors as values, masks [S, C, 1, bytes] and offsets [S, C+1]."""
    size = weight.element_size()
    values = bitmap.decode(weight, weight_bitmask, row_offsets, K)
    rows = bitmap.decode_mask(weight_bitmask, K)
    sizes = _sizes(rows.shape[0], K, size)
    strips, chunks = sizes[0], sizes[4]
    mask = _to_records(rows, size)

    tiles = 4 // size
    groups = mask.view(-1, tiles, 4, 32, 8)  # of a tile's byte of the mask word: lanes, bits
    counts = groups.sum((3, 4))
    begins = (counts.flatten(1).cumsum(1) - counts.flatten(1)).to(torch.int16)
    header = F.pad(begins.view(torch.uint8), (0, _HEADER - 8 * tiles))
    powers = (1 << torch.arange(8, device=mask.device)).to(torch.uint8)
    masks = (groups * powers).sum(-1, dtype=torch.uint8).transpose(2, 3).reshape(len(mask), -1)
    bitmask = torch.cat((header, masks), 1).view(strips, chunks, 1, -1)

    lengths = (mask.sum(1) * size + 12 + 31) // 32 * 32 // size
    ends = lengths.cumsum(0).view(strips, chunks)
    offsets = torch.cat((ends[:, :1] - lengths.view(strips, chunks)[:, :1], ends), 1)
    packed = weight.new_zeros(int(ends[-1, -1]) if ends.numel() else 0)
    packed[_places(mask, offsets)] = _to_records(values, size)[mask]
    return BitmapWeight(packed, bitmask, offsets)


def unpack(weight: Tensor, weight_bitmask: Tensor, offsets: Tensor, N: int, K: int) -> BitmapWeight:
    """Return the canonical tensors of `pack`."""
    size = weight.element_size()
    masks = weight_bitmask.flatten(0, 2)[:, _HEADER:].reshape(-1, 4 // size, 32, 4, 1)
    shifts = torch.arange(8, dtype=torch.uint8, device=weight.device)
    mask = ((masks >> shifts) & 1).bool().transpose(2, 3).reshape(len(masks), -1)
    values = weight.new_zeros(mask.shape)
    values[mask] = weight[_places(mask, offsets)]
    return bitmap.encode(
        _from_records(values, size, N, K).contiguous(), _from_records(mask, size, N, K).contiguous()
    )
