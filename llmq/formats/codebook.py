"""Codebooks: w = codebook[code] · scale, the levels placed where the weights are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats._checks import check_weight, group_shape
from llmq.formats.uniform import pack_int4, unpack_int4


class CodebookWeight(NamedTuple):
    """Canonical storage of a weight [N, K] coded by a codebook."""

    weight: Tensor  # int8 storage of unsigned codes [N, K], or two nibbles a byte
    weight_codebook: Tensor  # float32 [1 or N, 2^bits]
    weight_scale: Tensor  # float32 [N, G]


_BINS = 1 << 14


def _refine(levels: Tensor, centres: Tensor, counts: Tensor, sums: Tensor) -> tuple[Tensor, float]:
    """Lloyd's iteration on a histogram; returns sorted levels and their squared error."""
    squares = counts * centres**2
    for _ in range(60):
        edges = (levels[1:] + levels[:-1]) / 2
        owner = torch.bucketize(centres, edges)
        mass = torch.zeros_like(levels).index_add_(0, owner, counts)
        total = torch.zeros_like(levels).index_add_(0, owner, sums)
        levels = torch.where(mass > 0, total / mass.clamp(min=1e-300), levels).sort().values
    owner = torch.bucketize(centres, (levels[1:] + levels[:-1]) / 2)
    error = squares - 2 * sums * levels[owner] + counts * levels[owner] ** 2
    return levels, float(error.sum())


def encode(
    weight: Tensor, *, bits: int, granularity: str, group_size: int | None = None
) -> CodebookWeight:
    """Code weight [N, K] by a codebook fitted to it."""
    check_weight(weight)
    if bits not in (4, 8):
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    N, K = weight.shape
    G, group = group_shape(weight, granularity, group_size)
    grouped = weight.float().reshape(N, G, group)
    if grouped.numel() == 0:
        amax = torch.zeros(N, G)
    elif granularity == "tensor":
        amax = grouped.abs().max().reshape(1, 1).expand(N, 1)
    else:
        amax = grouped.abs().amax(-1)
    scale = torch.where(amax == 0, 1.0, amax).contiguous()
    unit = (grouped / scale[..., None]).clamp(-1, 1)
    bins = ((unit.double() + 1) * (_BINS / 2)).long().clamp(max=_BINS - 1).flatten()
    importance = (scale.double() ** 2)[..., None].expand_as(unit).flatten()
    counts = torch.bincount(bins, importance, minlength=_BINS)
    sums = torch.bincount(bins, importance * unit.double().flatten(), minlength=_BINS)
    used = counts > 0
    counts, sums = counts[used], sums[used]
    levels_count = 2**bits
    uniform_levels = torch.linspace(-1, 1, levels_count - 1, dtype=torch.float64)
    uniform_levels = torch.cat((uniform_levels, uniform_levels[-1:]))
    if counts.numel():
        centres = sums / counts
        cumulative = counts.cumsum(0) / counts.sum()
        wanted = (torch.arange(levels_count, dtype=torch.float64) + 0.5) / levels_count
        quantiles = centres[torch.searchsorted(cumulative, wanted).clamp(max=len(centres) - 1)]
        fits = [_refine(start, centres, counts, sums) for start in (quantiles, uniform_levels)]
        levels = min(fits, key=lambda fit: fit[1])[0]
    else:
        levels = uniform_levels
    table = levels.float()
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2).reshape(N, K)
    stored = codes.to(torch.uint8).view(torch.int8) if bits == 8 else pack_int4(codes)
    return CodebookWeight(stored.contiguous(), table[None].contiguous(), scale)


def decode(
    weight: Tensor, weight_codebook: Tensor, weight_scale: Tensor, *, bits: int, K: int
) -> Tensor:
    """Return the float32 weight [N, K] that the codes stand for."""
    codes = weight.view(torch.uint8).long() if bits == 8 else unpack_int4(weight, K).long()
    N, G = weight_scale.shape
    table = weight_codebook.expand(N, -1)
    values = table.gather(1, codes.reshape(N, K))
    return (values.reshape(N, G, K // max(G, 1)) * weight_scale[..., None]).reshape(N, K)
