"""Checks that every format makes of what it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def check_weight(weight: Tensor) -> None:
    """Raise unless `weight` is a finite floating-point matrix [N, K]."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"weight has {int((~torch.isfinite(weight)).sum())} NaN or infinite values; "
            f"repair the checkpoint or skip the layer"
        )


def group_shape(weight: Tensor, granularity: str, group_size: int | None) -> tuple[int, int]:
    """Return (groups of a row, inputs of a group) of weight [N, K]."""
    K = weight.shape[1]
    if granularity not in ("tensor", "channel", "group"):
        raise ValueError(f'granularity must be "tensor", "channel" or "group", got {granularity!r}')
    if granularity != "group":
        return 1, K
    if group_size is None or group_size < 1 or K % group_size:
        raise ValueError(f"group_size={group_size} does not divide the weight's {K} inputs")
    return K // group_size, group_size


def check_mask(values: Tensor, mask: Tensor) -> None:
    """Raise unless `mask` is bool of the shape [N, K] of `values`."""
    if values.dim() != 2:
        raise ValueError(f"values must be [N, K], got {list(values.shape)}")
    if mask.dtype != torch.bool or mask.shape != values.shape:
        raise ValueError(
            f"mask must be bool {list(values.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
