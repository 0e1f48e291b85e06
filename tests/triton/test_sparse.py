"""Triton's sparse GEMMs against the reference: int8 to the bit, floats within a formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.formats import activation, bitmap, block, semi_structured
from llmq.ops.sparse import BitmapSparseLinear, BlockSparseLinear, SemiStructuredLinear
from tests.helpers import assert_equal, generator, random_mask
from tests.triton.test_gemm import DTYPES, check_product, codes_of, on_device, tokens

bitmap_gemm = pytest.importorskip("llmq_kernels.bitmap_gemm")
block_sparse_gemm = pytest.importorskip("llmq_kernels.block_sparse_gemm")
Config = pytest.importorskip("llmq_kernels.configs").Config

SMALL = Config(16, 32, 32, 4, 2)
# M, N, K, and an activation group: a token, or what steps of 32 inputs do and do not respect.
SHAPES = (
    *((1, 1, 1, 0), (3, 17, 63, 0), (2, 5, 8, 0), (17, 33, 96, 32), (5, 40, 160, 80)),
    *((18, 35, 200, 0), (2, 64, 64, 64)),
)
BLOCKS = (
    *((3, 64, 96, (32, 32), 0), (17, 64, 128, (16, 64), 64), (2, 32, 64, (8, 8), 32)),
    *((4, 6, 21, (3, 7), 0), (1, 96, 96, (48, 48), 32), (5, 64, 96, (64, 96), 0)),
    *((2, 4, 10, (1, 5), 2), (18, 128, 128, (64, 32), 0)),
)


def _values(N: int, K: int) -> tuple[Tensor, Tensor]:
    codes, scale = codes_of(N, K)
    return torch.where(codes == 0, 1, codes), scale


def _check(op: Any, kernel: Any, x: Tensor, stored: Any, scale: Tensor, group: int) -> None:
    """Compare int8 inputs to the bit, or where groups part the sums within the formula."""
    bias = torch.randn(scale.shape[0], generator=generator(4)).to(x.dtype)
    y = kernel(*on_device(x, *stored, scale, bias), group, config=SMALL)
    call = op(x, *stored, scale, bias, group)
    if group in (0, 32, x.shape[1]):
        assert_equal(y.cpu(), call.reference())
    codes, x_scale = activation.quantize_activation(x, group)
    coded = (codes.float().unflatten(1, (x_scale.shape[1], -1)) * x_scale[..., None]).flatten(1)
    check_product(y, coded, call.dense(), bias, f"groups of {group}")
    y = kernel(*on_device(x, *stored, scale, bias), None, config=SMALL)
    check_product(y, x, call.dense(), bias, "int8 values, floating-point inputs")


@pytest.mark.parametrize(("M", "N", "K", "group"), SHAPES)
def test_bitmap(M: int, N: int, K: int, group: int) -> None:
    values, scale = _values(N, K)
    stored = bitmap.encode(values, random_mask(N, K, kept=0.1 + 0.8 * (M % 2)))
    x = tokens(M, K, DTYPES[(M + N) % 3])
    _check(BitmapSparseLinear, bitmap_gemm.bitmap_sparse_linear, x, stored, scale, group)


@pytest.mark.parametrize(("M", "N", "K", "group"), [s for s in SHAPES if s[2] % 4 == 0])
def test_semi_structured(M: int, N: int, K: int, group: int) -> None:
    values, scale = _values(N, K)
    ranks = torch.rand(N, K // 4, 4, generator=generator(5)).argsort(-1).argsort(-1)
    stored = semi_structured.encode(values, (ranks < 2).flatten(1))
    x = tokens(M, K, DTYPES[(M + N) % 3])
    kernel = bitmap_gemm.semi_structured_linear
    _check(SemiStructuredLinear, kernel, x, stored, scale, group)


@pytest.mark.parametrize(("M", "N", "K", "shape", "group"), BLOCKS)
def test_block(M: int, N: int, K: int, shape: tuple[int, int], group: int) -> None:
    values, scale = _values(N, K)
    kept = random_mask(N // shape[0], K // shape[1], seed=M)
    kept[0] = False  # an empty block row
    mask = kept.repeat_interleave(shape[0], 0).repeat_interleave(shape[1], 1)
    stored = block.encode(values, shape, mask)
    x = tokens(M, K, DTYPES[(M + N) % 3])
    kernel = block_sparse_gemm.block_sparse_linear
    _check(BlockSparseLinear, kernel, x, stored, scale, group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floating_point_values(dtype: torch.dtype) -> None:
    M, N, K = 5, 32, 64
    values, x = torch.randn(N, K, generator=generator(1)).to(dtype), tokens(M, K, dtype)
    mask = random_mask(N, K)
    pairs = torch.arange(K).remainder(4).lt(2).expand(N, K)
    blocks = mask[::16, ::16].repeat_interleave(16, 0).repeat_interleave(16, 1)
    for kept, stored, kernel in (
        (mask, bitmap.encode(values, mask), bitmap_gemm.bitmap_sparse_linear),
        (pairs, semi_structured.encode(values, pairs), bitmap_gemm.semi_structured_linear),
        (blocks, block.encode(values, (16, 16), blocks), block_sparse_gemm.block_sparse_linear),
    ):
        y = kernel(*on_device(x, *stored))
        check_product(y, x, torch.where(kept, values.float(), 0.0), None, kernel.__name__)
