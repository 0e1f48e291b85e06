"""Masks that keep the weights of largest magnitude, under each sparsity pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.scheme import Pattern


def mask(weight: Tensor, pattern: Pattern, rate: float, kept: Tensor | None = None) -> Tensor:
    """Return which weights stay when the share `rate` of them is pruned, bool [N, K].

    Args:
        weight: [N, K] in floating point.
        pattern: unstructured, 2:4 or block.
        rate: in [0, 1); for 2:4 always 0.5.
        kept: bool [N, K], what earlier pruning left; the new mask lies within it.
    """
    magnitude = weight.detach().float().abs()
    if kept is not None:
        magnitude = torch.where(kept, magnitude, -1.0)
    if pattern.kind == "2:4":
        return _semi_structured(magnitude)
    if pattern.kind == "block":
        assert pattern.block is not None
        return _block(magnitude, pattern.block, rate)
    return _unstructured(magnitude, rate)


def pruned(kept: Tensor) -> int:
    """Return how many weights a mask [N, K] drops."""
    return kept.numel() - int(kept.sum())


def goal(weight: Tensor, pattern: Pattern, rate: float) -> int:
    """Return how many weights of `weight` [N, K] are pruned at `rate`."""
    if pattern.kind != "block":
        return round(weight.numel() * rate)
    assert pattern.block is not None
    size = pattern.block[0] * pattern.block[1]
    return round(weight.numel() // size * rate) * size


def _unstructured(magnitude: Tensor, rate: float) -> Tensor:
    """Prune each row alike, as its scale is its own: loses less than one threshold a matrix."""
    N, K = magnitude.shape
    total = round(N * K * rate)
    if total == 0:
        return torch.ones_like(magnitude, dtype=torch.bool)
    each = total // N
    gone = (magnitude < 0).sum(1)
    while each and int(gone.clamp_min(each).sum()) > total:
        each -= 1  # some rows have lost more already: the others lose less
    quota = gone.clamp_min(each)
    extra = total - int(quota.sum())
    keep = torch.ones_like(magnitude, dtype=torch.bool)
    if bool(quota.any()):
        # Selection takes half the time of sorting. Among equals the first go, up to the count.
        threshold = (
            magnitude.kthvalue(each, dim=1, keepdim=True).values
            if each
            else torch.full_like(magnitude[:, :1], -torch.inf)
        ).where(gone[:, None] <= each, magnitude.new_full((), -0.5))
        below, equal = magnitude < threshold, magnitude == threshold
        open_places = quota[:, None] - below.sum(1, keepdim=True)
        keep = ~(below | (equal & (equal.cumsum(1) <= open_places)))
    if extra:
        # What does not divide goes to the rows that lose the least by one more.
        least, column = torch.where(keep, magnitude, torch.inf).min(1)
        rows = least.argsort(stable=True)[:extra]
        keep[rows, column[rows]] = False
    return keep


def _semi_structured(magnitude: Tensor) -> Tensor:
    N, K = magnitude.shape
    groups = magnitude.reshape(N, K // 4, 4)
    best = groups.argsort(dim=2, descending=True, stable=True)[..., :2]
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter_(2, best, True).reshape(N, K)


def _block(magnitude: Tensor, block: tuple[int, int], rate: float) -> Tensor:
    N, K = magnitude.shape
    R, C = block
    blocks = magnitude.reshape(N // R, R, K // C, C)
    # A block that is gone holds -1 everywhere: keep it below a block of zeros that is not.
    gone = (blocks < 0).all(dim=3).all(dim=1)
    norm = torch.where(gone, -1.0, blocks.square().sum(dim=(1, 3)))
    keep = torch.ones(norm.numel(), dtype=torch.bool, device=norm.device)
    keep[norm.flatten().argsort(stable=True)[: round(norm.numel() * rate)]] = False
    return keep.reshape(N // R, 1, K // C, 1).expand(N // R, R, K // C, C).reshape(N, K)
