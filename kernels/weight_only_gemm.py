"""y = x Wᵀ of floating-point activations and coded weights (W8A16, W4A16): decoded in registers.

    y[m, n] = Σ_groups (Σ_k x[m, k] · (weight[n, k] − zero_point)) · weight_scale + bias

Storage is canonical: weight int8 [N, K] or nibbles [N, ceil(K/2)] (even inputs low), weight_scale
float32 [N, G], zero points int8 [N, G]. With a codebook, codebook[n, code] stands for the integer.
Integers of 9 bits are exact in bfloat16 and float16, and scales multiply float32 sums, so nothing
is lost but what codebook levels lose when they are rounded to x's dtype.

The tile is Wᵀ's: BLOCK_N outputs × BLOCK_M tokens, the decoded weight the left operand, which comes
from registers: mma.m16n8k16, wgmma.m64nNk16 with A in registers (sm_90, from 64 outputs on), and
tcgen05.mma (sm_100). float32 inputs take three TF32 products. For few tokens a warp owns 16 outputs
and no weight is decoded twice: 3.6 instructions a weight of 8 bits, 3.9 of 4 bits on sm_90, where
memory at full rate leaves 9.6 and 4.8 issue slots (benchmarks/results/static).

Bound: reading the weight for few tokens; tensor cores and decoding for many. Not yet measured.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.configs import INTERPRETED, Config, choose, for_float32
from llmq_kernels.int8_gemm import coded_linear
from llmq_kernels.quantize_rows import rows_of
from llmq_kernels.tiles import add_splits, finish, parts_of, store, tile_of

_ASM = """{{
.reg .b32 low, high;
and.b32 low, $4, 0x0F0F0F0F;
shr.u32 high, $4, 4;
and.b32 high, high, 0x0F0F0F0F;
prmt.b32 $0, low, {0}, 0x4140;
prmt.b32 $1, low, {0}, 0x4342;
prmt.b32 $2, high, {0}, 0x4140;
prmt.b32 $3, high, {0}, 0x4342;
}}"""
_BFLOAT16 = tl.constexpr(_ASM.format("0x43434343"))
_FLOAT16 = tl.constexpr(_ASM.format("0x64646464"))


@triton.jit
def _nibbles(packed, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """(low, high) nibbles as 128 + code in bfloat16, 1024 + code in float16, code in float32.

    The code becomes the low bits of a power of two: one permutation for two weights, where a
    conversion takes six instructions.
    """
    if NATIVE and dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _BFLOAT16,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif NATIVE and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(
            _FLOAT16,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        offset: tl.constexpr = 128 if dtype == tl.bfloat16 else (1024 if dtype == tl.float16 else 0)
        low = ((packed & 15).to(tl.int32) + offset).to(dtype)
        high = (((packed >> 4) & 15).to(tl.int32) + offset).to(dtype)
    return low, high


@triton.jit
def _weight_only_gemm(
    x_ptr,  # [M, K], rows x_stride apart
    weight_ptr,  # int8 [N, K], or nibbles [N, ceil(K/2)]
    weight_scale_ptr,  # float32 [N, G]
    zero_point_ptr,  # int8 [N, G] or None
    codebook_ptr,  # float32 [N or 1, 2^BITS] or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], or float32 [SPLITS, M, N]
    M,
    N,
    x_stride,
    row_bytes,  # of weight
    codebook_stride,  # 0 where all outputs share one
    G,
    GROUP,
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
    GROUPED: tl.constexpr,  # whether a row has several groups
    NATIVE: tl.constexpr,  # whether PTX can be used
):
    index = tl.program_id(0)
    tile_m, tile_n = tile_of(index // SPLITS, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    # Rows past the last wrap around: read in vain, never out of bounds, never stored.
    row, output = m % M, n % N
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K * BITS // 8)
    x_row = x_ptr + row[:, None] * x_stride + column[None, :]
    weight_row = weight_ptr + output[:, None] * row_bytes + byte[None, :]
    first = index % SPLITS * STEPS_A_SPLIT
    last = tl.minimum(first + STEPS_A_SPLIT, G * STEPS_A_GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(first, last):
        g, part = step // STEPS_A_GROUP, step % STEPS_A_GROUP
        x_at = x_row + (g * GROUP + part * BLOCK_K)
        weight_at = weight_row + (g * group_bytes + part * (BLOCK_K * BITS // 8))
        if WHOLE:
            x = tl.load(x_at)
            w = tl.load(weight_at)
        else:
            left = GROUP - part * BLOCK_K
            x = tl.load(x_at, mask=(column < left)[None, :], other=0.0)
            w = tl.load(weight_at, mask=(byte * (8 // BITS) < left)[None, :], other=0)
        if codebook_ptr is not None:
            if BITS == 4:
                w = tl.reshape(tl.join(w & 15, (w >> 4) & 15), (BLOCK_N, BLOCK_K))
            level = output[:, None] * codebook_stride + w.to(tl.uint8, bitcast=True)
            w = tl.load(codebook_ptr + level).to(dtype)
        elif BITS == 4:
            zero = tl.full((BLOCK_N,), 8.0, tl.float32)
            if zero_point_ptr is not None:
                zero = tl.load(zero_point_ptr + output * G + g).to(tl.float32)
            if dtype == tl.bfloat16:
                zero += 128.0
            if dtype == tl.float16:
                zero += 1024.0
            low, high = _nibbles(w, dtype, NATIVE)
            low -= zero.to(dtype)[:, None]
            high -= zero.to(dtype)[:, None]
            w = tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K))
        else:
            w = w.to(dtype)
            if zero_point_ptr is not None:
                w -= tl.load(zero_point_ptr + output * G + g).to(dtype)[:, None]
        if GROUPED:
            dot = tl.dot(w, x.T, input_precision="tf32x3")
            acc += dot * tl.load(weight_scale_ptr + output * G + g)[:, None]
        else:
            acc = tl.dot(w, x.T, acc, input_precision="tf32x3")
    y = acc.T
    if SPLIT:
        store(y_ptr + (index % SPLITS).to(tl.int64) * M * N, y, m, n, M, N)
    else:
        scale_ptr = None if GROUPED else weight_scale_ptr
        store(y_ptr, finish(y, m, n, M, N, None, scale_ptr, bias_ptr), m, n, M, N)


def float_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    bits: int,
    config: Config | None = None,
) -> Tensor:
    """Return y [..., N] of x [..., K], the weight decoded uniformly or by a codebook."""
    flat = rows_of(x)
    (M, K), (N, G) = flat.shape, weight_scale.shape
    group = K // G
    config = config or choose("weight_only_gemm", M, N, K, x.device, group if G > 1 else 0)
    if x.dtype == torch.float32:
        config = for_float32(config)
    elif codebook is not None and bits == 4:  # look-ups of a thread hold their addresses
        config = replace(config, BLOCK_K=min(config.BLOCK_K, 128))
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    parts = parts_of(y, config.SPLITS, torch.float32)
    steps_a_group = triton.cdiv(group, config.BLOCK_K)
    _weight_only_gemm[config.grid(M, N)](
        *(flat, weight, weight_scale, zero_point, codebook, bias, parts, M, N, flat.stride(0)),
        weight.shape[1],
        0 if codebook is None or codebook.shape[0] == 1 else codebook.shape[1],
        *(G, group, triton.cdiv(group * bits, 8), steps_a_group),
        triton.cdiv(G * steps_a_group, config.SPLITS),
        BITS=bits,
        WHOLE=group % config.BLOCK_K == 0,
        GROUPED=G > 1,
        NATIVE=not INTERPRETED,
        **config.launch(),
    )
    if config.SPLITS > 1:
        add_splits(parts, None, None if G > 1 else weight_scale, bias, y)
    return y.view(*x.shape[:-1], N)


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 8,
    activation_group_size: int | None = None,
) -> Tensor:
    """Compute `torch.ops.llmq.weight_only_linear` of x [..., K]."""
    tensors = (weight, weight_scale, weight_zero_point)
    if activation_group_size is None:
        return float_gemm(x, *tensors, None, bias, bits)
    return coded_linear(x, *tensors, bias, bits, activation_group_size)
