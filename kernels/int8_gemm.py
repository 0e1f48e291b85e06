"""y = x Wᵀ of int8 activations and integer weights (W8A8, W8A8-gN, W4A8-gN) on tensor cores.

    y = Σ_groups (Σ_k codes[m, k] · (weight[n, k] − zero_point)) · x_scale · weight_scale + bias

Storage is canonical: codes int8 [M, K], weight int8 [N, K] or nibbles [N, ceil(K/2)] (even inputs
low), x_scale float32 [M, Gx], weight_scale float32 [N, Gw]. Inner sums are exact int32.

`_int8_gemm`, one scale a token and channel: tiles of BLOCK_M × BLOCK_N, both operands staged in
shared memory num_stages deep; by TMA, and by persistent programs that walk the tiles, where rows
lie on 16 bytes and the GPU is an sm_90 or later, with loads and products in warps of their own on
sm_100; else by asynchronous copies. Instructions: mma.m16n8k32 s8 (sm_80, and few tokens),
wgmma.m64nNk32 (sm_90), tcgen05.mma kind::i8 (sm_100). A stage: (BLOCK_M + BLOCK_N) · BLOCK_K bytes.
`_grouped_int8_gemm`, scales that change along K: every BLOCK_K inputs, which lie within a group,
the int32 tile is scaled into a float32 one.

Bound: tensor cores for many tokens, reading the weight for few; with groups of 64, the scaling (3
operations an output and group, on a quarter of the tensor core's rate). Not yet measured.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.configs import Config, choose
from llmq_kernels.quantize_rows import quantize_activation, rows_of
from llmq_kernels.tiles import add_splits, finish, parts_of, store, tile_of


@triton.jit
def _int8_gemm(
    x,  # int8 [M, K] codes: a pointer, or a descriptor of tiles
    x_scale_ptr,  # float32 [M]
    weight,  # int8 [N, K], likewise
    weight_scale_ptr,  # float32 [N]
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], or int32 [SPLITS, M, N]
    M,
    N,
    K,
    K_SPLIT,  # of a split: a multiple of BLOCK_K
    SPLITS,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,  # warps
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for index in tl.range(
        tl.program_id(0),
        tiles_m * tiles_n * SPLITS,
        tl.num_programs(0),
        warp_specialize=SPECIALIZE,
    ):
        tile_m, tile_n = tile_of(index // SPLITS, tiles_m, tiles_n, GROUP_M)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        first = index % SPLITS * K_SPLIT
        last = tl.minimum(first + K_SPLIT, K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        if TMA:
            for k in range(first, last, BLOCK_K):
                w = weight.load([tile_n * BLOCK_N, k])
                acc = tl.dot(x.load([tile_m * BLOCK_M, k]), w.T, acc, out_dtype=tl.int32)
        else:
            column = tl.arange(0, BLOCK_K)
            # Rows past the last wrap around: read in vain, never out of bounds, never stored.
            x_row = x + (m % M)[:, None] * K + column[None, :]
            weight_row = weight + (n % N)[:, None] * K + column[None, :]
            for k in range(first, last, BLOCK_K):
                inside = (column < last - k)[None, :]
                w = tl.load(weight_row + k, mask=inside, other=0)
                codes = tl.load(x_row + k, mask=inside, other=0)
                acc = tl.dot(codes, w.T, acc, out_dtype=tl.int32)
        if SPLIT:
            store(y_ptr + (index % SPLITS).to(tl.int64) * M * N, acc, m, n, M, N)
        else:
            y = finish(acc, m, n, M, N, x_scale_ptr, weight_scale_ptr, bias_ptr)
            store(y_ptr, y, m, n, M, N)


@triton.jit
def _grouped_int8_gemm(
    x_ptr,  # int8 [M, K] codes
    x_scale_ptr,  # float32 [M, Gx]
    weight_ptr,  # int8 [N, K], or nibbles [N, ceil(K/2)]
    weight_scale_ptr,  # float32 [N, Gw]
    zero_point_ptr,  # int8 [N, Gw] or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], or float32 [SPLITS, M, N]
    M,
    N,
    x_stride,
    row_bytes,  # of weight
    Gx,
    Gw,
    groups,  # within which no scale changes
    GROUP,  # inputs of each
    group_bytes,
    STEPS_A_GROUP,  # of BLOCK_K
    STEPS_A_SPLIT,
    SPLITS,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether BLOCK_K divides the group
):
    index = tl.program_id(0)
    tile_m, tile_n = tile_of(index // SPLITS, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    row, output = m % M, n % N
    column = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K * BITS // 8)
    x_row = x_ptr + row[:, None] * x_stride + column[None, :]
    weight_row = weight_ptr + output[:, None] * row_bytes + byte[None, :]
    first = index % SPLITS * STEPS_A_SPLIT
    last = tl.minimum(first + STEPS_A_SPLIT, groups * STEPS_A_GROUP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        g, part = step // STEPS_A_GROUP, step % STEPS_A_GROUP
        x_at = x_row + (g * GROUP + part * BLOCK_K)
        weight_at = weight_row + (g * group_bytes + part * (BLOCK_K * BITS // 8))
        if WHOLE:
            x = tl.load(x_at)
            w = tl.load(weight_at)
        else:
            left = GROUP - part * BLOCK_K
            x = tl.load(x_at, mask=(column < left)[None, :], other=0)
            w = tl.load(weight_at, mask=(byte * (8 // BITS) < left)[None, :], other=0)
        weight_group = output * Gw + g * Gw // groups
        if BITS == 4:
            zero_point = tl.full((BLOCK_N,), 8, tl.int8)
            if zero_point_ptr is not None:
                zero_point = tl.load(zero_point_ptr + weight_group)
            w = tl.reshape(tl.join(w & 15, (w >> 4) & 15), (BLOCK_N, BLOCK_K))
            w -= zero_point[:, None]
        dot = tl.dot(x, w.T, out_dtype=tl.int32)
        if BITS == 8 and zero_point_ptr is not None:  # weight − zero_point takes 9 bits
            zero_point = tl.load(zero_point_ptr + weight_group).to(tl.int32)
            dot -= tl.sum(x.to(tl.int32), axis=1)[:, None] * zero_point[None, :]
        x_scale = tl.load(x_scale_ptr + row * Gx + g * Gx // groups)
        weight_scale = tl.load(weight_scale_ptr + weight_group)
        acc += dot.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
    if SPLIT:
        store(y_ptr + (index % SPLITS).to(tl.int64) * M * N, acc, m, n, M, N)
    else:
        store(y_ptr, finish(acc, m, n, M, N, None, None, bias_ptr), m, n, M, N)


def int8_gemm(
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """Return y [M, N] in `dtype` of codes [M, K] and weight [N, K], scales of [M, 1] and [N, 1]."""
    (M, K), N = codes.shape, weight.shape[0]
    config = config or choose("int8_gemm", M, N, K, codes.device)
    y = torch.empty(M, N, dtype=dtype, device=codes.device)
    parts = parts_of(y, config.SPLITS, torch.int32)
    tma = config.TMA and K % 16 == 0 and weight.data_ptr() % 16 == 0
    operands = (codes, weight)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        operands = (
            TensorDescriptor.from_tensor(codes, [config.BLOCK_M, config.BLOCK_K]),
            TensorDescriptor.from_tensor(weight, [config.BLOCK_N, config.BLOCK_K]),
        )
    _int8_gemm[config.grid(M, N, codes.device if tma else None)](
        *(operands[0], x_scale, operands[1], weight_scale, bias, parts, M, N, K),
        triton.cdiv(triton.cdiv(K, config.SPLITS), config.BLOCK_K) * config.BLOCK_K,
        TMA=tma,
        SPECIALIZE=tma and config.SPECIALIZE,
        **config.launch(),
    )
    if config.SPLITS > 1:
        add_splits(parts, x_scale, weight_scale, bias, y)
    return y


def grouped_int8_gemm(
    codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    bits: int,
    config: Config | None = None,
) -> Tensor:
    """Return y [M, N] of codes [M, K] with scales [M, Gx], weight [N, K] with scales [N, Gw]."""
    (M, K), N = codes.shape, weight.shape[0]
    Gx, Gw = x_scale.shape[1], weight_scale.shape[1]
    groups = math.lcm(Gx, Gw)
    group = K // groups
    config = config or choose("grouped_int8_gemm", M, N, K, codes.device, group)
    y = torch.empty(M, N, dtype=dtype, device=codes.device)
    parts = parts_of(y, config.SPLITS, torch.float32)
    steps_a_group = triton.cdiv(group, config.BLOCK_K)
    _grouped_int8_gemm[config.grid(M, N)](
        *(codes, x_scale, weight, weight_scale, zero_point, bias, parts, M, N, codes.stride(0)),
        *(weight.shape[1], Gx, Gw, groups, group, triton.cdiv(group * bits, 8), steps_a_group),
        triton.cdiv(groups * steps_a_group, config.SPLITS),
        BITS=bits,
        WHOLE=group % config.BLOCK_K == 0,
        **config.launch(),
    )
    if config.SPLITS > 1:
        add_splits(parts, None, None, bias, y)
    return y


def coded_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation_group_size: int,
    activation_scale: Tensor | None = None,
) -> Tensor:
    """Return y [..., N] of x [..., K], quantized first."""
    codes, x_scale = quantize_activation(rows_of(x), activation_group_size, activation_scale)
    operands = (codes, x_scale, weight, weight_scale)
    if bits == 8 and zero_point is None and x_scale.shape[1] == weight_scale.shape[1] == 1:
        y = int8_gemm(*operands, bias, x.dtype)
    else:
        y = grouped_int8_gemm(*operands, zero_point, bias, x.dtype, bits)
    return y.view(*x.shape[:-1], weight.shape[0])


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation_group_size: int = 0,
    activation_scale: Tensor | None = None,
) -> Tensor:
    """Compute `torch.ops.llmq.int8_linear` of x [..., K]."""
    inputs = (activation_group_size, activation_scale)
    return coded_linear(x, weight, weight_scale, None, bias, 8, *inputs)
