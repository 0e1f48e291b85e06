"""y = x Wᵀ of a weight that keeps whole blocks, int8 or floating point: empty blocks are not read.

    y[m, n] = Σ_kept blocks of n's block row Σ_c x[m, C · column + c] · block[r, c] · scales + bias

Storage is canonical: weight [B, R, C], block row by block row; block_index int32 [B] block columns;
block_offsets int32 [N/R + 1]. A program takes BLOCK_M tokens × BLOCK_N rows of one block row, and
walks its blocks BLOCK_K inputs at a time as a dense GEMM would: the same instructions as
`int8_gemm.py`. Blocks of fewer than 16 rows or 32 inputs leave part of a tile empty.

Bound: tensor cores for many tokens, at the density's share of the dense time. Not yet measured.
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
def _block_sparse_gemm(
    x_ptr,  # [M, K], rows x_stride apart: int8 codes or floating point
    x_scale_ptr,  # float32 [M, Gx] of codes, or None
    weight_ptr,  # [B, R, C] int8 or floating point
    block_index_ptr,  # int32 [B]
    block_offsets_ptr,  # int32 [N/R + 1]
    weight_scale_ptr,  # float32 [N] or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N]
    M,
    N,
    R,
    C,
    x_stride,
    Gx,
    group,  # inputs that share an activation scale
    STEPS_A_BLOCK,  # of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTEGER: tl.constexpr,
    GROUPED: tl.constexpr,  # whether a token has several scales
    WHOLE: tl.constexpr,  # whether BLOCK_K divides C
):
    # Neighbours share a block row: its blocks stay in L2.
    tiles_m, tiles_a_block = tl.cdiv(M, BLOCK_M), tl.cdiv(R, BLOCK_N)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    tile = tl.program_id(0) // tiles_m
    block_row = tile // tiles_a_block
    r = tile % tiles_a_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row = m % M
    column = tl.arange(0, BLOCK_K)
    x_row = x_ptr + row[:, None] * x_stride + column[None, :]
    weight_row = weight_ptr + (r % R)[:, None] * C + column[None, :]
    first = tl.load(block_offsets_ptr + block_row)
    last = tl.load(block_offsets_ptr + block_row + 1)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc_dtype: tl.constexpr = tl.int32 if INTEGER and not GROUPED else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), acc_dtype)
    for step in range(first * STEPS_A_BLOCK, last * STEPS_A_BLOCK):
        block, start = step // STEPS_A_BLOCK, step % STEPS_A_BLOCK * BLOCK_K
        k = tl.load(block_index_ptr + block) * C + start
        weight_at = weight_row + block.to(tl.int64) * R * C + start
        if WHOLE:
            x = tl.load(x_row + k)
            w = tl.load(weight_at)
        else:
            inside = (column < C - start)[None, :]
            x = tl.load(x_row + k, mask=inside, other=0)
            w = tl.load(weight_at, mask=inside, other=0)
        if INTEGER:
            if GROUPED:
                dot = tl.dot(x, w.T, out_dtype=tl.int32).to(tl.float32)
                acc += dot * tl.load(x_scale_ptr + row * Gx + k // group)[:, None]
            else:
                acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x, w.to(dtype).T, acc, input_precision="tf32x3")
    n = block_row.to(tl.int64) * R + r
    y = finish(acc, m, n, M, N, None if GROUPED else x_scale_ptr, weight_scale_ptr, bias_ptr)
    store(y_ptr, y, m, tl.where(r < R, n, N), M, N)


def block_sparse_linear(
    x: Tensor,
    weight: Tensor,
    block_index: Tensor,
    block_offsets: Tensor,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation_group_size: int | None = None,
    activation_scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Compute `torch.ops.llmq.block_sparse_linear` of x [..., K]."""
    R, C = weight.shape[1:]
    N = (block_offsets.shape[0] - 1) * R
    M, K = x.numel() // x.shape[-1], x.shape[-1]
    config = config or choose("block_sparse_gemm", M, N, K, x.device)
    group = activation_group_size or 0
    config = within_block(config, R, C, group)
    one_group = group % C == 0 or C % config.BLOCK_K == group % config.BLOCK_K == 0
    codes, x_scale = inputs(x, activation_group_size, activation_scale, one_group)
    if codes.dtype == torch.float32:
        config = for_float32(config)
    BLOCK_K = config.BLOCK_K
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(M, config.BLOCK_M) * (N // R) * triton.cdiv(R, config.BLOCK_N)
    _block_sparse_gemm[(tiles,)](
        *(codes, x_scale, weight, block_index, block_offsets, weight_scale, bias, y, M, N, R, C),
        codes.stride(0),
        1 if x_scale is None else x_scale.shape[1],
        group or K,
        triton.cdiv(C, BLOCK_K),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=BLOCK_K,
        INTEGER=x_scale is not None,
        GROUPED=x_scale is not None and x_scale.shape[1] > 1,
        WHOLE=C % BLOCK_K == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    return y.view(*x.shape[:-1], N)
