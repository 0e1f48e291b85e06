"""Codebooks: w = codebook[code] · scale, the levels placed where the weights are.

A group is first scaled by its value of largest magnitude, sign included, so that this value becomes
1 and all other levels serve the rest: at 4 bits in groups of 32 this leaves 3 % less error than
max|w|, which needs a level at 1 and one at -1. Then each scale becomes the one of least squares for
the codes it got, and the levels follow once more: 3 % less again (MiniLM's weights).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats._checks import check_bits, check_codes, check_float_matrix, group_shape
from llmq.formats.uniform import pack_int4, unpack_int4

_BINS = 1 << 16  # of the histogram that the levels are fitted to: 256 a level at 8 bits
_KNOTS = 4096  # of the weights' distribution that the first levels are read from
_ITERATIONS = 200
_GRID = 1 << 14  # steps of 256 levels from 0 to 1: levels of 16 bits, two bytes to a kernel
_TINY = torch.finfo(torch.float32).tiny
_CHUNK = 1 << 21  # weights counted at once: temporaries stay small, and float32 sums exact enough


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

    def cells(self, levels: Tensor) -> Tensor:
        """Return where the values nearest to each level begin, and the end of the last."""
        inner = torch.searchsorted(self.centres, _edges(levels))
        ends = inner.new_tensor([0, len(self.centres)])
        return torch.cat((ends[:1], inner, ends[1:]))

    def means(self, levels: Tensor) -> Tensor:
        """Return the mean of the values nearest to each level; the level itself where none is."""
        at = self.cells(levels)
        mass, total = self.mass[at].diff(), self.total[at].diff()
        # Where groups differ by many orders of magnitude, differences of running sums lose their
        # digits: such a mean, of next to no weight, may leave its values.
        last = len(self.centres) - 1
        lowest = self.centres[at[:-1].clamp(max=last)]
        highest = self.centres[(at[1:] - 1).clamp(min=0)]
        means = (total / mass).clamp(lowest, highest)
        return torch.where((at.diff() > 0) & (mass > 0), means, levels)

    def gain(self, levels: Tensor) -> float:
        """Return how much squared error the levels leave, less a constant of the histogram."""
        at = self.cells(levels)
        mass, total = self.mass[at].diff(), self.total[at].diff()
        return float((mass * levels**2 - 2 * total * levels).sum())


def _histogram(unit: Tensor, scale: Tensor, importance: Tensor | None) -> _Histogram:
    """Count unit [N, G, group], each value by its share of the error.

    That is the square of its scale, times the `importance` [K] of its input where that is given.
    """
    N, G, group = unit.shape
    share = (scale / scale.abs().max()).square()
    mass = torch.zeros(_BINS, dtype=torch.float64, device=unit.device)
    total = mass.clone()
    step = max(1, _CHUNK // (G * group))
    for start in range(0, N, step):
        part = unit[start : start + step].flatten()
        rows = share[start : start + step]
        if importance is None:
            counts = rows.flatten().repeat_interleave(group)
        else:
            counts = (rows[..., None] * importance.reshape(-1, group)).flatten()
        bins = ((part + 1) * (_BINS / 2)).int().clamp_(0, _BINS - 1)
        mass += torch.bincount(bins, counts, minlength=_BINS)
        total += torch.bincount(bins, counts.mul_(part), minlength=_BINS)
    used = mass > 0
    mass, total = mass[used], total[used]
    zero = mass.new_zeros(1)
    return _Histogram(
        total / mass, torch.cat((zero, mass.cumsum(0))), torch.cat((zero, total.cumsum(0)))
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
        moved = histogram.means(levels)
        if torch.allclose(moved, levels, rtol=0, atol=1e-9):
            break
        levels = moved.sort().values
    return levels


def _fit(unit: Tensor, scale: Tensor, count: int, importance: Tensor | None) -> Tensor:
    """Return `count` ascending levels, float32, for unit [N, G, group] in [-1, 1]."""
    uniform = torch.linspace(-1, 1, count - 1, dtype=torch.float64, device=unit.device)
    uniform = torch.cat((uniform, uniform[-1:]))
    if not scale.any():
        return uniform.float()
    histogram = _histogram(unit, scale, importance)
    if len(histogram.centres) <= count:  # as many levels as values: nothing is lost
        spare = histogram.centres[-1:].expand(count - len(histogram.centres))
        return torch.cat((histogram.centres, spare)).float()
    starts = (_first_levels(histogram, count), uniform)
    levels = min((_lloyd(histogram, start) for start in starts), key=histogram.gain).float()
    return (levels * _GRID).round() / _GRID if count == 256 else levels


def encode(
    weight: Tensor,
    *,
    bits: int,
    granularity: str,
    group_size: int | None = None,
    weight_codebook: Tensor | None = None,
    importance: Tensor | None = None,
) -> CodebookWeight:
    """Code a weight by one codebook for the whole tensor, fitted to it in squared error.

    Args:
        weight: [N, K] in floating point, finite.
        bits: 8 (256 levels) or 4 (16).
        granularity: what shares one scale: "tensor", "channel" (a row) or "group".
        group_size: inputs of a group, which divides K; with granularity "group" only.
        weight_codebook: float32 [1 or N, 2^bits], ascending: levels to keep instead of fitting.
        importance: float32 [K], not negative: what an error counts at each input, in the fit of
            levels and scales; None is 1. The mean of x² of each input makes it the error of the
            layer's output, if inputs are independent.

    Returns:
        Canonical storage. Levels lie in [-1, 1]; a scale may be negative, and is 0 where a group is
        all zeros.

    Raises:
        TypeError: if weight is no floating-point tensor.
        ValueError: if weight is no finite matrix, or an argument is out of range.
    """
    check_float_matrix(weight)
    check_bits(bits)
    N = weight.shape[0]
    G, group = group_shape(weight, granularity, group_size)
    grouped = weight.float().contiguous().reshape(N, G, group)
    importance = _checked_importance(importance, weight.shape[1])
    scale = _largest(grouped, granularity)
    if weight_codebook is None:
        levels = _fit(_unit(grouped, scale), scale, 2**bits, importance)[None]
    else:
        levels = weight_codebook
        _check_codebook(levels, N, bits)
        if (levels.diff() < 0).any() or not (levels[:, -1] > 0).all():
            raise ValueError("weight_codebook must ascend to a positive level in every row")
        scale = scale / levels[:, -1:]
    # With 256 levels or one scale for all there is nothing to gain.
    if bits == 4 and granularity != "tensor" and scale.any():
        scale = _least_squares(grouped, scale, levels, importance)
        if weight_codebook is None:
            unit = _unit(grouped, scale)
            reach = torch.stack(torch.aminmax(unit)).abs().max()
            scale *= reach
            histogram = _histogram(unit / reach, scale, importance)
            levels = _lloyd(histogram, levels[0].double() / reach)[None].float()
    return on_levels(weight, levels, scale, bits=bits)


def on_levels(
    weight: Tensor, weight_codebook: Tensor, weight_scale: Tensor, *, bits: int
) -> CodebookWeight:
    """Code a weight [N, K] to the nearest of levels [1 or N, 2^bits] times scales [N, G]."""
    N, K = weight.shape
    G = weight_scale.shape[1]
    grouped = weight.float().contiguous().reshape(N, G, K // G if G else 0)
    codes = _nearest(_unit(grouped, weight_scale), weight_codebook).to(torch.uint8)
    stored = codes.view(torch.int8) if bits == 8 else pack_int4(codes)
    return CodebookWeight(stored, weight_codebook, weight_scale)


def _checked_importance(importance: Tensor | None, K: int) -> Tensor | None:
    if importance is None:
        return None
    if tuple(importance.shape) != (K,) or not bool(
        ((importance >= 0) & importance.isfinite()).all()
    ):
        raise ValueError(
            f"importance must be {K} finite numbers that are not negative, got a tensor "
            f"{list(importance.shape)}"
        )
    # An input that never came counts a little, or its weights would have no levels at all.
    importance = importance.float()
    mean = importance.mean()
    return importance / mean + 1e-6 if mean > 0 else None


def _largest(grouped: Tensor, granularity: str) -> Tensor:
    """Return the value of largest magnitude of each group [N, G], or of the whole tensor [N, 1]."""
    if grouped.numel() == 0:
        return grouped.new_zeros(grouped.shape[:2])
    low, high = torch.aminmax(grouped) if granularity == "tensor" else grouped.aminmax(dim=-1)
    largest = torch.where(-low > high, low, high)
    # Quotients of subnormal numbers are coarse; such a group decodes to about zero instead.
    kept = torch.copysign(largest.abs().clamp(min=_TINY), largest)
    return torch.where(largest == 0, 0.0, kept).expand(grouped.shape[:2]).contiguous()


def _unit(grouped: Tensor, scale: Tensor) -> Tensor:
    return grouped / torch.where(scale == 0, 1.0, scale)[..., None]


def _least_squares(
    grouped: Tensor, scale: Tensor, levels: Tensor, importance: Tensor | None
) -> Tensor:
    """Return the scales [N, G] that fit groups best with the codes that they get from `scale`."""
    codes = _nearest(_unit(grouped, scale), levels)
    values = _look_up(codes, levels).reshape(grouped.shape)
    counted = values
    if importance is not None:
        counted = values * importance.reshape(-1, grouped.shape[2])
    fitted = (grouped * counted).sum(-1) / (values * counted).sum(-1).clamp(min=_TINY)
    # A group of zeros keeps its scale, as does one whose products underflow.
    return torch.where(fitted * scale > 0, fitted, scale)


def _edges(levels: Tensor) -> Tensor:
    return (levels[..., 1:] + levels[..., :-1]) / 2


def _nearest(unit: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the level nearest to each of unit [N, G, group], int32 [N, K]."""
    flat = unit.flatten(1)
    if levels.shape[0] == 1:
        return torch.bucketize(flat, _edges(levels[0]), out_int32=True)
    return torch.searchsorted(_edges(levels), flat, out_int32=True)


def _look_up(codes: Tensor, levels: Tensor) -> Tensor:
    """Return the levels float32 [N, K] of unsigned codes [N, K]."""
    if levels.shape[0] == 1:
        return levels[0].index_select(0, codes.flatten().int()).reshape(codes.shape)
    return levels.gather(1, codes.long())


def _check_codebook(levels: Tensor, N: int, bits: int) -> None:
    if levels.dtype != torch.float32 or tuple(levels.shape) not in ((1, 2**bits), (N, 2**bits)):
        raise ValueError(
            f"weight_codebook must be float32 [1 or {N}, {2**bits}], got {levels.dtype} "
            f"{list(levels.shape)}"
        )


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
    _check_codebook(weight_codebook, N, bits)
    codes = weight.contiguous().view(torch.uint8) if bits == 8 else unpack_int4(weight, K)
    values = _look_up(codes, weight_codebook).reshape(N, G, K // G)
    return (values * weight_scale[..., None]).reshape(N, K)
