"""The ops of CUDA tensors whole, from schema to kernel: their drivers over emulated kernels."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from llmq.formats import activation, bitmap, bitmap_tiles, uniform
from llmq.nn import SparseLinear, empty_layer
from llmq.ops.dense import Int8Linear
from llmq.ops.sparse import BitmapSparseLinear, SemiStructuredLinear
from llmq.runtime import dispatch, gpu
from llmq.scheme import resolve_scheme
from tests.cuda.test_kernels import HALVES, assert_product, pairs, tokens
from tests.cuda_emulator import emulator
from tests.helpers import assert_equal, generator


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


def test_a_given_scale_is_that_of_every_token() -> None:
    """Of each op that takes one, to the bit; a scale that is none gives NaN."""
    N, K, native = 70, 256, torch.ops.llmq
    scale, bias = torch.rand(N, 1, generator=generator(2)), torch.randn(N)
    dense = torch.randint(-127, 128, (N, K), generator=generator(1), dtype=torch.int8)
    _, encoded, packed = sparse(N, K, 0.4, torch.int8)
    stored, _ = pairs(N, K)
    x = tokens(9, K, torch.bfloat16)
    for given in (torch.tensor([0.02]), torch.tensor([float("nan")])):
        last = (scale, bias, 0, given)
        found = {
            "int8": (
                native.cuda_int8_linear(x, dense, *last),
                Int8Linear(x, dense, *last),
            ),
            "bitmap": (
                native.cuda_bitmap_sparse_linear(x, *packed, *last),
                BitmapSparseLinear(x, *encoded, *last),
            ),
            "2:4": (
                native.cuda_semi_structured_linear(x, *stored, *last),
                SemiStructuredLinear(x, *stored, *last),
            ),
        }
        for name, (y, call) in found.items():
            assert_equal(y, call.reference(), name)
            assert bool(y.isnan().all()) == bool(given.isnan()), name
        for y, expected in zip(
            native.cuda_quantize_activation(x, 0, given),
            activation.quantize_activation(x, 0, given),
            strict=True,
        ):
            assert_equal(y, expected)
    with pytest.raises(ValueError, match="activation_scale must be float32"):
        native.cuda_int8_linear(x, dense, scale, bias, 32, torch.ones(1))


# K of one chunk and of many, so that there are slices; more tokens than a block has.
@pytest.mark.parametrize("group", [0, 32, 96])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 96), (3, 130, 1056), (40, 5, 288)])
def test_int8_linear(M: int, N: int, K: int, group: int) -> None:
    x = tokens(M, K, torch.bfloat16).view(1, M, K)
    weight = torch.randint(-127, 128, (N, K), generator=generator(1), dtype=torch.int8)
    scale, bias = torch.rand(N, 1, generator=generator(2)), torch.randn(N).to(torch.bfloat16)
    y = torch.ops.llmq.cuda_int8_linear(x, weight, scale, bias, group)
    if group == 0:
        assert_equal(y, Int8Linear(x, weight, scale, bias).reference())
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


@pytest.mark.parametrize(("group", "x_group"), [(32, 32), (64, 0), (96, 32), (None, 0)])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 3, 192), (40, 130, 2112)])
def test_weight_only_linear_of_codes(
    M: int, N: int, K: int, group: int | None, x_group: int
) -> None:
    weight = torch.randn(N, K, generator=generator(1)) + 0.3
    granularity = "channel" if group is None else "group"
    encoded = uniform.encode(
        weight, bits=4, granularity=granularity, group_size=group, symmetric=group is None
    )
    x, bias = tokens(M, K, torch.float32), torch.randn(N, generator=generator(3))
    y = torch.ops.llmq.cuda_weight_only_linear(x, *encoded, bias, 4, x_group)
    codes, x_scale = activation.quantize_activation(x, x_group)
    coded = codes.float() * x_scale.repeat_interleave(x_group or K, 1)
    assert_product(y, coded, uniform.decode(*encoded, bits=4, K=K), bias, "weight_only_linear")


def test_the_table_leads_4_bit_weights_and_int8_inputs_to_their_kernel(
    cuda_kernels: pytest.MonkeyPatch,
) -> None:
    for op_shape, M, taken in (
        (dispatch.OpShape(4, 32, 32), 64, True),
        (dispatch.OpShape(4, 128, 0), 1, True),
        (dispatch.OpShape(4, 32, 32), 65, False),
        (dispatch.OpShape(4, 48, 32), 1, False),
        (dispatch.OpShape(4, 32, 16), 1, False),
        (dispatch.OpShape(8, 32, 32), 1, False),
    ):
        kernel = dispatch.choose("weight_only_linear", "cuda", torch.float32, M, 33, 384, op_shape)
        assert (kernel.name == "weight_only_linear_cuda") == taken, (op_shape, M, kernel)


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


@pytest.mark.parametrize("dtype", [torch.int8, HALVES[1]], ids=str)
def test_bitmap_tiles_are_the_same_in_slices(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, K = 130, 200
    _, encoded, packed = sparse(N, K, 0.4, dtype)
    for weights in (1, 64 * K):  # a strip, two strips
        monkeypatch.setattr(bitmap_tiles, "_SLICE", weights)
        for found, expected in zip(bitmap_tiles.pack(*encoded, K), packed, strict=True):
            assert_equal(found, expected)
        for found, expected in zip(bitmap_tiles.unpack(*packed, N, K), encoded, strict=True):
            assert_equal(found, expected)


@pytest.mark.parametrize("M", [1, 9, 33])
@pytest.mark.parametrize(("N", "K", "density"), SPARSE)
def test_bitmap_sparse_linear_of_codes(M: int, N: int, K: int, density: float) -> None:
    values, encoded, packed = sparse(N, K, density, torch.int8)
    scale, bias = torch.rand(N, 1, generator=generator(2)), torch.randn(N)
    x = tokens(M, K, torch.bfloat16)
    y = torch.ops.llmq.cuda_bitmap_sparse_linear(x, *packed, scale, bias, 0)
    assert_equal(y, BitmapSparseLinear(x, *encoded, scale, bias, 0).reference())
    assert_equal(y, BitmapSparseLinear(x, *packed, scale, bias, 0).reference())
    if K % 32 == 0:
        y = torch.ops.llmq.cuda_bitmap_sparse_linear(x, *packed, scale, None, 32)
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
    y = torch.ops.llmq.cuda_bitmap_sparse_linear(x, *packed, scale, None, None)
    assert_product(y, x, values * scale, None, "int8 values")
    if N % 32 == 0:  # N is told by strips
        values, _, packed = sparse(N, K, density, dtype)
        y = torch.ops.llmq.cuda_bitmap_sparse_linear(x, *packed, None, None, None)
        assert_product(y, x, values, None, "float values")


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the table know of the emulated kernels."""
    monkeypatch.setattr(dispatch, "has_cuda", lambda op: hasattr(torch.ops.llmq, f"cuda_{op}"))
    monkeypatch.setattr(dispatch, "choose_gpu", dispatch.choose_gpu.__wrapped__)
    return monkeypatch


