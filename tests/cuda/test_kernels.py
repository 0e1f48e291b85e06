"""CUDA kernels, run by the emulator, against the reference: integers exact, floats within bounds.

The emulator turns what would be luck on a GPU into an error (tests/cuda/test_emulator.py).
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from llmq.formats import activation, bitmap, bitmap_tiles, semi_structured, uniform
from llmq.ops.dense import Int8Linear
from llmq.ops.sparse import SemiStructuredLinear
from tests.cuda_emulator import emulator
from tests.helpers import assert_equal, assert_within, generator

HALVES = (torch.float16, torch.bfloat16)
# M, N, K: one, odd, prime, one below and above a tile of 8 tokens, 16 and 128 outputs, 128 and 256
# inputs. Rows begin on 16 bytes: K is a multiple of 16, and of 32 with 4 bits.
SHAPES = (
    *((1, 1, 32), (1, 16, 128), (2, 17, 96), (7, 31, 160), (8, 33, 256), (9, 127, 288)),
    *((16, 129, 224), (17, 5, 544), (31, 64, 192), (33, 49, 128), (64, 16, 800), (65, 3, 32)),
)


def tokens(M: int, K: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Signed x whose rows span four orders of magnitude."""
    g = generator(seed)
    return (torch.randn(M, K, generator=g) * 10 ** (torch.rand(M, 1, generator=g) * 4 - 2)).to(
        dtype
    )


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, what: str) -> None:
    """Check y against x Wᵀ + bias.

    y is rounded to its dtype once, and may fall to the other side of a tie: one unit, eps · |y|.
    Sums have at most K + 64 terms (warps, slices, groups), each rounded to float32 once, or cut
    off, as tensor cores do: 2⁻²³ of all that was added.
    """
    exact, most = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, most = exact + bias.double(), most + bias.double().abs()
    unit = torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).tiny
    assert_within(y, exact, unit + (x.shape[1] + 64) * 2.0**-23 * most, what)


def assert_streams(counters: emulator.Counters, row_bytes: int) -> None:
    """Check that weights came in full sectors and that no lane waited for a bank."""
    assert counters.weight_ideal_sectors > 0
    if row_bytes % 32 == 0:  # else rows begin within a sector
        assert counters.weight_sectors == counters.weight_ideal_sectors, "sectors read in part"
    assert counters.shared_wavefronts == counters.shared_ideal_wavefronts, "bank conflicts"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_weight_only(M: int, N: int, K: int, bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K, generator=generator(1))
    encoded = uniform.encode(weight, bits=bits, granularity="channel")
    x, bias = tokens(M, K, dtype), torch.randn(N, generator=generator(2)).to(dtype)
    memory = {"weight": encoded.weight, "scale": encoded.weight_scale}
    y, counters = emulator.small_gemm(
        *("run_weight_only", x, {**memory, "bias": bias}, bits),
        N=N,
        K=K,
        dtype=dtype,
    )
    assert_product(y, x, uniform.decode(*encoded, bits=bits, K=K), bias, "weight_only")
    assert_streams(counters, K * bits // 8)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("bits", "K", "group"),
    [
        *((8, 512, 32), (8, 384, 96), (8, 1024, 64), (4, 512, 32), (4, 1280, 128), (4, 96, 32)),
        *((8, 768, 256), (4, 1152, 384)),  # slices begin inside of a group; a half-filled chunk
        # Groups whose scales are read four or two at once, to the end of a chunk or not; too few.
        *((4, 1152, 32), (4, 1280, 64), (4, 1152, 64), (4, 768, 128), (4, 640, 128)),
    ],
)
def test_weight_only_of_groups_and_zero_points_in_slices(
    bits: int, K: int, group: int, dtype: torch.dtype, splits: int
) -> None:
    M, N = 5, 140
    weight = torch.randn(N, K, generator=generator(1)) + 0.7  # so that zero points are not 0
    encoded = uniform.encode(
        weight, bits=bits, granularity="group", group_size=group, symmetric=False
    )
    assert encoded.weight_zero_point is not None and encoded.weight_zero_point.unique().numel() > 2
    x = tokens(M, K, dtype)
    memory = {"weight": encoded.weight, "scale": encoded.weight_scale}
    memory["zero_point"] = encoded.weight_zero_point
    results = [
        emulator.small_gemm(
            *("run_weight_only", x, memory, bits),
            N=N,
            K=K,
            dtype=dtype,
            splits=splits,
            seed=seed,
        )[0]
        for seed in (1, 2)
    ]
    assert_product(results[0], x, uniform.decode(*encoded, bits=bits, K=K), None, "weight_only")
    assert_equal(results[1], results[0], "with blocks in another order")


