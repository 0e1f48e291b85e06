"""Codebooks: w = codebook[code] · scale, the levels placed where the weights are.

Each group's scale is its value of largest magnitude, sign included, so that the value itself
becomes exactly 1 and all other levels serve the rest: at 4 bits and groups of 32 this lowers the
error by 3 % against scaling by max|w|, where both 1 and -1 need a level.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats._checks import check_bits, check_codes, check_weight, group_shape
from llmq.formats.uniform import pack_int4, unpack_int4

_BINS = 1 << 16  # of the histogram that the levels are fitted to: 256 a level at 8 bits
_KNOTS = 4096  # of the weights' distribution that the first levels are read from
_ITERATIONS = 200
_ROWS = 1 << 22  # weights handled at once, so that temporaries stay small


class CodebookWeight(NamedTuple):
    """Canonical storage of a weight [N, K] coded by a codebook."""

    weight: Tensor  # int8 storage of unsigned codes [N, K], or two nibbles a byte [N, ceil(K/2)]
    weight_codebook: Tensor  # float32 [1 or N, 2^bits], each row ascending
    weight_scale: Tensor  # float32 [N, G]


class _Histogram(NamedTuple):
    """Weighted values in ascending order: `centres`, and running sums of weight and of value."""

    centres: Tensor
    mass: Tensor  # [bins + 1]
    total: Tensor  # [bins + 1]

    def cells(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mass and total of the values nearest to each level."""
        inner = torch.searchsorted(self.centres, (levels[1:] + levels[:-1]) / 2)
        ends = inner.new_tensor([0, len(self.centres)])
        at = torch.cat((ends[:1], inner, ends[1:]))
        return self.mass[at].diff(), self.total[at].diff()

    def gain(self, levels: Tensor) -> float:
        """Return how much squared error the levels leave, less a constant of the histogram."""
        mass, total = self.cells(levels)
        return float((mass * levels**2 - 2 * total * levels).sum())


