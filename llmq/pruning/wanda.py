"""Wanda: masks that keep the weights of largest magnitude times the norm of their input.

Sun et al., "A simple and effective pruning approach for large language models", arXiv:2306.11695,
equation 1: a weight's score is |W_ij| ‖X_j‖₂, compared within each output; nothing else changes.
"""

from __future__ import annotations

from torch import Tensor

from llmq.pruning import magnitude
from llmq.scheme import Pattern


def mask(
    weight: Tensor, squares: Tensor, pattern: Pattern, rate: float, kept: Tensor | None = None
) -> Tensor:
    """Return which weights stay when the share `rate` of them is pruned, bool [N, K].

    Args:
        weight: [N, K] in floating point.
        squares: ‖X_j‖² = Σ x² of each input, float32 [K].
        pattern: unstructured, 2:4, or block, whose score is the sum of the squares of its weights'.
        rate: in [0, 1); for 2:4 always 0.5.
        kept: bool [N, K], what earlier pruning left; the new mask lies within it.
    """
    return magnitude.mask(weight.float() * squares.sqrt(), pattern, rate, kept)
