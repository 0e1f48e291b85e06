"""Checks that every format makes of what it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SPARSE_VALUES = (torch.int8, torch.float32, torch.bfloat16, torch.float16)


def check_matrix(name: str, tensor: Any, columns: str = "K") -> None:
    """Raise unless `tensor` is a tensor of two dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be [N, {columns}], got shape {list(tensor.shape)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is floating point and finite in float32."""
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be floating point (float32, bfloat16, float16), got {tensor.dtype}"
        )
    # One pass over the weight: both ends are NaN if any value is.
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor)).float()).all():
        bad = int((~torch.isfinite(tensor.float())).sum())
        raise ValueError(
            f"{name} has {bad} NaN or infinite values of {tensor.numel()}; repair the checkpoint "
            f"or skip this layer"
        )


def check_float_matrix(weight: Any) -> None:
    """Raise unless `weight` is a finite floating-point matrix [N, K]."""
    check_matrix("weight", weight)
    check_finite("weight", weight)


def check_bits(bits: int) -> None:
    """Raise unless `bits` is one of the widths that are stored."""
    if bits not in (8, 4):
        raise ValueError(f"bits must be 8 or 4, got {bits!r}")


def check_codes(weight: Any, weight_scale: Any, bits: int, K: int) -> None:
    """Raise unless codes `weight` and `weight_scale` [N, G] store a weight [N, K]."""
    check_bits(bits)
    check_matrix("weight", weight)
    check_matrix("weight_scale", weight_scale, "G")
    N, G = weight_scale.shape
    stored = [N, K if bits == 8 else (K + 1) // 2]
    if weight.dtype != torch.int8:
        raise TypeError(f"weight must be int8 codes, got {weight.dtype}")
    if list(weight.shape) != stored:
        raise ValueError(
            f"{bits}-bit codes of [{N}, {K}] are stored as {stored}, got {list(weight.shape)}"
        )
    if G < 1 or K % G:
        raise ValueError(f"weight_scale {[N, G]}: {G} groups do not divide {K} inputs")


def group_shape(weight: Tensor, granularity: str, group_size: int | None) -> tuple[int, int]:
    """Return (groups of a row, inputs of a group) of weight [N, K].

    Raises:
        ValueError: if the granularity is unknown, or `group_size` does not divide K.
    """
    K = weight.shape[1]
    if granularity not in ("tensor", "channel", "group"):
        raise ValueError(f'granularity must be "tensor", "channel" or "group", got {granularity!r}')
    if granularity != "group":
        if group_size is not None:
            raise ValueError(f'group_size={group_size} needs granularity="group"')
        return 1, K
    if group_size is None or group_size < 1 or K % group_size or K == 0:
        raise ValueError(
            f"group_size={group_size} does not divide the {K} inputs of weight "
            f"{list(weight.shape)}; use a divisor of {K}"
        )
    return K // group_size, group_size


def check_sparse(values: Any, mask: Any) -> Tensor:
    """Return the mask of values [N, K]: the one given, else where they are not zero.

    Raises:
        TypeError: if the values are neither int8 nor floating point, or the mask is not bool.
        ValueError: if a value is not finite or the shapes differ.
    """
    check_matrix("values", values)
    if values.dtype not in _SPARSE_VALUES:
        raise TypeError(
            f"values must be int8 codes or float32, bfloat16, float16, got {values.dtype}"
        )
    if values.dtype != torch.int8:
        check_finite("values", values)
    if mask is None:
        return values != 0
    check_matrix("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True: kept), got {mask.dtype}")
    if mask.shape != values.shape:
        raise ValueError(f"mask must be {list(values.shape)} as values, got {list(mask.shape)}")
    return mask