def sparse_layer(
    scheme: str | None = "w8a8",
    N: int = 70,
    K: int = 144,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> SparseLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(K, N, dtype=dtype)
    mask = torch.rand(N, K) < 0.4
    mask[3], linear.weight.data[5] = False, 0.0  # nothing kept; zeros kept
    return SparseLinear.from_linear(linear, scheme=scheme, mask=mask)


def hold_tiles(layer: SparseLinear, monkeypatch: pytest.MonkeyPatch) -> SparseLinear:
    """Return a copy that holds tiles, as layers of the CPU do from now on."""
    monkeypatch.setattr(dispatch, "keeps_tiles", lambda *layer: layer[-1].itemsize <= 2)
    held = copy.deepcopy(layer)
    assert held.weight_bitmask.dim() == 4 and held.weight.dim() == 1
    return held


@pytest.mark.parametrize("scheme", ["w8a8", None])
def test_layers_that_hold_tiles_are_canonical_to_the_outside(
    scheme: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"N": 64, "dtype": HALVES[1]} if scheme is None else {}
    wide = torch.float32 if scheme is None else torch.float64
    plain, other = sparse_layer(scheme, **kind), sparse_layer(scheme, seed=2, **kind)
    expected, of_other = plain.state_dict(), other.state_dict()
    layer = hold_tiles(plain, monkeypatch)
    assert layer.config() == plain.config() and layer.bytes() == plain.bytes()
    assert_equal(layer.mask(), plain.mask())
    assert_equal(layer.dequantize(), plain.dequantize())
    loaded = empty_layer(layer.config())
    loaded.load_state_dict(expected, assign=True)
    twins = {"copied": copy.deepcopy(layer), "pickled": pickle.loads(pickle.dumps(layer))}
    twins |= {"held": layer, "loaded": loaded, "moved": copy.deepcopy(layer).to("cpu")}
    twins["there and back"] = copy.deepcopy(layer).to(wide).to(plain.bias.dtype)
    for name, twin in twins.items():
        assert twin.weight_bitmask.dim() == 4, name
        assert twin.state_dict().keys() == expected.keys()
        for key, tensor in twin.state_dict().items():
            assert_equal(tensor, expected[key], f"{name}: {key}")
    layer.load_state_dict(of_other)  # another mask
    for key, tensor in layer.state_dict().items():
        assert_equal(tensor, of_other[key], key)
    monkeypatch.setattr(dispatch, "keeps_tiles", lambda *_: False)
    away = layer.to("cpu")  # where another layout runs
    assert away.weight_bitmask.dim() != 4 and (scheme is not None or away.op == "dense")
    for key, tensor in away.state_dict().items():
        assert_equal(tensor, of_other[key], key)


def test_tiles_are_held_where_a_kernel_reads_them(cuda_kernels: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    int8, half = torch.int8, torch.float16
    taken: list[tuple[str | None, int, int, float, torch.dtype]] = [
        *(("w8a8", 70, 144, 1.0, int8), ("w8a16", 70, 48, 0.5, int8)),
        *(("w8a8-g64", 70, 128, 0.5, int8), (None, 64, 40, 0.9, half)),
    ]
    refused: list[tuple[str | None, int, int, float, torch.dtype]] = [
        *(("w8a8", 70, 40, 0.5, int8), (None, 70, 128, 0.5, half), (None, 64, 36, 0.5, half)),
        *((None, 64, 128, 0.95, half), (None, 64, 128, 0.5, torch.float32)),
    ]
    for scheme, N, K, density, dtype in taken + refused:
        resolved = None if scheme is None else resolve_scheme(scheme)
        layer = (resolved, N, K, int(density * N * K), dtype)
        assert dispatch.keeps_tiles(cuda, *layer) == ((scheme, N, K, density, dtype) in taken), (
            layer
        )
        assert not dispatch.keeps_tiles(cpu, *layer)
    cuda_kernels.setattr(dispatch, "has_cuda", lambda op: False)  # Triton reads the canonical one
    assert not dispatch.keeps_tiles(cuda, resolve_scheme("w8a8"), 70, 144, 999, int8)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
@pytest.mark.parametrize("M", [1, 64, 65])
def test_the_table_leads_tiles_to_their_kernel_and_many_tokens_to_the_dense_one(
    M: int, scheme: str, cuda_kernels: pytest.MonkeyPatch
) -> None:
    plain = sparse_layer(scheme)
    layer = hold_tiles(plain, cuda_kernels)
    kernel = dispatch.choose(
        "bitmap_sparse_linear", "cuda", HALVES[0], M, 70, 144, layer._op_shape()
    )
    assert kernel.name == f"bitmap_sparse_linear_{'cuda' if M <= 64 else 'dense'}", kernel
    group = 0 if scheme == "w8a8" else None
    held = (layer._parameters[n] for n in ("weight", "weight_bitmask", "row_offsets"))
    x = tokens(M, 144, HALVES[0])
    call = BitmapSparseLinear(x, *held, layer.weight_scale, layer.bias, group)
    y = gpu.run("bitmap_sparse_linear", tuple(call), _no_reference, call.op_shape, call.check())
    if group == 0:
        assert_equal(y, call.reference())
    coded = x
    if group == 0:
        codes, x_scale = activation.quantize_activation(x)
        coded = codes.float() * x_scale
    assert_product(y, coded, plain.dequantize(), layer.bias, scheme)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("M", [1, 64, 65])
def test_tiles_of_floating_point_values_run_likewise(
    M: int, dtype: torch.dtype, cuda_kernels: pytest.MonkeyPatch
) -> None:
    plain = sparse_layer(None, N=64, dtype=dtype)
    layer = hold_tiles(plain, cuda_kernels)
    assert plain.op == "dense" and layer.op == "bitmap_sparse_linear"
    kernel = dispatch.choose(layer.op, "cuda", dtype, M, 64, 144, layer._op_shape())
    assert kernel.name == f"bitmap_sparse_linear_{'cuda' if M <= 64 else 'dense'}", kernel
    x = tokens(M, 144, dtype)
    held = (layer._parameters[n] for n in ("weight", "weight_bitmask", "row_offsets"))
    call = BitmapSparseLinear(x, *held, None, layer.bias, None)
    y = gpu.run("bitmap_sparse_linear", tuple(call), _no_reference, call.op_shape, call.check())
    assert_product(y, x, plain.dequantize(), layer.bias, "tiles")
    other = HALVES[dtype == HALVES[0]]
    with torch.autocast("cpu", dtype=other):  # to a type in which the kernel has no values
        assert_equal(layer(x), plain(x))
    with pytest.raises(RuntimeError, match="dtype"):  # as torch's own layer
        layer(x.to(other))


def test_what_the_kernel_of_tiles_refuses_runs_dense(cuda_kernels: pytest.MonkeyPatch) -> None:
    layer = hold_tiles(sparse_layer("w8a16"), cuda_kernels)
    op_shape = layer._op_shape()
    single = dispatch.choose("bitmap_sparse_linear", "cuda", torch.float32, 1, 70, 144, op_shape)
    assert single.name.endswith("_dense") and "float32" in single.reason
    values, _, packed = sparse(64, 96, 0.5, HALVES[0])
    x = tokens(65, 96, HALVES[0])
    call = BitmapSparseLinear(x, *packed)
    y = gpu.run("bitmap_sparse_linear", tuple(call), _no_reference, call.op_shape, call.check())
    assert_equal(y, nn.functional.linear(x, values))
    canonical = dispatch.OpShape(8, 0, 0)
    found = dispatch.choose("bitmap_sparse_linear", "cuda", HALVES[0], 65, 70, 144, canonical)
    assert not found.name.endswith(("_cuda", "_dense")), found


def _no_reference() -> None:
    raise AssertionError("the reference ran")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 3, 128), (65, 130, 256), (300, 129, 384)])
def test_semi_structured_linear(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    stored, scale = pairs(N, K)
    x = tokens(M, K + 8, dtype)[:, 8:].view(1, M, K)  # rows that are not contiguous
    bias = None if M == 1 else torch.randn(N, generator=generator(3))
    y = torch.ops.llmq.cuda_semi_structured_linear(x, *stored, scale, bias, 0)
    assert_equal(y, SemiStructuredLinear(x, *stored, scale, bias, 0).reference())


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
    stored, scale = pairs(4, 128)
    for K, group, message in ((128, 64, "one scale"), (128, None, "one scale"), (96, 0, "of 128")):
        with pytest.raises(ValueError, match=message):
            torch.ops.llmq.cuda_semi_structured_linear(
                torch.zeros(1, K), *stored, scale, None, group
            )
    x, weight = torch.zeros(1, 32), torch.zeros(4, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="8-bit weights must stay"):
        torch.ops.llmq.cuda_weight_only_linear(x, weight, scale, None, None, 8, 32)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        torch.ops.llmq.cuda_weight_only_linear(x, weight, scale, None, None, 8, None)