@pytest.mark.parametrize("zero_point", [-128, -1, 0, 7, 127])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_converts_exactly(bits: int, dtype: torch.dtype, zero_point: int) -> None:
    N, K = 16, 64
    codes = torch.arange(N * K).view(N, K)
    codes = (codes % 256 - 128).to(torch.int8) if bits == 8 else uniform.pack_int4(codes % 16)
    memory = {"weight": codes, "scale": torch.ones(N, 1)}
    memory["zero_point"] = torch.full((N, 1), zero_point, dtype=torch.int8)
    weight = uniform.decode(codes, memory["scale"], memory["zero_point"], bits=bits, K=K)
    for k in range(0, K, 8):  # one input a token: y is the weight itself
        y, _ = emulator.small_gemm(
            *("run_weight_only", torch.eye(K, dtype=dtype)[k : k + 8].contiguous(), memory, bits),
            N=N,
            K=K,
            dtype=dtype,
        )
        assert_equal(y, weight.T[k : k + 8].to(dtype), f"inputs {k} … {k + 7}")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("group", [0, 1, 32])
def test_quantize_equals_the_reference(group: int, dtype: torch.dtype) -> None:
    x = tokens(6, 224, dtype)
    x[1], x[2, 5], x[3, 40], x[4] = 0, float("inf"), float("nan"), 1e-38
    codes, scale = emulator.quantize(x, group)
    expected = activation.quantize_activation(x, group)
    assert_equal(codes, expected[0], "codes")
    assert_equal(scale, expected[1], "scale")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("given", [0.01, 1.0, 1e-20, 3e38, 1e-31, 0.0, -1.0, torch.inf, torch.nan])
