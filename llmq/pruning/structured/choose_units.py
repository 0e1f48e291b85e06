"""Which heads and channels stay: how many of each kind and size, and those of the largest score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmq.nn import QuantLinear, SparseLinear
from llmq.pruning.structured.heads_and_channels import PrunableBlock


def choose(blocks: list[PrunableBlock], rate: float, known: dict[str, Tensor]) -> None:
    """Set `keep` of each block: as many units in all blocks of a kind and size.

    Their scores are those `known`, by block name, else of their weights.
    """
    by_size: dict[tuple[str, int], list[PrunableBlock]] = {}
    for block in blocks:
        by_size.setdefault((block.kind, block.size), []).append(block)
    for (kind, size), same in by_size.items():
        step = 1 if kind == "heads" else _channel_step(size)
        step = math.lcm(step, *(b.size // b.units * _activation_step(b) for b in same))
        keep = max(step, math.floor(size * (1 - rate) / step + 0.5) * step)
        scores: dict[str, Tensor] = {}
        for block in same:
            shares = known[block.name] if block.name in known else score(block)
            scores[block.key] = scores.get(block.key, 0) + shares  # type: ignore[assignment]
        for block in same:
            count = min(block.units, keep // (block.size // block.units))
            block.keep = scores[block.key].topk(count).indices.sort().values.cpu()


def _channel_step(channels: int) -> int:
    """Channels stay in multiples of this, so that groups and kernels still fit them."""
    step = 64
    while channels % step or channels // step < 8:
        if step == 1:
            break
        step //= 2
    return step


def _activation_step(block: PrunableBlock) -> int:
    """Units that share an activation scale in the layer after."""
    if block.fused is not None:
        return 1
    layer = block.slices[-1].layer
    scheme = layer.scheme if isinstance(layer, (QuantLinear, SparseLinear)) else None
    group = None if scheme is None else scheme.activation_group_size
    unit = block.slices[-1].width
    return 1 if group is None else group // math.gcd(group, unit)


def score(block: PrunableBlock) -> Tensor:
    """Return each unit's largest share of the squared norm of one of its matrices, float64."""
    if block.fused is not None:
        # Experts kept as one parameter keep as many channels each, but each its own: scored apart.
        return torch.zeros(block.units, dtype=torch.float64)
    shares = []
    for part in block.slices:
        norms = part.scores(block.units).cpu()
        shares.append(norms / norms.sum().clamp_min(1e-30))
    # Not the sum over matrices: what is small on average may be all that drives one of them.
    # SmolLM2-135M, 10 % of its channels: perplexity 4909 by the sum, 755 by the largest.
    return torch.stack(shares).amax(0)