def _histogram(unit: Tensor, scale: Tensor) -> _Histogram:
    """Count unit [N, G, group], each value by the square of its scale: its share of the error."""
    N, G, group = unit.shape
    count = torch.zeros(_BINS, dtype=torch.float64, device=unit.device)
    total = count.clone()
    for rows in torch.arange(N).split(max(1, _ROWS // (G * group))):
        part = unit[rows[0] : rows[-1] + 1].double().flatten()
        share = scale[rows[0] : rows[-1] + 1].double().square().repeat_interleave(group)
        bins = ((part + 1) * (_BINS / 2)).long().clamp_(0, _BINS - 1)
        count += torch.bincount(bins, share, minlength=_BINS)
        total += torch.bincount(bins, share * part, minlength=_BINS)
    used = count > 0
    count, total = count[used], total[used]
    zero = count.new_zeros(1)
    return _Histogram(
        total / count, torch.cat((zero, count.cumsum(0))), torch.cat((zero, total.cumsum(0)))
    )


def _first_levels(histogram: _Histogram, count: int) -> Tensor:
    """Place levels as densely as the cube root of the distribution, which is best for many levels.

    Panter and Dite, "Quantization distortion in pulse-count modulation with nonuniform spacing of
    levels", 1951. Between quantiles of equal mass the density is 1 / gap, so that a gap takes a
    share of gap^(2/3).
    """
    mass = histogram.mass[1:]
    wanted = (torch.arange(_KNOTS, dtype=mass.dtype, device=mass.device) + 0.5) / _KNOTS * mass[-1]
    knots = histogram.centres[torch.searchsorted(mass, wanted).clamp_(max=len(mass) - 1)]
    share = knots.diff().pow(2 / 3)
    reached = torch.cat((share.new_zeros(1), share.cumsum(0)))
    aims = (torch.arange(count, dtype=mass.dtype, device=mass.device) + 0.5) / count * reached[-1]
    after = torch.searchsorted(reached, aims).clamp_(1, _KNOTS - 1)
    part = (aims - reached[after - 1]) / share[after - 1].clamp(min=1e-300)
    return knots[after - 1] + part.clamp(0, 1) * (knots[after] - knots[after - 1])


def _lloyd(histogram: _Histogram, levels: Tensor) -> Tensor:
    """Move each level to the mean of the values nearest to it, until none moves.

    Lloyd, "Least squares quantization in PCM", 1982; each step lowers the squared error.
    """
    for _ in range(_ITERATIONS):
        mass, total = histogram.cells(levels)
        moved = torch.where(mass > 0, total / mass, levels)
        if torch.allclose(moved, levels, rtol=0, atol=1e-9):
            break
        levels = moved.sort().values
    return levels


def _fit(unit: Tensor, scale: Tensor, count: int) -> Tensor:
    """Return `count` ascending levels, float32, for unit [N, G, group] in [-1, 1]."""
    uniform = torch.linspace(-1, 1, count - 1, dtype=torch.float64, device=unit.device)
    uniform = torch.cat((uniform, uniform[-1:]))
    if unit.numel() == 0:
        return uniform.float()
    histogram = _histogram(unit, scale)
    if len(histogram.centres) <= count:  # as many levels as values: nothing is lost
        spare = histogram.centres[-1:].expand(count - len(histogram.centres))
        return torch.cat((histogram.centres, spare)).float()
    starts = (_first_levels(histogram, count), uniform)
    return min((_lloyd(histogram, start) for start in starts), key=histogram.gain).float()


def encode(
    weight: Tensor,
    *,
    bits: int,
    granularity: str,
    group_size: int | None = None,
    weight_codebook: Tensor | None = None,
) -> CodebookWeight:
    """Code a weight by one codebook for the whole tensor, fitted to it in squared error.

    Args:
        weight: [N, K] in floating point, finite.
        bits: 8 (256 levels) or 4 (16).
        granularity: what shares one scale: "tensor", "channel" (a row) or "group".
        group_size: inputs of a group, which divides K; with granularity "group" only.
        weight_codebook: float32 [1, 2^bits], ascending: levels to use instead of fitting some.

    Returns:
        Canonical storage. A scale is its group's value of largest magnitude, so may be negative;
        that of an all-zero group is 1.

    Raises:
        TypeError: if weight is no floating-point tensor.
        ValueError: if weight is no finite matrix, or an argument is out of range.
    """
    check_weight(weight)
    check_bits(bits)
    N, K = weight.shape
    G, group = group_shape(weight, granularity, group_size)
    grouped = weight.float().reshape(N, G, group)
    scale = _scale(grouped, granularity)
    unit = grouped / scale[..., None]
    if weight_codebook is None:
        weight_codebook = _fit(unit, scale, 2**bits)[None]
    elif list(weight_codebook.shape) != [1, 2**bits]:
        raise ValueError(
            f"weight_codebook must be [1, {2**bits}], got {list(weight_codebook.shape)}"
        )
    levels = weight_codebook[0]
    codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    codes = codes.to(torch.uint8).reshape(N, K)
    return CodebookWeight(
        codes.view(torch.int8) if bits == 8 else pack_int4(codes), weight_codebook, scale
    )


def _scale(grouped: Tensor, granularity: str) -> Tensor:
    """Return the value of largest magnitude of each group [N, G], or of the whole tensor [N, 1]."""
    if grouped.numel() == 0:
        return grouped.new_ones(grouped.shape[:2])
    low, high = torch.aminmax(grouped) if granularity == "tensor" else grouped.aminmax(dim=-1)
    scale = torch.where(-low > high, low, high).expand(grouped.shape[:2])
    # Below the smallest normal number a quotient may exceed 1; such a group decodes to about zero.
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(scale.abs() < tiny, torch.copysign(scale.new_tensor(tiny), scale), scale)
    return torch.where((low == 0) & (high == 0), 1.0, scale).contiguous()


def decode(
    weight: Tensor, weight_codebook: Tensor, weight_scale: Tensor, *, bits: int, K: int
) -> Tensor:
    """Return the weight that the codes stand for.

    Args:
        weight: int8 storage of unsigned codes [N, K], or nibbles [N, ceil(K/2)].
        weight_codebook: float32 [1 or N, 2^bits].
        weight_scale: float32 [N, G].
        bits: 8 or 4.
        K: inputs of a row, which the nibbles alone do not tell.

    Returns:
        float32 [N, K].

    Raises:
        TypeError, ValueError: if the tensors do not store a weight [N, K].
    """
    check_codes(weight, weight_scale, bits, K)
    N, G = weight_scale.shape
    if tuple(weight_codebook.shape) not in ((1, 2**bits), (N, 2**bits)):
        raise ValueError(
            f"weight_codebook must be [1 or {N}, {2**bits}], got {list(weight_codebook.shape)}"
        )
    codes = weight.contiguous().view(torch.uint8) if bits == 8 else unpack_int4(weight, K)
    if weight_codebook.shape[0] == 1:
        values = weight_codebook[0][codes.int()]
    else:
        values = weight_codebook.gather(1, codes.long())
    return (values.reshape(N, G, K // G) * weight_scale[..., None]).reshape(N, K)
