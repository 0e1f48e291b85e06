"""The layout of a weight for tensor cores: tiles of 16 outputs × 64 inputs (`csrc/cuda/kernels.h`).

Permutations in plain PyTorch, on any device, bit for bit in both directions. N and K are filled up
with zeros to whole tiles, P × C of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.formats import uniform

# Dimensions of a weight cut into tiles: rows 16·P + 8·r8 + g, inputs 64·C + 32·half + 8·t + 4·e4 +
# 2·e2 + e1.
_SPLIT = ("P", "r8", "g", "C", "half", "t", "e4", "e2", "e1")
_BYTES = tuple(map(_SPLIT.index, ("P", "C", "half", "g", "t", "e4", "r8", "e2", "e1")))
_NIBBLES = tuple(map(_SPLIT.index, ("P", "C", "g", "t", "half", "e4", "e1", "e2", "r8")))


def _permute(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    N, K = weight.shape
    filled = F.pad(weight, (0, -K % 64, 0, -N % 16))
    return filled.view(_sizes(N, K)).permute(order).contiguous()


def _restore(tiles: Tensor, order: tuple[int, ...], N: int, K: int) -> Tensor:
    sizes = _sizes(N, K)
    split = tiles.reshape([sizes[i] for i in order]).permute([order.index(i) for i in range(9)])
    return split.reshape(16 * sizes[0], 64 * sizes[3])[:N, :K].contiguous()


def _sizes(N: int, K: int) -> tuple[int, ...]:
    return (-(-N // 16), 2, 8, -(-K // 64), 2, 4, 2, 2, 2)


def pack(weight: Tensor, bits: int, K: int) -> Tensor:
    """Return canonical codes, int8 [N, K] or nibbles [N, ceil(K/2)], as tiles [P, C, ., 32, 16]."""
    if bits == 8:
        return _permute(weight, _BYTES).view(-1, -(-K // 64), 2, 32, 16)
    nibbles = _permute(uniform.unpack_int4(weight, K), _NIBBLES).view(-1, 2)
    packed = nibbles[:, 0] | (nibbles[:, 1] << 4)
    return packed.to(torch.int8).view(-1, -(-K // 64), 1, 32, 16)


def unpack(tiles: Tensor, bits: int, N: int, K: int) -> Tensor:
    """Return the canonical codes of `pack`."""
    if bits == 8:
        return _restore(tiles, _BYTES, N, K)
    nibbles = torch.stack((tiles & 15, (tiles >> 4) & 15), -1)
    return uniform.pack_int4(_restore(nibbles, _NIBBLES, N, K))
