"""y = x Wᵀ of a weight of which single values are kept: decoded to dense tiles, then multiplied.

    y[m, n] = Σ_k x[m, k] · W[n, k] · scales + bias,  W[n, k] the next value where k's bit is set

Unstructured, canonical: weight [values] row by row, weight_bitmask uint8 [N, ceil(K/8)], bit i of
byte j column 8j + i, row_offsets int64 [N + 1]. A program walks K from the left, since a value's
place is the count of the bits before it; rows do not share that count, so loads are gathers.
2:4, canonical: weight [N, K/2], weight_meta uint8 [N, ceil(K/8)], a nibble for 4 inputs: the place
of the first value and, two bits up, of the second. Values come in order; nothing is gathered.

Bound: the gathers. It is right for every shape, and the memory that it saves is its point; for
speed with few tokens there are CUDA kernels. Not yet measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.configs import Config, choose, for_float32, within_block
from llmq_kernels.quantize_rows import inputs
from llmq_kernels.tiles import finish, store


@triton.jit
def _sparse_gemm(
    x_ptr,  # [M, K], rows x_stride apart: int8 codes or floating point
    x_scale_ptr,  # float32 [M, Gx] of codes, or None
    weight_ptr,  # [values], or [N, K/2] where 2:4
    mask_ptr,  # uint8 [N, ceil(K/8)]: bits, or nibbles of places
    row_offsets_ptr,  # int64 [N + 1], or None where 2:4
    weight_scale_ptr,  # float32 [N] or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N]
    M,
    N,
    K,
    x_stride,
    Gx,
    group,  # inputs that share an activation scale
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTEGER: tl.constexpr,
    GROUPED: tl.constexpr,  # whether a token has several scales
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    row, output = m % M, n % N
    column, byte = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 8)
    bytes_a_row = tl.cdiv(K, 8)
    mask_row = mask_ptr + output[:, None] * bytes_a_row + byte[None, :]
    if row_offsets_ptr is not None:
        values = tl.load(row_offsets_ptr + output)  # where the row's next value lies
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc_dtype: tl.constexpr = tl.int32 if INTEGER and not GROUPED else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), acc_dtype)
    for k in range(0, K, BLOCK_K):
        packed = tl.load(
            mask_row + k // 8, mask=(k // 8 + byte < bytes_a_row)[None, :], other=0
        ).to(tl.int32)[:, :, None]
        if row_offsets_ptr is not None:
            bits = tl.reshape(packed >> tl.arange(0, 8)[None, None, :] & 1, (BLOCK_N, BLOCK_K))
            place = tl.cumsum(bits, axis=1) - bits
            w = tl.load(weight_ptr + values[:, None] + place, mask=bits != 0, other=0)
            values += tl.sum(bits, axis=1)
        else:
            pair = tl.reshape(
                packed >> (4 * tl.arange(0, 2))[None, None, :] & 15, (BLOCK_N, BLOCK_K // 4)
            )
            half = k // 2 + tl.arange(0, BLOCK_K // 2)
            kept = tl.load(
                weight_ptr + output[:, None] * (K // 2) + half[None, :],
                mask=(half < K // 2)[None, :],
                other=0,
            )
            first, second = tl.split(tl.reshape(kept, (BLOCK_N, BLOCK_K // 4, 2)))
            place = tl.arange(0, 4)[None, None, :]
            w = tl.where(place == (pair & 3)[:, :, None], first[:, :, None], 0)
            w = tl.where(place == (pair >> 2)[:, :, None], second[:, :, None], w)
            w = tl.reshape(w, (BLOCK_N, BLOCK_K)).to(kept.dtype)
        x = tl.load(
            x_ptr + row[:, None] * x_stride + k + column[None, :],
            mask=(column < K - k)[None, :],
            other=0,
        )
        if INTEGER:
            if GROUPED:
                dot = tl.dot(x, w.T, out_dtype=tl.int32).to(tl.float32)
                acc += dot * tl.load(x_scale_ptr + row * Gx + k // group)[:, None]
            else:
                acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x, w.to(dtype).T, acc, input_precision="tf32x3")
    y = finish(acc, m, n, M, N, None if GROUPED else x_scale_ptr, weight_scale_ptr, bias_ptr)
    store(y_ptr, y, m, n, M, N)


def _sparse_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    row_offsets: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation_group_size: int | None,
    activation_scale: Tensor | None,
    config: Config | None,
) -> Tensor:
    N, K = mask.shape[0], x.shape[-1]
    M = x.numel() // K
    config = config or choose("bitmap_gemm", M, N, K, x.device)
    group = activation_group_size or 0
    config = within_block(config, config.BLOCK_N, config.BLOCK_K, group)
    one_group = group % config.BLOCK_K == 0
    codes, x_scale = inputs(x, activation_group_size, activation_scale, one_group)
    if codes.dtype == torch.float32:
        config = for_float32(config)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    _sparse_gemm[config.grid(M, N)](
        *(codes, x_scale, weight, mask, row_offsets),
        *(weight_scale, bias, y, M, N, K, codes.stride(0)),
        1 if x_scale is None else x_scale.shape[1],
        group or K,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        INTEGER=x_scale is not None,
        GROUPED=x_scale is not None and x_scale.shape[1] > 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    return y.view(*x.shape[:-1], N)


def bitmap_sparse_linear(
    x: Tensor,
    weight: Tensor,
    weight_bitmask: Tensor,
    row_offsets: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation_group_size: int | None = None,
    activation_scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Compute `torch.ops.llmq.bitmap_sparse_linear` of x [..., K]."""
    last = (weight_scale, bias, activation_group_size, activation_scale, config)
    return _sparse_linear(x, weight, weight_bitmask, row_offsets, *last)


def semi_structured_linear(
    x: Tensor,
    weight: Tensor,
    weight_meta: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation_group_size: int | None = None,
    activation_scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Compute `torch.ops.llmq.semi_structured_linear` of x [..., K]."""
    last = (weight_scale, bias, activation_group_size, activation_scale, config)
    return _sparse_linear(x, weight, weight_meta, None, *last)
