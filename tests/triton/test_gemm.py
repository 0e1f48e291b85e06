"""Triton's dense GEMMs against the reference: int8 to the bit, floats within a formula."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.formats import codebook, uniform
from llmq.ops.dense import Int8Linear, WeightOnlyLinear
from tests.helpers import assert_equal, assert_within, generator
from tests.triton.device import DEVICE, GPU

int8_gemm = pytest.importorskip("llmq_kernels.int8_gemm")
weight_only_gemm = pytest.importorskip("llmq_kernels.weight_only_gemm")
codebook_gemm = pytest.importorskip("llmq_kernels.codebook_gemm")
configs = pytest.importorskip("llmq_kernels.configs")
Config = configs.Config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# M, N, K: one, odd, prime, one above and below a tile of 16 tokens, 32 outputs, 32 inputs; rows
# that do not begin on 16 bytes; several tiles in every direction.
SHAPES = (
    *((1, 1, 1), (1, 64, 64), (2, 17, 63), (15, 33, 65), (16, 31, 32), (17, 5, 7), (3, 70, 200)),
    *((33, 49, 129), (65, 130, 96)),
)
SMALL = Config(16, 32, 32, 4, 2)
TILES = {
    "small": SMALL,
    "splits": Config(16, 32, 32, 4, 2, SPLITS=3),
    "wide": Config(32, 64, 64, 4, 2, GROUP_M=2),
}


def tokens(M: int, K: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Signed x whose rows span four orders of magnitude."""
    g = generator(seed)
    return (torch.randn(M, K, generator=g) * 10 ** (torch.rand(M, 1, generator=g) * 4 - 2)).to(
        dtype
    )


def on_device(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.to(DEVICE) for t in tensors)


def codes_of(N: int, K: int) -> tuple[Tensor, Tensor]:
    weight = torch.randint(-127, 128, (N, K), generator=generator(1), dtype=torch.int8)
    return weight, torch.rand(N, 1, generator=generator(2)) * 0.1 + 1e-3


def check_product(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, what: str, loss: float = 0.0
) -> None:
    """Check y against x Wᵀ + bias, weight as it is decoded in float32.

    Errors of K independent float32 additions grow with √K (Higham & Mary, 2019, with λ = 4); 16
    more are for splits, groups, scales and bias; each up to 2⁻²³, as tensor cores cut off rather
    than round. y is rounded to its dtype once. `loss` is what each weight may be off. On a GPU,
    float32 inputs are three TF32 products: 2⁻²⁰ of each.
    """
    if GPU and x.dtype == torch.float32:
        loss += 2.0**-20
    exact, most = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, most = exact + bias.double(), most + bias.double().abs()
    unit = torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).tiny
    terms = math.sqrt(x.shape[1]) * 4 + 16
    assert_within(y.cpu(), exact, unit + (terms * 2.0**-23 + loss) * most, what)


# -- int8 activations ----------------------------------------------------------------------------


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_int8_equals_the_reference_to_the_bit(M: int, N: int, K: int, tile: str) -> None:
    dtype = DTYPES[(M + N) % 3]
    weight, scale = codes_of(N, K)
    x, bias = tokens(M, K, dtype), torch.randn(N, generator=generator(3)).to(DTYPES[N % 3])
    expected = Int8Linear(x, weight, scale, bias).reference()
    codes, x_scale = int8_gemm.quantize_activation(x.to(DEVICE))
    y = int8_gemm.int8_gemm(codes, x_scale, *on_device(weight, scale, bias), dtype, TILES[tile])
    assert_equal(y.cpu(), expected)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 32, 64), (17, 33, 48), (70, 65, 160)])
