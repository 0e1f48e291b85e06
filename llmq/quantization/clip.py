"""Grids of a weight's codes: over its whole range, or a range clipped where that loses less.

A narrower range has finer steps, and moves what lies outside to its ends. For each group the range
with the smallest error Σ h (w - ŵ)² is taken, h being the second moment of each input, so that the
sum is the squared error of the outputs if inputs are independent (the criterion of OBQ's diagonal
term: Frantar and Alistarh, arXiv:2208.11580, equation 3; clipping by search as in AWQ, Lin et al.,
arXiv:2306.00978, and OmniQuant's learned form of it, arXiv:2308.13137).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.formats import uniform
from llmq.scheme import Scheme

_PARTS = tuple(1 - step / 16 for step in range(9))  # of the range that are tried, down to a half
_ROWS = 1 << 22  # weights tried at once: temporaries stay below 100 MB


def grid(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point, float32 [N, G], of codes over the whole range of each group."""
    low, high = _range(weight, scheme)
    return uniform.grid(low, high, bits=scheme.bits, symmetric=scheme.symmetric)


def clipped_grid(
    weight: Tensor, scheme: Scheme, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point, float32 [N, G], of the range that loses least in each group.

    Args:
        weight: [N, K] in floating point, finite.
        scheme: uniform, its group size dividing K.
        importance: h, not negative, float32 [K]; None is 1.
    """
    if scheme.granularity == "tensor" or weight.numel() == 0:
        return grid(weight, scheme)
    step = max(1, _ROWS // weight.shape[1])
    parts = [_search(rows, scheme, importance) for rows in weight.float().split(step)]
    zero_points = [zero_point for _, zero_point in parts if zero_point is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zero_points) if zero_points else None


def _range(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    weight = weight.float()
    if weight.numel() == 0:
        zeros = weight.new_zeros(N, 1 if scheme.group_size is None else K // scheme.group_size)
        return zeros, zeros
    if scheme.granularity == "tensor":
        low, high = torch.aminmax(weight)
        return low.expand(N, 1), high.expand(N, 1)
    group = scheme.group_size or K
    ends = torch.aminmax(weight.reshape(N, K // group, group), dim=-1)
    return ends.min, ends.max


def _search(
    weight: Tensor, scheme: Scheme, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    low, high = _range(weight, scheme)
    N, G = low.shape
    best = weight.new_full((N, G), torch.inf)
    kept: tuple[Tensor, Tensor | None] | None = None
    for part in _PARTS:
        scale, zero_point = uniform.grid(
            low * part, high * part, bits=scheme.bits, symmetric=scheme.symmetric
        )
        coded = uniform.on_grid(weight, scale, zero_point, bits=scheme.bits)
        error = uniform.decode(*coded, bits=scheme.bits, K=weight.shape[1]).sub_(weight).square_()
        if importance is not None:
            error *= importance
        loss = error.reshape(N, G, -1).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        if kept is None:
            kept = scale, zero_point
            continue
        scale = torch.where(better, scale, kept[0])
        if zero_point is not None and kept[1] is not None:
            zero_point = torch.where(better, zero_point, kept[1])
        kept = scale, zero_point
    assert kept is not None
    return kept