def test_quantize_on_a_given_scale_equals_the_reference(given: float, dtype: torch.dtype) -> None:
    x = tokens(6, 224, dtype)
    x[1], x[2, 5], x[3, 40], x[4] = 0, float("inf"), float("nan"), 1e-38
    scale = torch.tensor([given])
    found = emulator.quantize(x, 0, scale)
    for y, expected in zip(found, activation.quantize_activation(x, 0, scale), strict=True):
        assert_equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_int8_equals_the_reference_to_the_bit(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    weight = torch.randint(-127, 128, (N, K), generator=generator(1), dtype=torch.int8)
    scale = torch.rand(N, 1, generator=generator(2)) + 0.1
    x, bias = tokens(M, K, dtype), torch.randn(N, generator=generator(3))
    codes, x_scale = emulator.quantize(x)
    memory = {"weight": weight, "scale": scale, "x_scale": x_scale, "bias": bias}
    expected = Int8Linear(x, weight, scale, bias).reference()
    for splits in (1, 3):
        y, counters = emulator.small_gemm(
            *("run_int8", codes, memory),
            N=N,
            K=K,
            dtype=dtype,
            splits=splits,
        )
        assert_equal(y, expected, f"{splits} splits")
        assert_streams(counters, K)


@pytest.mark.parametrize(("K", "group"), [(320, 32), (192, 64), (384, 96), (512, 128), (768, 384)])
@pytest.mark.parametrize("M", [3, 13, 32, 40])
def test_int8_of_activation_groups(M: int, K: int, group: int) -> None:
    N = 40
    weight = torch.randint(-127, 128, (N, K), generator=generator(1), dtype=torch.int8)
    scale, x = torch.rand(N, 1, generator=generator(2)) + 0.1, tokens(M, K, torch.float32)
    codes, x_scale = emulator.quantize(x, group)
    memory = {"weight": weight, "scale": scale, "x_scale": x_scale}
    coded = codes.float() * x_scale.repeat_interleave(group, 1)
    for splits in (1, 2):
        y, _ = emulator.small_gemm(
            *("run_int8", codes, memory),
            N=N,
            K=K,
            dtype=torch.float32,
            splits=splits,
        )
        assert_product(y, coded, weight * scale, None, f"{splits} splits")


def sparse(N: int, K: int, density: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a sparse weight [N, K], rows as dense as `density` [N, 1] says, and its tiles."""
    mask = torch.rand(N, K, generator=generator(4)) < density
    values = torch.randint(-127, 128, (N, K), generator=generator(5)).to(dtype) * mask.to(dtype)
    if dtype.is_floating_point:
        values /= 128  # so that float16 holds the products
    packed = bitmap_tiles.pack(*bitmap.encode(values, mask), K)
    return values, dict(zip(("weight", "bitmask", "offsets"), packed, strict=True))


# N, K: one strip, two of which one is partial, strips of two blocks; one chunk of int8 or two of 16
# bits, a partial one, more than stages.
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kept", ["none", "all", "half", "uneven"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 32, 128), (9, 33, 144), (17, 140, 1040)])
def test_bitmap_touches_its_own_memory_and_equals_the_reference(
    M: int, N: int, K: int, kept: str, splits: int
) -> None:
    density = {"none": torch.zeros(N, 1), "all": torch.ones(N, 1), "half": torch.full((N, 1), 0.5)}
    density["uneven"] = torch.rand(N, 1, generator=generator(6)).round(decimals=1)
    scale, x = torch.rand(N, 1, generator=generator(2)) / 128, tokens(M, K, torch.float32)
    codes, x_scale = emulator.quantize(x)
    values, memory = sparse(N, K, density[kept], torch.int8)
    memory |= {"scale": scale, "x_scale": x_scale}
    shape = {"N": N, "K": K, "splits": splits}
    y, _ = emulator.small_gemm(
        *("run_bitmap", codes, memory, 1, True), dtype=torch.float32, **shape
    )
    assert_equal(y, Int8Linear(x, values, scale).reference())
    for dtype in HALVES:
        x = tokens(M, K, dtype)
        memory.pop("x_scale", None)
        y, _ = emulator.small_gemm(*("run_bitmap", x, memory, 1, False), dtype=dtype, **shape)
        assert_product(y, x, values * scale, None, f"int8 values, {dtype}")
        floats, float_memory = sparse(N, K, density[kept], dtype)
        y, _ = emulator.small_gemm(*("run_bitmap", x, float_memory, 2, False), dtype=dtype, **shape)
        assert_product(y, x, floats, None, str(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K"), [(32, 128), (33, 20), (140, 272)])
def test_bitmap_expands_within_its_memory(N: int, K: int, dtype: torch.dtype) -> None:
    values, memory = sparse(N, K, torch.rand(N, 1, generator=generator(6)), dtype)
    memory["y"] = torch.full((N, K), 77, dtype=dtype)
    fields = {key: tensor.data_ptr() for key, tensor in memory.items()}
    g = emulator.SmallGemm(**fields, N=N, K=K)
    arguments = ("run_bitmap_expand", ctypes.byref(g), dtype.itemsize)
    emulator.launch(emulator.library(), *arguments, memory=memory)
    assert_equal(memory["y"], values)


@pytest.mark.parametrize("value", [torch.int8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_lanes_of_bitmap_wait_for_a_bank_once_at_most_on_average(
    density: float, value: torch.dtype
) -> None:
    N, K = 128, 2048
    _, memory = sparse(N, K, torch.full((N, 1), density), value)
    codes = value == torch.int8
    if codes:
        x = torch.ones(8, K, dtype=torch.int8)
        memory |= {"scale": torch.ones(N, 1), "x_scale": torch.ones(8, 1)}
    else:
        x = torch.ones(8, K, dtype=value)
    _, counters = emulator.small_gemm(
        *("run_bitmap", x, memory, value.itemsize, codes),
        N=N,
        K=K,
        dtype=torch.bfloat16,
    )
    assert counters.shared_wavefronts <= 2 * counters.shared_ideal_wavefronts


@pytest.mark.parametrize(
    ("K", "group", "x_group"),
    [
        *((384, 32, 32), (320, 64, 64), (1280, 64, 64), (768, 128, 128), (640, 128, 128)),
        *((512, 32, 128), (768, 96, 32), (288, 32, 0), (256, 0, 64), (160, 0, 0), (1024, 256, 512)),
    ],
)
@pytest.mark.parametrize("M", [1, 13, 40])
def test_int4_of_codes(M: int, K: int, group: int, x_group: int) -> None:
    N = 140
    weight = torch.randn(N, K, generator=generator(1)) + 0.7  # so that zero points are not 8
    granularity = {"granularity": "group", "group_size": group} if group else {}
    encoded = uniform.encode(
        weight, bits=4, symmetric=False, **(granularity or {"granularity": "channel"})
    )
    x, bias = tokens(M, K, torch.float32), torch.randn(N, generator=generator(3))
    codes, x_scale = emulator.quantize(x, x_group)
    memory = {"weight": encoded.weight, "scale": encoded.weight_scale, "x_scale": x_scale}
    memory |= {"zero_point": encoded.weight_zero_point, "bias": bias}
    coded = codes.float() * x_scale.repeat_interleave(x_group or K, 1)
    decoded = uniform.decode(*encoded, bits=4, K=K)
    for splits in (1, 3):
        y, counters = emulator.small_gemm(
            *("run_int4_of_codes", codes, memory),
            N=N,
            K=K,
            dtype=torch.float32,
            splits=splits,
        )
        assert_product(y, coded, decoded, bias, f"{splits} splits")
        assert_streams(counters, K // 2)


@pytest.mark.parametrize("zero_point", [-128, 0, 8, 127])
def test_int4_of_codes_is_exact_within_a_group(zero_point: int) -> None:
    M, N, K, ones = 9, 17, 128, torch.ones
    codes = torch.randint(-127, 128, (M, K), generator=generator(1), dtype=torch.int8)
    nibbles = torch.randint(0, 16, (N, K), generator=generator(2), dtype=torch.uint8)
    memory = {"weight": uniform.pack_int4(nibbles), "scale": ones(N, 1), "x_scale": ones(M, 1)}
    memory["zero_point"] = torch.full((N, 1), zero_point, dtype=torch.int8)
    y, _ = emulator.small_gemm("run_int4_of_codes", codes, memory, N=N, K=K, dtype=torch.float32)
    assert_equal(y, (codes.int() @ (nibbles.int() - zero_point).T).float())


def test_two_chunks_of_weights_are_on_their_way_while_one_is_multiplied() -> None:
    M, N, K = 8, 128, 768
    memory = {"weight": torch.zeros(N, K, dtype=torch.int8), "scale": torch.ones(N, 1)}
    memory["x_scale"] = torch.ones(M, 1)
    codes = torch.zeros(M, K, dtype=torch.int8)
    _, counters = emulator.small_gemm("run_int8", codes, memory, N=N, K=K, dtype=torch.float32)
    assert counters.bytes_in_flight == 2 * N * 128
    assert counters.shared_bytes == 3 * (N + M) * 128


def pairs(N: int, K: int, seed: int = 1) -> tuple[semi_structured.SemiStructuredWeight, Tensor]:
    """Return a 2:4 sparse int8 weight, every place of a pair in it, and its scale [N, 1]."""
    g = generator(seed)
    values = torch.randint(-127, 128, (N, K), generator=g, dtype=torch.int8)
    ranks = torch.rand(N, K // 4, 4, generator=g).argsort(-1).argsort(-1)
    stored = semi_structured.encode(values, (ranks < 2).flatten(1))
    return stored, torch.rand(N, 1, generator=g) + 0.1


# One, odd, prime; one below and above a tile of 8 tokens and 16 outputs, and blocks of 64, 128 and
# 192 tokens, 128 and 256 outputs; one chunk of 128 inputs, fewer chunks than stages, and more.
SPARSE_SHAPES = (
    *((1, 1, 128), (7, 17, 256), (63, 127, 384), (64, 128, 512), (65, 129, 640)),
    *((127, 5, 128), (128, 16, 896), (129, 257, 128), (191, 255, 256), (193, 31, 384)),
)
SPARSE_PLANS = range(6)


@pytest.mark.parametrize("plan", SPARSE_PLANS)
@pytest.mark.parametrize(("M", "N", "K"), SPARSE_SHAPES)
def test_semi_structured_equals_the_reference_to_the_bit(M: int, N: int, K: int, plan: int) -> None:
    stored, scale = pairs(N, K)
    dtype = (torch.float32, *HALVES)[M % 3]
    x, bias = tokens(M, K, dtype), torch.randn(N, generator=generator(3)).to(dtype)
    codes, x_scale = emulator.quantize(x)
    memory = {"weight": stored.weight, "meta": stored.weight_meta, "scale": scale}
    memory |= {"x_scale": x_scale, "bias": bias}
    y, counters = emulator.semi_structured(codes, memory, dtype=dtype, plan=plan)
    assert_equal(y, SemiStructuredLinear(x, *stored, scale, bias, 0).reference())
    assert_streams(counters, K // 2)


def test_semi_structured_takes_every_pair_of_places_and_fewer_values_than_two() -> None:
    N, K = 16, 128
    stored, scale = pairs(N, K)
    nibbles = torch.stack((stored.weight_meta & 15, stored.weight_meta >> 4)).unique()
    assert nibbles.tolist() == [4, 8, 9, 12, 13, 14]
    few = torch.zeros(N, K, dtype=torch.int8)
    few[torch.arange(N), 5 * torch.arange(N)] = 3  # one of four, at any place; else none
    for weight in (stored, semi_structured.encode(few)):
        memory = {"weight": weight.weight, "meta": weight.weight_meta, "scale": scale}
        memory["x_scale"] = torch.ones(K, 1)
        codes = torch.eye(K, dtype=torch.int8)  # one input a token: y is the weight itself
        y, _ = emulator.semi_structured(codes, memory, dtype=torch.float32, plan=0)
        assert_equal(y, (semi_structured.decode(*weight, K) * scale).T.contiguous())


def test_places_that_do_not_ascend_are_an_error_of_the_emulator() -> None:
    stored, scale = pairs(16, 128)
    meta = stored.weight_meta.clone()
    meta[11, 9] = meta[11, 9] & 15 | 1 << 4  # places 1, 0
    memory = {"weight": stored.weight, "meta": meta, "scale": scale}
    memory["x_scale"] = torch.ones(2, 1)
    codes = torch.ones(2, 128, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="metadata does not ascend"):
        emulator.semi_structured(codes, memory, dtype=torch.float32, plan=0)


# Multiprocessors, shared memory of a block in KB, wgmma; the plan for many tokens, whose mma take
# the fewest cycles of shared memory.
SPARSE_DEVICES = {
    "A100": (108, 163, False, 4),
    "H100": (132, 227, True, 5),
    "H100, nothing compiled for it": (132, 227, False, 4),
    "L40S": (142, 99, False, 2),
}


@pytest.mark.parametrize("name", SPARSE_DEVICES)
def test_plans_fill_the_device_and_fit_it(name: str) -> None:
    multiprocessors, kilobytes, wgmma, most = SPARSE_DEVICES[name]
    loaded = emulator.library()
    assert loaded.sparse_plans() == len(SPARSE_PLANS), "plans that are not tested"

    def choose(M: int, N: int) -> int:
        int64 = ctypes.c_int64
        return loaded.choose_plan(int64(M), int64(N), multiprocessors, kilobytes * 1024, wgmma)

    assert choose(64, 4096) == choose(1, 1) == 0, "the smallest, where it has blocks too few"
    for M in (64, 200, 2048, 65536):
        for N in (128, 4096, 11008):
            assert loaded.sparse_plan_bytes(choose(M, N)) <= kilobytes * 1024, (M, N)
    assert choose(65536, 11008) == most