def test_int8_by_descriptors(M: int, N: int, K: int, splits: int) -> None:
    config = Config(16, 32, 32, 4, 2, SPLITS=splits, TMA=True)
    weight, scale = codes_of(N, K)
    x = tokens(M, K, torch.bfloat16)
    codes, x_scale = int8_gemm.quantize_activation(x.to(DEVICE))
    y = int8_gemm.int8_gemm(codes, x_scale, *on_device(weight, scale, None), x.dtype, config)
    assert_equal(y.cpu(), Int8Linear(x, weight, scale).reference())


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    ("M", "K", "group"), [(3, 96, 32), (17, 192, 64), (5, 96, 48), (4, 30, 5), (2, 8, 1)]
)
def test_int8_of_activation_groups(M: int, K: int, group: int, splits: int) -> None:
    N = 40
    weight, scale = codes_of(N, K)
    x, bias = tokens(M, K, torch.float32), torch.randn(N, generator=generator(3))
    codes, x_scale = int8_gemm.quantize_activation(x.to(DEVICE), group)
    config = configs.within_group(Config(16, 32, 64, 4, 2, SPLITS=splits), group)
    operands = on_device(weight, scale, None, bias)
    y = int8_gemm.grouped_int8_gemm(codes, x_scale, *operands, x.dtype, 8, config)
    if splits == 1 and group in (32, 64):  # a step is a group: the very same sums
        assert_equal(y.cpu(), Int8Linear(x, weight, scale, bias, group).reference())
    coded = (codes.cpu().float().unflatten(1, (-1, group)) * x_scale.cpu()[..., None]).flatten(1)
    check_product(y, coded, weight * scale, bias, f"{splits} splits")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize(
    ("M", "K", "group", "activations"),
    [(3, 128, 32, 32), (18, 192, 64, 0), (2, 96, 48, 96), (1, 60, 12, 20), (5, 65, 65, 0)],
)
def test_int8_inputs_of_weight_groups(
    M: int, K: int, group: int, activations: int, symmetric: bool, bits: int
) -> None:
    N = 37
    weight = torch.randn(N, K, generator=generator(1)) + 0.3
    encoded = uniform.encode(
        weight, bits=bits, granularity="group", group_size=group, symmetric=symmetric
    )
    x, bias = tokens(M, K, torch.float32), torch.randn(N, generator=generator(2))
    if activations and K // activations % (K // group) and K // group % (K // activations):
        activations = 0
    y = weight_only_gemm.weight_only_linear(
        *on_device(x, *encoded, bias), bits=bits, activation_group_size=activations
    )
    expected = WeightOnlyLinear(x, *encoded, bias, bits, activations).reference()
    magnitude = x.abs().double() @ uniform.decode(*encoded, bits=bits, K=K).abs().double().T
    # Up to K / 32 groups and bias are added in float32 by both; zero points outside their range of
    # codes enlarge the terms of neither. 127.5 / 127 is what coding adds to |x|.
    steps = K // min(group, activations or K) + K // 32 + 4
    tolerance = 2 * steps * 2.0**-23 * (magnitude * 1.01 + bias.abs())
    coded = 2.0**-23 * expected.abs()
    assert_within(y.cpu(), expected, tolerance + coded, f"{bits} bits")


# -- floating-point activations ------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_weight_only(M: int, N: int, K: int, tile: str, bits: int) -> None:
    dtype = DTYPES[(M + N + bits) % 3]
    weight = torch.randn(N, K, generator=generator(1))
    encoded = uniform.encode(weight, bits=bits, granularity="channel", symmetric=N % 2 == 0)
    x, bias = tokens(M, K, dtype), torch.randn(N, generator=generator(2)).to(dtype)
    y = weight_only_gemm.float_gemm(
        *on_device(x, *encoded, None, bias), bits=bits, config=TILES[tile]
    )
    check_product(y, x, uniform.decode(*encoded, bits=bits, K=K), bias, tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "K", "group"), [(8, 96, 32), (4, 192, 64), (4, 96, 48), (4, 40, 10)]
)
def test_weight_only_of_groups(bits: int, K: int, group: int, dtype: torch.dtype) -> None:
    M, N = 5, 70
    weight = torch.randn(N, K, generator=generator(1)) + 0.7  # so that zero points are not 0
    encoded = uniform.encode(
        weight, bits=bits, granularity="group", group_size=group, symmetric=False
    )
    x = tokens(M, K, dtype)
    y = weight_only_gemm.weight_only_linear(*on_device(x, *encoded), bits=bits)
    check_product(y, x, uniform.decode(*encoded, bits=bits, K=K), None, "groups")


