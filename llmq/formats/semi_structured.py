"""2:4 sparsity: of every 4 inputs 2 are kept, with 2-bit positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats._checks import check_mask


class SemiStructuredWeight(NamedTuple):
    """Canonical storage of a 2:4 sparse weight [N, K]."""

    weight: Tensor  # [N, K/2]
    weight_meta: Tensor  # uint8 [N, ceil(K/8)]: a nibble a group of 4: first | second << 2


def encode(values: Tensor, mask: Tensor | None = None) -> SemiStructuredWeight:
    """Keep two of every four values [N, K], those under `mask`."""
    N, K = values.shape
    if K % 4:
        raise ValueError(f"2:4 needs a multiple of 4 inputs, got {K}")
    if mask is None:
        order = (values.reshape(N, -1, 4) != 0).int().argsort(dim=-1, descending=True, stable=True)
        if ((values.reshape(N, -1, 4) != 0).sum(-1) > 2).any():
            raise ValueError("values are not 2:4: a group of four has more than two non-zeros")
        mask = torch.zeros(N, K // 4, 4, dtype=torch.bool, device=values.device)
        mask = mask.scatter(-1, order[..., :2], True).reshape(N, K)
    check_mask(values, mask)
    groups = mask.reshape(N, -1, 4)
    if (groups.sum(-1) != 2).any():
        raise ValueError("mask is not 2:4: a group of four does not keep exactly two")
    places = groups.int().argsort(dim=-1, descending=True, stable=True)[..., :2]
    kept = values.reshape(N, -1, 4).gather(-1, places).reshape(N, K // 2)
    nibbles = (places[..., 0] | (places[..., 1] << 2)).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[-1] % 2))
    return SemiStructuredWeight(kept.contiguous(), nibbles[:, ::2] | (nibbles[:, 1::2] << 4))


def _places(weight_meta: Tensor, K: int) -> Tensor:
    nibbles = torch.stack((weight_meta & 15, weight_meta >> 4), -1).flatten(-2)[..., : K // 4]
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    if (places[..., 0] >= places[..., 1]).any():
        raise ValueError("2:4 metadata: positions of a group are not ascending")
    return places


def decode_mask(weight_meta: Tensor, K: int) -> Tensor:
    """Return the bool mask [N, K]."""
    places = _places(weight_meta, K)
    mask = torch.zeros(*places.shape[:2], 4, dtype=torch.bool, device=places.device)
    return mask.scatter(-1, places, True).flatten(-2)


def decode(weight: Tensor, weight_meta: Tensor, K: int) -> Tensor:
    """Return the values [N, K], zero where none is kept."""
    places = _places(weight_meta, K)
    values = weight.new_zeros(*places.shape[:2], 4)
    return values.scatter(-1, places, weight.reshape(places.shape)).flatten(-2)
