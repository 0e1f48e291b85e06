"""Symmetric int8 codes of activations, one scale a token or group of inputs; also after RMSNorm.

    scale = max|x| / 127        codes = round(x · (127 / max|x|)), ties to even
    a given scale for all       codes = clamp(round(x · (1 / scale)), −127, 127)

Each operation is rounded to float32 once, as `llmq/formats/activation.py` does it, so codes and
scales are the same bits. A program holds ROWS rows of up to BLOCK inputs in registers and reads
them once; longer rows take a second pass, but not where the scale is given. RMSNorm, with or
without a residual added before it, happens on the same registers:

    h = x + residual            n = h / sqrt(mean(h²) + eps) · weight

each of h, the quotient and n rounded to x's dtype, as transformers' LlamaRMSNorm does.

Bound: memory, 3 bytes an input of 16 bits (7 with residual and the sum written back). Not yet
measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.configs import RowsConfig, rows_config


@triton.jit
def _largest(x):
    """max|x| along the last axis, infinite where an input is infinite or NaN."""
    size = tl.abs(x)
    return tl.max(tl.where(size < float("inf"), size, float("inf")), axis=-1)


@triton.jit
def _codes(x, amax):
    # 127 / amax of smaller values would near overflow; all their codes are 0.
    limit = tl.full(amax.shape, 127.0, tl.float32)
    inverse = tl.where(amax > 1e-30, tl.div_rn(limit, tl.maximum(amax, 1e-30)), 0.0)
    inverse = tl.where(amax < float("inf"), inverse, 0.0)
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)  # infinity times 0 is NaN
    # Adding 1.5 · 2²³ leaves no fraction bits: the sum rounds to an integer, ties to even.
    return (x * tl.expand_dims(inverse, -1) + 12582912.0 - 12582912.0).to(tl.int8)


@triton.jit
def _given(given_ptr, ROWS: tl.constexpr):
    """The given scale for each row, NaN if it is none, and its inverse, then 0: all codes are 0."""
    given = tl.load(given_ptr + tl.zeros((ROWS,), tl.int32))
    given = tl.where(given > 1e-30, given, float("inf"))
    inverse = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), given)
    return tl.where(given < float("inf"), given, float("nan")), inverse


@triton.jit
def _clamped(x, inverse):
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    steps = tl.minimum(tl.maximum(x * tl.expand_dims(inverse, -1), -127.0), 127.0)
    return (steps + 12582912.0 - 12582912.0).to(tl.int8)


@triton.jit
def _scale(amax):
    finite = amax < float("inf")
    scale = tl.div_rn(tl.where(finite, amax, 0.0), tl.full(amax.shape, 127.0, tl.float32))
    return tl.where(finite, scale, float("nan"))


@triton.jit
def _quantize_rows(
    x_ptr,  # [M, K], rows x_stride apart
    codes_ptr,  # int8 [M, K]
    scale_ptr,  # float32 [M, G]
    given_ptr,  # float32 [1], the scale of all rows, or None
    rows,  # M · G
    size,  # K / G
    x_stride,
    G,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, BLOCK)
    x_row = x_ptr + row // G * x_stride + row % G * size
    codes_row = codes_ptr + row * size
    if ONE_PASS:
        mask = inside[:, None] & (column < size)[None, :]
        x = tl.load(x_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        amax = _largest(x)
        if given_ptr is not None:
            given, inverse = _given(given_ptr, ROWS)
            codes = _clamped(x, tl.where(amax < float("inf"), inverse, 0.0))
        else:
            codes = _codes(x, amax)
        tl.store(codes_row[:, None] + column[None, :], codes, mask=mask)
    elif given_ptr is not None:
        given, inverse = _given(given_ptr, ROWS)
        amax = tl.zeros((ROWS,), tl.float32)
        for start in range(0, size, BLOCK):
            mask = inside[:, None] & (start + column < size)[None, :]
            x = tl.load(x_row[:, None] + start + column[None, :], mask=mask, other=0.0)
            x = x.to(tl.float32)
            amax = tl.maximum(amax, _largest(x))
            codes = _clamped(x, inverse)
            tl.store(codes_row[:, None] + start + column[None, :], codes, mask=mask)
        if tl.max(amax) == float("inf"):
            tl.debug_barrier()  # other threads may have stored the codes that these zeros replace
            bad = inside & (amax == float("inf"))
            zeros = tl.zeros((ROWS, BLOCK), tl.int8)
            for start in range(0, size, BLOCK):
                mask = bad[:, None] & (start + column < size)[None, :]
                tl.store(codes_row[:, None] + start + column[None, :], zeros, mask=mask)
    else:
        amax = tl.zeros((ROWS,), tl.float32)
        for start in range(0, size, BLOCK):
            mask = inside[:, None] & (start + column < size)[None, :]
            x = tl.load(x_row[:, None] + start + column[None, :], mask=mask, other=0.0)
            amax = tl.maximum(amax, _largest(x.to(tl.float32)))
        for start in range(0, size, BLOCK):
            mask = inside[:, None] & (start + column < size)[None, :]
            x = tl.load(x_row[:, None] + start + column[None, :], mask=mask, other=0.0)
            codes = _codes(x.to(tl.float32), amax)
            tl.store(codes_row[:, None] + start + column[None, :], codes, mask=mask)
    if given_ptr is not None:
        scale = tl.where(amax < float("inf"), given, float("nan"))
    else:
        scale = _scale(amax)
    tl.store(scale_ptr + row, scale, mask=inside)


@triton.jit
def _rms_norm_quantize(
    x_ptr,  # [M, K], rows x_stride apart
    residual_ptr,  # [M, K] like x
    weight_ptr,  # [K]
    sum_ptr,  # [M, K]: x + residual
    codes_ptr,  # int8 [M, K]
    scale_ptr,  # float32 [M, K / GROUP]
    K,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,  # power of two, BLOCK where a token is one group
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < K
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)
    h = x.to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0)
        h = (h + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * K + column, h, mask=mask)
        h = h.to(tl.float32)
    root = tl.sqrt_rn(tl.sum(h * h, axis=0) / K + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    normed = ((h / root).to(x.dtype).to(tl.float32) * weight).to(x.dtype).to(tl.float32)
    grouped = tl.reshape(normed, (BLOCK // GROUP, GROUP))
    amax = _largest(grouped)
    codes = tl.reshape(_codes(grouped, amax), (BLOCK,))
    tl.store(codes_ptr + row * K + column, codes, mask=mask)
    group = tl.arange(0, BLOCK // GROUP)
    G = tl.cdiv(K, GROUP)
    tl.store(scale_ptr + row * G + group, _scale(amax), mask=group < G)


def rows_of(x: Tensor) -> Tensor:
    """Return x [..., K] as [M, K] whose inputs are adjacent; a view where it is one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def quantize_activation(
    x: Tensor,
    group_size: int = 0,
    activation_scale: Tensor | None = None,
    config: RowsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return int8 codes of x [..., K] and float32 scales [..., K / group_size or 1].

    `activation_scale` float32 [1] is the scale of all, without groups; None takes it from x.
    """
    K = x.shape[-1]
    size = group_size or K
    flat = rows_of(x)
    G = K // size
    rows = flat.shape[0] * G
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], G, dtype=torch.float32, device=x.device)
    config = config or rows_config(size)
    _quantize_rows[(triton.cdiv(rows, config.ROWS),)](
        flat,
        codes,
        scale,
        activation_scale,
        rows,
        size,
        flat.stride(0),
        G,
        ROWS=config.ROWS,
        BLOCK=config.BLOCK,
        ONE_PASS=size <= config.BLOCK,
        num_warps=config.num_warps,
        enable_fp_fusion=False,  # a fused multiply-add would round once where two are due
    )
    return codes, scale


def inputs(
    x: Tensor, group_size: int | None, activation_scale: Tensor | None, one_group: bool
) -> tuple[Tensor, Tensor | None]:
    """Return x [M, K] as a sparse GEMM reads it, and the scales of codes.

    Floating point where `group_size` is None; and also, decoded again, where a step of the GEMM
    does not stay within `one_group`: two scales do not come out of one sum.
    """
    flat = rows_of(x)
    if group_size is None:
        return flat, None
    codes, scale = quantize_activation(flat, group_size, activation_scale)
    if scale.shape[1] > 1 and not one_group:
        return (codes.unflatten(1, (-1, group_size)) * scale[..., None]).flatten(1), None
    return codes, scale


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, group_size: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes and scales of RMSNorm(x + residual) and the sum itself (x without a residual).

    Args:
        x: [M, K] in float32, bfloat16 or float16, inputs of a row adjacent, K up to 65536.
        weight: [K], of the norm.
        eps: added to the mean square.
        residual: like x.
        group_size: power of two that divides K; 0 is the whole token.

    Raises:
        ValueError: if K or the group size is none of these.
    """
    M, K = x.shape
    BLOCK = triton.next_power_of_2(K)
    if not 0 < K <= 65536 or (group_size and (K % group_size or group_size & (group_size - 1))):
        raise ValueError(
            f"rms_norm_quantize takes K of 1 to 65536 and a power of two that divides it as group "
            f"size, got K={K}, group_size={group_size}"
        )
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, K // group_size if group_size else 1, device=x.device)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if M:
        _rms_norm_quantize[(M,)](
            x,
            x if residual is None else residual,
            weight,
            total,
            codes,
            scale,
            K,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            GROUP=group_size or BLOCK,
            BLOCK=BLOCK,
            num_warps=min(max(BLOCK // 1024, 1), 16),
            enable_fp_fusion=False,
        )
    return codes, scale, total