@pytest.mark.parametrize("zero_point", [-128, -1, 0, 7, 127])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_converts_exactly(bits: int, dtype: torch.dtype, zero_point: int) -> None:
    N, K = 16, 32
    codes = torch.arange(N * K).view(N, K)
    codes = (codes % 256 - 128).to(torch.int8) if bits == 8 else uniform.pack_int4(codes % 16)
    scale, zero = torch.ones(N, 1), torch.full((N, 1), zero_point, dtype=torch.int8)
    weight = uniform.decode(codes, scale, zero, bits=bits, K=K)
    x = torch.eye(K, dtype=dtype)  # one input a token: y is the weight itself
    y = weight_only_gemm.weight_only_linear(*on_device(x, codes, scale, zero), bits=bits)
    assert_equal(y.cpu(), weight.T.to(dtype))


def _run_ptx(code: str, word: int) -> list[int]:
    """Run `and`, `shr` and `prmt` of 32 bits on $4 = word; return $0 … $3."""
    registers = {"$4": word}
    for opcode, target, *operands in re.findall(
        r"(\w+)\.[bu]32 (\S+), (\S+), (\w+)(?:, (\w+))?;", code
    ):
        a, b, *rest = (registers.get(o) if o in registers else int(o, 0) for o in operands if o)
        if opcode == "prmt":
            data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
            picked = bytes(data[rest[0] >> 4 * i & 7] for i in range(4))
            registers[target] = int.from_bytes(picked, "little")
        else:
            registers[target] = {"and": a & b, "shr": a >> b}[opcode]
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize(
    ("code", "dtype", "offset"), [("_BFLOAT16", DTYPES[1], 128), ("_FLOAT16", DTYPES[2], 1024)]
)
def test_ptx_makes_floats_of_nibbles(code: str, dtype: torch.dtype, offset: int) -> None:
    """The interpreter runs plain operations in its place, so its words are run here."""
    data = torch.randint(0, 256, (64, 4), generator=generator(1), dtype=torch.uint8)
    for four in data:
        word = int.from_bytes(bytes(four.tolist()), "little")
        words = _run_ptx(getattr(weight_only_gemm, code).value, word)
        halves = [word >> 16 * i & 0xFFFF for word in words for i in range(2)]
        values = torch.tensor(halves, dtype=torch.uint16).view(torch.int16).view(dtype)
        expected = torch.cat((four & 15, four >> 4)).float() + offset
        assert_equal(values.float(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "K", "group"), [(8, 65, None), (4, 96, 32), (4, 63, None)])
def test_codebook(bits: int, K: int, group: int | None, dtype: torch.dtype) -> None:
    M, N = 6, 35
    weight = torch.randn(N, K, generator=generator(1))
    granularity = "channel" if group is None else "group"
    encoded = codebook.encode(weight, bits=bits, granularity=granularity, group_size=group)
    x, bias = tokens(M, K, dtype), torch.randn(N, generator=generator(2))
    decoded = codebook.decode(*encoded, bits=bits, K=K)
    # Levels are rounded to x's dtype.
    loss = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    y = codebook_gemm.codebook_linear(*on_device(x, *encoded, bias), bits=bits)
    check_product(y, x, decoded, bias, "one codebook", loss)
    own = encoded.weight_codebook * torch.linspace(0.5, 2, N)[:, None]
    decoded = codebook.decode(encoded.weight, own, encoded.weight_scale, bits=bits, K=K)
    y = codebook_gemm.codebook_linear(
        *on_device(x, encoded.weight, own, encoded.weight_scale), bits=bits
    )
    check_product(y, x, decoded, None, "a codebook for each output", loss)


def test_reads_x_as_it_lies() -> None:
    N, K = 20, 64
    weight, scale = codes_of(N, K)
    x = torch.randn(2, 6, 2 * K, generator=generator(1))
    square = torch.randn(K, K, generator=generator(2))
    arguments: Any = on_device(weight, scale)
    for view in (
        x[..., :K],
        x[..., ::2],
        x[:, :1, :K].expand(2, 6, K),
        square.T,
        x[0, 0, 3 : K + 3],
    ):
        y = int8_gemm.int8_linear(view.to(DEVICE), *arguments)
        assert_equal(y.cpu(), Int8Linear(view, weight, scale).reference())
        y = weight_only_gemm.weight_only_linear(view.to(DEVICE), *arguments)
        flat = view.reshape(-1, K)
        check_product(y.reshape(-1, N), flat, weight * scale, None, str(view.stride()))
