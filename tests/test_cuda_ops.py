"""The ops of CUDA tensors whole, from schema to kernel: their drivers over emulated kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq import ops
from llmq.formats import activation, bitmap, bitmap_tiles, uniform
from tests.cuda_emulator import emulator
from tests.helpers import assert_equal, generator
from tests.test_cuda_kernels import HALVES, assert_product, tokens


@pytest.fixture(autouse=True)
def emulated() -> None:
    emulator.load_ops()


@pytest.mark.parametrize("shape", [(2, 3, 96), (1, 96), (96,)], ids=str)
def test_quantize_activation(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator(0), dtype=torch.bfloat16)
    for group in (0, 32):
        found = torch.ops.llmq.cuda_quantize_activation(x, group)
        for y, expected in zip(found, activation.quantize_activation(x, group), strict=True):
            assert_equal(y, expected)


# K of one chunk and of many, so that there are slices; more tokens than a block has.
@pytest.mark.parametrize("group", [0, 32, 96])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 96), (3, 130, 1056), (40, 5, 288)])
def test_int8_linear(M: int, N: int, K: int, group: int) -> None:
    x = tokens(M, K, torch.bfloat16).view(1, M, K)
    weight = torch.randint(-127, 128, (N, K), generator=generator(1), dtype=torch.int8)
    scale, bias = torch.rand(N, 1, generator=generator(2)), torch.randn(N).to(torch.bfloat16)
    y = torch.ops.llmq.cuda_int8_linear(x, weight, scale, bias, group)
    if group == 0:
        assert_equal(y, ops._Int8Linear(x, weight, scale, bias).reference())
    codes, x_scale = activation.quantize_activation(x[0], group)
    coded = codes.float() * x_scale.repeat_interleave(group or K, 1)
    assert_product(y[0], coded, weight * scale, bias, "int8_linear")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, 32), (4, 96)])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 3, 96), (9, 130, 2112), (33, 2, 288)])
def test_weight_only_linear(
    M: int, N: int, K: int, bits: int, group: int | None, dtype: torch.dtype
) -> None:
    weight = torch.randn(N, K, generator=generator(1)) + 0.3
    granularity = "channel" if group is None else "group"
    encoded = uniform.encode(
        weight, bits=bits, granularity=granularity, group_size=group, symmetric=group is None
    )
    x = tokens(M, K + 8, dtype)[:, 8:]  # rows that are not contiguous
    y = torch.ops.llmq.cuda_weight_only_linear(x, *encoded, None, bits, None)
    assert_product(y, x, uniform.decode(*encoded, bits=bits, K=K), None, "weight_only_linear")


# N, K, share kept: one strip and tile, several, partial ones; nothing and all kept.
SPARSE = ((1, 16, 0.5), (32, 128, 1.0), (33, 144, 0.0), (70, 1040, 0.3), (160, 64, 0.9))


def sparse(
    N: int, K: int, density: float, dtype: torch.dtype
) -> tuple[Tensor, bitmap.BitmapWeight, bitmap.BitmapWeight]:
    mask = torch.rand(N, K, generator=generator(4)) < density
    values = torch.randint(-127, 128, (N, K), generator=generator(5)).to(dtype) * mask.to(dtype)
    if dtype.is_floating_point:
        values /= 128  # so that float16 holds the products
    encoded = bitmap.encode(values, mask)
    return values, encoded, bitmap_tiles.pack(*encoded, K)


@pytest.mark.parametrize("dtype", [torch.int8, *HALVES], ids=str)
@pytest.mark.parametrize(("N", "K", "density"), [*SPARSE, (5, 13, 0.5)])
def test_bitmap_tiles_hold_every_value_once(
    N: int, K: int, density: float, dtype: torch.dtype
) -> None:
    values, encoded, packed = sparse(N, K, density, dtype)
    for found, expected in zip(bitmap_tiles.unpack(*packed, N, K), encoded, strict=True):
        assert_equal(found, expected)
    if K % 4 == 0:
        assert_equal(torch.ops.llmq.cuda_expand_bitmap(*packed, N, K), values)


@pytest.mark.parametrize("M", [1, 9, 33])
@pytest.mark.parametrize(("N", "K", "density"), SPARSE)
def test_bitmap_sparse_linear_of_codes(M: int, N: int, K: int, density: float) -> None:
    values, encoded, packed = sparse(N, K, density, torch.int8)
    scale, bias = torch.rand(N, 1, generator=generator(2)), torch.randn(N)
    x = tokens(M, K, torch.bfloat16)
    y = torch.ops.llmq.cuda_bitmap_tiles_linear(x, *packed, scale, bias, 0)
    assert_equal(y, ops._BitmapSparseLinear(x, *encoded, scale, bias, 0).reference())
    assert_equal(y, ops._BitmapSparseLinear(x, *packed, scale, bias, 0).reference())
    if K % 32 == 0:
        y = torch.ops.llmq.cuda_bitmap_tiles_linear(x, *packed, scale, None, 32)
        codes, x_scale = activation.quantize_activation(x, 32)
        coded = codes.float() * x_scale.repeat_interleave(32, 1)
        assert_product(y, coded, values * scale, None, "groups")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("M", [1, 9, 33])
@pytest.mark.parametrize(("N", "K", "density"), SPARSE)
def test_bitmap_sparse_linear_of_floats(
    M: int, N: int, K: int, density: float, dtype: torch.dtype
) -> None:
    x = tokens(M, K, dtype)
    values, _, packed = sparse(N, K, density, torch.int8)
    scale = torch.rand(N, 1, generator=generator(2)) / 128
    y = torch.ops.llmq.cuda_bitmap_tiles_linear(x, *packed, scale, None, None)
    assert_product(y, x, values * scale, None, "int8 values")
    if N % 32 == 0:  # N is told by strips
        values, _, packed = sparse(N, K, density, dtype)
        y = torch.ops.llmq.cuda_bitmap_tiles_linear(x, *packed, None, None, None)
        assert_product(y, x, values, None, "float values")


def test_rows_from_odd_addresses_are_copied() -> None:
    N, K = 16, 128
    storage = torch.randint(-127, 128, (N * K + 1,), generator=generator(1), dtype=torch.int8)
    weight, scale = storage[1:].view(N, K), torch.ones(N, 1)
    x = torch.randn(2 * K + 1, generator=generator(2)).to(torch.bfloat16)[1:].view(2, K)
    y = torch.ops.llmq.cuda_weight_only_linear(x, weight, scale, None, None, 8, None)
    assert_product(y, x, weight.float(), None, "weight_only_linear")


def test_what_a_kernel_cannot_take_is_refused() -> None:
    weight, scale = torch.zeros(4, 40, dtype=torch.int8), torch.ones(4, 1)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        torch.ops.llmq.cuda_int8_linear(torch.zeros(1, 40), weight, scale, None, 0)
    x, weight = torch.zeros(1, 32), torch.zeros(4, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        torch.ops.llmq.cuda_weight_only_linear(x, weight, scale, None, None, 8, None)
