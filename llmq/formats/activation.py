"""int8 activations: one symmetric scale a token or a group of its inputs, or a given one for all.

dynamic    scale = max|x| / 127, code = round(x · (127 / max|x|))
static     code = clamp(round(x · (1 / scale)), −127, 127)

Ties to even, each operation rounded to float32 once: what every kernel reproduces bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-30  # a largest input below this codes as zeros: 127 / amax would near overflow


def quantize_activation(
    x: Tensor, group_size: int = 0, activation_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Code inputs to int8.

    Args:
        x: [..., K] in float32, bfloat16 or float16.
        group_size: inputs that share a scale, which divides K; 0 is the whole token.
        activation_scale: float32 [1], the scale of all tokens, finite and above 1e-30; inputs
            beyond 127 times it saturate. None takes scales from the inputs.

    Returns:
        Codes int8 [..., K] in ±127 and scales float32 [..., G], G = K / group_size or 1. A group
        with an infinite or NaN input has codes 0 and scale NaN, so that what is computed from it
        is NaN and never silently wrong; so does every group if the given scale is none.

    Raises:
        TypeError: if x is no floating-point tensor.
        ValueError: if x has no dimension, the group size is negative or does not divide K, or a
            scale is given that is not float32 [1], or with groups.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {given}")
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a scalar")
    K = x.shape[-1]
    if group_size < 0 or (group_size and K % group_size):
        raise ValueError(f"activation group size {group_size} does not divide K={K}")
    if activation_scale is not None:
        return _on_scale(x, group_size, activation_scale)
    G = K // group_size if group_size else 1
    grouped = x.float().reshape(*x.shape[:-1], G, group_size or K)
    if grouped.shape[-1] == 0:
        amax = grouped.new_zeros(*grouped.shape[:-1], 1)
    else:
        amax = grouped.abs().amax(-1, keepdim=True)
    # A tensor: torch turns 127 / amax into 127 · (1 / amax), which rounds twice.
    limit = torch.full_like(amax, 127)
    inverse = torch.where(amax > SMALLEST, limit / amax, 0.0)
    finite = torch.isfinite(amax)
    codes = torch.where(finite, torch.round(grouped * inverse), 0.0).to(torch.int8)
    scale = torch.where(finite, amax / limit, torch.nan)
    return codes.reshape(x.shape), scale[..., 0]


def _on_scale(x: Tensor, group_size: int, given: Tensor) -> tuple[Tensor, Tensor]:
    if given.dtype != torch.float32 or tuple(given.shape) != (1,):
        raise ValueError(
            f"activation_scale must be float32 [1], got {given.dtype} {list(given.shape)}"
        )
    if group_size not in (0, x.shape[-1]):
        raise ValueError(f"one scale for all inputs has no groups, got group size {group_size}")
    values = x.float()
    valid = torch.isfinite(values).all(-1, keepdim=True) & (given > SMALLEST) & (given < torch.inf)
    codes = torch.round(values * (torch.ones_like(given) / given)).clamp(-127, 127)
    return torch.where(valid, codes, 0.0).to(torch.int8), torch.where(valid, given, torch.nan)
