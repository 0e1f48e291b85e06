"""SparseGPT: prunes inputs one after the other, the rest of a row making up for what goes.

Frantar and Alistarh, "SparseGPT: Massive language models can be accurately pruned in one-shot",
arXiv:2301.00774; `obs.py` has the equations of the update. What goes is what costs least, by
w² / U_jj² (equation 5), chosen among 128 inputs of all rows at a time (four of one row in 2:4; of
blocks whose width does not divide 128, one block's), once the inputs before have changed them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.pruning import magnitude, obs
from llmq.scheme import Pattern

_INPUTS = 128  # that share one threshold: "mask block size" of the paper


def prune(
    weight: Tensor,
    moments: Tensor,
    pattern: Pattern,
    rate: float,
    *,
    kept: Tensor | None = None,
    round_to: obs.Round | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the changed weight float32 [N, K], zero where pruned, and which stay, bool [N, K].

    Args:
        weight: [N, K] in floating point, finite.
        moments: Σ xᵀx of its inputs, float32 [K, K].
        pattern: unstructured, 2:4 or block.
        rate: share of all weights that is gone afterwards; for 2:4 always 0.5.
        kept: bool [N, K], what earlier pruning left; the new mask lies within it.
        round_to: rounds what stays at the same time, and so makes up for both (section 3.5).
    """
    upper = obs.inverse_factor(moments)
    choose = _Chooser(weight, pattern, rate, kept)
    changed, mask = obs.solve(
        weight, upper, kept=kept, choose=choose, step=choose.step, round_to=round_to
    )
    assert mask is not None
    return changed, mask


class _Chooser:
    """Picks what stays among the next inputs, so that the count comes out exact at the end."""

    def __init__(self, weight: Tensor, pattern: Pattern, rate: float, kept: Tensor | None) -> None:
        N, K = weight.shape
        R, C = pattern.block if pattern.block else (1, 1)
        self.pattern, self.block = pattern, (R, C)
        together = C if _INPUTS % C else _INPUTS
        self.step = {"unstructured": _INPUTS, "2:4": 4, "block": together}[pattern.kind]
        self.kept = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
        # In weights, or in blocks of them: how many there are yet, and how many of those go.
        self.left = int(self.kept.reshape(N // R, R, K // C, C).any(3).any(1).sum())
        gone = weight.numel() // (R * C) - self.left
        self.to_go = magnitude.goal(weight, pattern, rate) // (R * C) - gone

    def __call__(self, values: Tensor, diagonal: Tensor, start: int) -> Tensor:
        N, width = values.shape
        kept = self.kept[:, start : start + width]
        score = (values / diagonal).square()
        if self.pattern.kind == "2:4":
            return magnitude.mask(score.sqrt(), self.pattern, 0.5, kept)
        R, C = self.block
        score = score.reshape(N // R, R, width // C, C).sum((1, 3))
        kept = kept.reshape(N // R, R, width // C, C).any(3).any(1)
        here = int(kept.sum())
        going = round(self.to_go * here / self.left) if self.left else 0
        self.left, self.to_go = self.left - here, self.to_go - going
        ranked = torch.where(kept, score, torch.inf).flatten().argsort(stable=True)
        stays = kept.flatten().clone()
        stays[ranked[:going]] = False
        return stays.reshape(kept.shape).repeat_interleave(R, 0).repeat_interleave(C, 1)
