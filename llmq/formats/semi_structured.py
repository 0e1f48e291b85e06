"""2:4 sparsity: of every 4 inputs 2 are kept, with 2-bit positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats._checks import check_matrix, check_sparse


class SemiStructuredWeight(NamedTuple):
    """Canonical storage of a 2:4 sparse weight [N, K]."""

    weight: Tensor  # [N, K/2], in column order
    weight_meta: Tensor  # uint8 [N, ceil(K/8)]: a nibble a group of 4: first | second << 2


def encode(values: Tensor, mask: Tensor | None = None) -> SemiStructuredWeight:
    """Keep two of every four values.

    Args:
        values: int8 codes or finite floating point [N, K], K a multiple of 4.
        mask: bool [N, K], exactly two of each four True; None keeps what is not zero, and zeros to
            make up two, the first ones of a group.

    Raises:
        TypeError: if values or mask are of the wrong type.
        ValueError: if K is no multiple of 4, or values or mask are not 2:4.
    """
    nonzero = mask is None
    mask = check_sparse(values, mask)
    N, K = values.shape
    if K % 4:
        raise ValueError(f"2:4 needs a multiple of 4 inputs, got {list(values.shape)}")
    groups = mask.reshape(N, K // 4, 4)
    kept = groups.sum(-1)
    wrong = kept > 2 if nonzero else kept != 2
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{'values' if nonzero else 'mask'} [{N}, {K}] must keep 2 of every 4 inputs; row "
            f"{row}, columns {4 * group}..{4 * group + 3} keep {int(kept[row, group])}"
        )
    places = groups.int().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    weight = values.reshape(N, K // 4, 4).gather(-1, places).reshape(N, K // 2)
    nibbles = (places[..., 0] | (places[..., 1] << 2)).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[-1] % 2))
    return SemiStructuredWeight(weight, nibbles[:, ::2] | (nibbles[:, 1::2] << 4))


def _places(weight_meta: Tensor, K: int) -> Tensor:
    """Return the kept positions, int64 [N, K/4, 2] in 0..3."""
    check_matrix("weight_meta", weight_meta, "ceil(K/8)")
    if weight_meta.dtype != torch.uint8:
        raise TypeError(f"weight_meta must be uint8, got {weight_meta.dtype}")
    if K % 4 or weight_meta.shape[1] != -(-K // 8):
        raise ValueError(
            f"weight_meta of {K} inputs must be [N, {-(-K // 8)}] and {K} a multiple of 4, got "
            f"{list(weight_meta.shape)}"
        )
    nibbles = torch.stack((weight_meta & 15, weight_meta >> 4), -1).flatten(-2)
    nibbles, spare = nibbles[..., : K // 4], nibbles[..., K // 4 :]
    if spare.any():
        raise ValueError(f"weight_meta has positions past the last of {K} inputs")
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    wrong = places[..., 0] >= places[..., 1]
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"weight_meta: positions {places[row, group].tolist()} of row {row}, columns "
            f"{4 * group}..{4 * group + 3} are not ascending"
        )
    return places


def decode_mask(weight_meta: Tensor, K: int) -> Tensor:
    """Return the bool mask [N, K].

    Raises:
        TypeError, ValueError: if `weight_meta` does not hold two ascending positions a group.
    """
    places = _places(weight_meta, K)
    mask = torch.zeros(*places.shape[:2], 4, dtype=torch.bool, device=places.device)
    return mask.scatter_(-1, places, True).flatten(-2)


def decode(weight: Tensor, weight_meta: Tensor, K: int) -> Tensor:
    """Return the values [N, K] in their dtype, zero where none is kept.

    Raises:
        TypeError, ValueError: if the two tensors do not belong together.
    """
    places = _places(weight_meta, K)
    N = places.shape[0]
    if tuple(weight.shape) != (N, K // 2):
        raise ValueError(f"weight must be [{N}, {K // 2}] as weight_meta, got {list(weight.shape)}")
    values = weight.new_zeros(N, K // 4, 4)
    return values.scatter_(-1, places, weight.reshape(places.shape)).flatten(-2)
