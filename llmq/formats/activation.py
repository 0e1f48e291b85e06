"""Dynamic int8 activations: one symmetric scale a token, or a group of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_activation(x: Tensor, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """Code x [..., K] to int8 with scale max|x| / 127 a token (0) or a group of inputs."""
    K = x.shape[-1]
    if group_size and K % group_size:
        raise ValueError(f"activation group size {group_size} does not divide K={K}")
    grouped = (
        x.float().unflatten(-1, (K // group_size if group_size else 1, -1))
        if K
        else x.float()[..., None, :]
    )
    amax = grouped.abs().amax(-1, keepdim=True) if K else grouped.new_zeros(*x.shape[:-1], 1, 1)
    # A tensor: torch turns 127 / amax into 127 · (1 / amax), which rounds twice.
    limit = torch.full_like(amax, 127)
    inverse = torch.where(amax > 1e-30, limit / amax, 0.0)
    finite = torch.isfinite(amax)
    codes = torch.where(finite, torch.round(grouped * inverse), 0.0).to(torch.int8)
    scale = torch.where(finite, amax / limit, torch.nan)
    return codes.reshape(x.shape), scale[..., 0]
