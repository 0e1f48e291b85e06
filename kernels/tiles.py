"""What the GEMM kernels share: the order of tiles, the epilogue, and the sum over splits of K.

    y = (acc · x_scale) · weight_scale + bias, rounded once to y's dtype

Where few tokens leave too few tiles to fill the GPU, programs share a tile's K: each of SPLITS
writes its part to memory of its own, and a second kernel adds them in order, so that results do not
depend on which program ends first. Int32 parts add up exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: columns of GROUP_M rows, so that neighbours share weights in L2."""
    in_group = GROUP_M * tiles_n
    first = index // in_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + index % in_group % rows, index % in_group // rows


@triton.jit
def finish(acc, m, n, M, N, x_scale_ptr, weight_scale_ptr, bias_ptr):
    """Scale acc [rows m, columns n], int32 or float32, and add the bias; pointers may be None."""
    y = acc.to(tl.float32)
    if x_scale_ptr is not None:
        y = y * tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[:, None]
    if weight_scale_ptr is not None:
        y = y * tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def store(y_ptr, y, m, n, M, N):
    """Write y [rows m, columns n] of a matrix [M, N]; m and n are int64 where M · N needs it."""
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_splits(
    part_ptr,  # int32 or float32 [SPLITS, M, N]
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    size,  # M · N, which may take 64 bits
    SPLITS,
    BLOCK_N: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = part_ptr + m[:, None] * N + n[None, :]
    inside = (n < N)[None, :]
    acc = tl.load(at, mask=inside, other=0)
    for _ in range(1, SPLITS):
        at += size
        acc += tl.load(at, mask=inside, other=0)
    store(y_ptr, finish(acc, m, n, M, N, x_scale_ptr, weight_scale_ptr, bias_ptr), m, n, M, N)


def add_splits(
    parts: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Write the sum of parts [SPLITS, M, N], scaled and with the bias, to y [M, N]."""
    SPLITS, M, N = parts.shape
    _add_splits[(M, triton.cdiv(N, 1024))](
        *(parts, x_scale, weight_scale, bias, y, M, N, M * N, SPLITS),
        BLOCK_N=1024,
        num_warps=4,
        enable_fp_fusion=False,
    )


def parts_of(y: Tensor, splits: int, dtype: torch.dtype) -> Tensor:
    """Return where programs write: y itself, or memory for the parts of each split."""
    return y if splits == 1 else torch.empty(splits, *y.shape, dtype=dtype, device=y.device)
