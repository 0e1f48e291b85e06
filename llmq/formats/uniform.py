"""Uniform codes: w = (q - zero_point) · scale, 8 or 4 bits, by tensor, channel or group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats._checks import check_weight, group_shape

_RANGE = {8: (-128, 127), 4: (0, 15)}


class UniformWeight(NamedTuple):
    """Canonical storage of a uniformly coded weight [N, K]."""

    weight: Tensor  # int8 [N, K], or two nibbles a byte [N, ceil(K/2)]
    weight_scale: Tensor  # float32 [N, G]
    weight_zero_point: Tensor | None  # int8 [N, G]


def quantize(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | float | None = None, bits: int = 8
) -> Tensor:
    """Round x / scale + zero_point to the nearest code, ties to even, clamped to the range."""
    if bits not in _RANGE:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    low, high = _RANGE[bits]
    if bits == 4 and zero_point is None:
        zero_point = 8
    codes = torch.round(x / scale)
    if zero_point is not None:
        codes = codes + zero_point
    return codes.clamp(low, high).to(torch.int8)


def dequantize(
    codes: Tensor, scale: Tensor | float, zero_point: Tensor | float | None = None
) -> Tensor:
    """Return (codes - zero_point) · scale in float32."""
    values = codes.float()
    return (values if zero_point is None else values - zero_point) * scale


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes 0..15 [N, K] two a byte, even inputs in the low nibble: int8 [N, ceil(K/2)]."""
    codes = codes.to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., ::2] | (codes[..., 1::2] << 4)).view(torch.int8)


def unpack_int4(packed: Tensor, K: int) -> Tensor:
    """Return the codes 0..15, int8 [N, K], of bytes [N, ceil(K/2)]."""
    if packed.shape[-1] != (K + 1) // 2:
        raise ValueError(f"{K} nibbles a row need {(K + 1) // 2} bytes, got {packed.shape[-1]}")
    data = packed.view(torch.uint8)
    codes = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
    return codes[..., :K].to(torch.int8)


def encode(
    weight: Tensor,
    *,
    bits: int,
    granularity: str,
    group_size: int | None = None,
    symmetric: bool = True,
) -> UniformWeight:
    """Code weight [N, K], rounding to nearest."""
    check_weight(weight)
    if bits not in _RANGE:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    N, K = weight.shape
    G, group = group_shape(weight, granularity, group_size)
    grouped = weight.float().reshape(N, G, group)
    tiny = torch.finfo(torch.float32).tiny
    if K == 0 or N == 0:
        low = high = torch.zeros(N, G)
    elif granularity == "tensor":
        low, high = (v.reshape(1, 1).expand(N, 1) for v in torch.aminmax(grouped))
    else:
        low, high = torch.aminmax(grouped, dim=-1)
    levels = 2**bits - 1
    if symmetric:
        amax = torch.maximum(low.abs(), high.abs())
        scale = amax / (levels // 2)
        zero_point = None
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        amax = torch.maximum(low.abs(), high.abs())
        scale = high / levels - low / levels
        safe = scale.clamp(min=tiny)
        zero_point = (_RANGE[bits][0] + torch.round(-low / safe)).clamp(*_RANGE[bits])
        if bits == 8:
            zero_point = zero_point.clamp(-128, 127)
    scale = torch.where(amax == 0, 1.0, scale.clamp(min=tiny))
    codes = quantize(
        grouped, scale[..., None], None if zero_point is None else zero_point[..., None], bits
    ).reshape(N, K)
    if symmetric and bits == 8:
        codes = codes.clamp(min=-127)
    stored = codes if bits == 8 else pack_int4(codes)
    zero = None if zero_point is None else zero_point.to(torch.int8)
    return UniformWeight(stored.contiguous(), scale.contiguous(), zero)


def decode(
    weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, *, bits: int, K: int
) -> Tensor:
    """Return the float32 weight [N, K] that the codes stand for."""
    codes = weight if bits == 8 else unpack_int4(weight, K)
    N, G = weight_scale.shape
    grouped = codes.reshape(N, G, K // max(G, 1))
    zero_point: Tensor | float | None = None if bits == 8 else 8.0
    if weight_zero_point is not None:
        zero_point = weight_zero_point[..., None].float()
    return dequantize(grouped, weight_scale[..., None], zero_point).reshape(N, K)
