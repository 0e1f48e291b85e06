"""Bitmap tiles: an unstructured sparse weight as tensor cores read it (`csrc/cuda/kernels.h`).

Indexing in plain PyTorch, on any device, bit for bit in both directions; a slice of strips at a
time, so that beside the tensors themselves memory for no more than those weights is taken.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.formats import bitmap
from llmq.formats.bitmap import BitmapWeight

_SLICE = 1 << 22  # weights, if that is a strip
_HEADER = 32  # bytes before the masks of a strip's chunk: where its 8 runs stand
# Dimensions of a weight cut into strips and chunks: row 32·S + 16·r + 8·h + g, input chunk·C + 32·p
# + 16·u + 4·t + i. By the bytes of a value: the order of values, and of the masks' bits from the
# lowest of a word on.
_SPLIT = "SrhgCputi"
_VALUES = {1: "SCgprhtui", 2: "SCgpurhti"}
_BITS = {1: "SCgtpuirh", 2: "SCgtpiurh"}


def _sizes(strips: int, K: int, value_bytes: int) -> list[int]:
    chunk = 128 // value_bytes
    return [strips, 2, 2, 8, -(-K // chunk), chunk // 32, 2, 4, 4]


def _to_records(rows: Tensor, order: str, value_bytes: int) -> Tensor:
    """Return [N, K], filled up with zeros, as [strips · chunks, weights] in that order."""
    N, K = rows.shape
    sizes = _sizes(-(-N // 32), K, value_bytes)
    filled = F.pad(rows, (0, -K % (128 // value_bytes), 0, -N % 32)).view(sizes)
    return filled.permute([_SPLIT.index(d) for d in order]).reshape(sizes[0] * sizes[4], -1)


def _from_records(records: Tensor, order: str, value_bytes: int, N: int, K: int) -> Tensor:
    sizes = _sizes(-(-N // 32), K, value_bytes)
    split = records.view([sizes[_SPLIT.index(d)] for d in order])
    rows = split.permute([order.index(d) for d in _SPLIT]).reshape(32 * sizes[0], -1)
    return rows[:N, :K].contiguous()


def _slices(N: int, K: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each slice and the one after its last."""
    rows = max(_SLICE // max(K, 1) // 32, 1) * 32
    for first in range(0, N, rows):
        yield first, min(first + rows, N)


def _with_padding(kept: Tensor, value_bytes: int) -> Tensor:
    """Return a mask of records with places behind them, up to a multiple of 16 bytes of values."""
    unit = 16 // value_bytes
    missing = -kept.sum(1, dtype=torch.int32) % unit
    places = torch.arange(unit, dtype=torch.int32, device=kept.device)
    return torch.cat((kept, places < missing[:, None]), 1)


def pack(weight: Tensor, weight_bitmask: Tensor, row_offsets: Tensor, K: int) -> BitmapWeight:
    """Return canonical `bitmap` tensors as values, masks [S, C, 1, bytes] and offsets [S, C]."""
    size, N = weight.element_size(), weight_bitmask.shape[0]
    powers = (1 << torch.arange(8, device=weight.device)).to(torch.uint8)
    most = torch.tensor(7 * [33] + [34], dtype=torch.int32, device=weight.device)
    packed, bitmasks, lengths = [], [], []
    for first, last in _slices(N, K):
        offsets = row_offsets[first : last + 1]
        values = weight[int(offsets[0]) : int(offsets[-1])]
        bits = weight_bitmask[first:last]
        rows = bitmap.decode(values, bits, offsets - offsets[0], K)
        mask = bitmap.decode_mask(bits, K)

        kept = _to_records(mask, _VALUES[size], size)
        ends = kept.view(len(kept), 8, -1).sum(2, dtype=torch.int32).cumsum(1, dtype=torch.int32)
        begins = F.pad(ends[:, :-1], (1, 0))
        units = (ends * size + 12 + 15) // 16 - begins * size // 16
        runs = torch.stack((begins, units.minimum(most)), 2).to(torch.int16).flatten(1)
        words = _to_records(mask, _BITS[size], size).view(len(kept), -1, 8) * powers
        masks = words.sum(2, dtype=torch.uint8)
        bitmasks.append(torch.cat((runs.view(torch.uint8), masks), 1))
        placed = _with_padding(kept, size)
        unit = placed.shape[1] - kept.shape[1]
        packed.append(F.pad(_to_records(rows, _VALUES[size], size), (0, unit))[placed])
        lengths.append(placed.sum(1))
    strips, chunks = -(-N // 32), -(-K * size // 128)
    counts = torch.cat(lengths)
    return BitmapWeight(
        torch.cat((*packed, weight.new_zeros(16 // size))),
        torch.cat(bitmasks).view(strips, chunks, 1, -1),
        (counts.cumsum(0) - counts).view(strips, chunks),
    )


def unpack(weight: Tensor, weight_bitmask: Tensor, offsets: Tensor, N: int, K: int) -> BitmapWeight:
    """Return the canonical tensors of `pack`."""
    size, begin = weight.element_size(), 0
    shifts = torch.arange(8, dtype=torch.uint8, device=weight.device)
    slices = []
    for first, last in _slices(N, K):
        masks = weight_bitmask[first // 32 : -(-last // 32)].flatten(0, 2)[:, _HEADER:, None]
        bits = ((masks >> shifts) & 1).bool().flatten(1)
        mask = _from_records(bits, _BITS[size], size, last - first, K)
        placed = _with_padding(_to_records(mask, _VALUES[size], size), size)
        values = weight.new_zeros(placed.shape)
        end = begin + int(placed.sum())
        values[placed] = weight[begin:end]
        begin = end
        values = values[:, : bits.shape[1]].contiguous()
        rows = _from_records(values, _VALUES[size], size, last - first, K)
        slices.append(bitmap.encode(rows, mask))
    counts = torch.cat([s.row_offsets.diff() for s in slices])
    return BitmapWeight(
        torch.cat([s.weight for s in slices]),
        torch.cat([s.weight_bitmask for s in slices]),
        F.pad(counts.cumsum(0), (1, 0)),
    )
