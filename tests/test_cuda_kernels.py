"""CUDA kernels, run by the emulator, against the reference: integers exact, floats within bounds.

The emulator turns what would be luck on a GPU into an error (tests/test_cuda_emulator.py).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmq import ops
from llmq.formats import activation, tiles, uniform
from tests.cuda_emulator import emulator
from tests.helpers import assert_equal, assert_within, generator

HALVES = (torch.float16, torch.bfloat16)
OUTPUTS = {8: 32, 4: 64}  # of a block of the dense kernels, by bits
# M, N, K: one, odd, prime, one below and above a tile of 8 tokens, 16 outputs, 64 inputs; K that is
# and is not a multiple of 8, whose rows do not begin on 16 bytes.
SHAPES = (
    *((1, 1, 1), (1, 16, 64), (2, 17, 63), (7, 31, 65), (8, 33, 128), (9, 65, 72), (16, 15, 200)),
    *((17, 5, 7), (31, 64, 192), (33, 49, 136), (64, 16, 320)),
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


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 64), (17, 65), (33, 7), (64, 192), (0, 64)])
def test_tiles_hold_every_code_once(bits: int, N: int, K: int) -> None:
    codes = torch.randint(-128, 128, (N, K), generator=generator(1), dtype=torch.int8)
    weight = codes if bits == 8 else uniform.pack_int4(codes & 15)
    packed = tiles.pack(weight, bits, K)
    assert packed.shape == (-(-N // 16), -(-K // 64), bits // 4, 32, 16)
    assert_equal(tiles.unpack(packed, bits, N, K), weight)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_weight_only(M: int, N: int, K: int, bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(N, K, generator=generator(1))
    encoded = uniform.encode(weight, bits=bits, granularity="channel")
    x, bias = tokens(M, K, dtype), torch.randn(N, generator=generator(2)).to(dtype)
    memory = {"weight": tiles.pack(encoded.weight, bits, K), "scale": encoded.weight_scale}
    y, counters = emulator.small_gemm(
        *("run_weight_only", x, {**memory, "bias": bias}, bits),
        N=N,
        K=K,
        dtype=dtype,
        outputs=OUTPUTS[bits],
    )
    assert_product(y, x, uniform.decode(*encoded, bits=bits, K=K), bias, "weight_only")
    assert counters.shared_wavefronts == counters.shared_ideal_wavefronts, "bank conflicts"


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("bits", "K", "group"), [(8, 320, 32), (8, 192, 96), (4, 320, 32), (4, 640, 128), (4, 96, 32)]
)
def test_weight_only_of_groups_and_zero_points_in_slices(
    bits: int, K: int, group: int, dtype: torch.dtype, splits: int
) -> None:
    M, N = 5, 70
    weight = torch.randn(N, K, generator=generator(1)) + 0.7  # so that zero points are not 0
    encoded = uniform.encode(
        weight, bits=bits, granularity="group", group_size=group, symmetric=False
    )
    assert encoded.weight_zero_point is not None and encoded.weight_zero_point.unique().numel() > 2
    x = tokens(M, K, dtype)
    memory = {"weight": tiles.pack(encoded.weight, bits, K), "scale": encoded.weight_scale}
    memory["zero_point"] = encoded.weight_zero_point
    results = [
        emulator.small_gemm(
            *("run_weight_only", x, memory, bits),
            N=N,
            K=K,
            dtype=dtype,
            outputs=OUTPUTS[bits],
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
    memory = {"weight": tiles.pack(codes, bits, K), "scale": torch.ones(N, 1)}
    memory["zero_point"] = torch.full((N, 1), zero_point, dtype=torch.int8)
    weight = uniform.decode(codes, memory["scale"], memory["zero_point"], bits=bits, K=K)
    for k in range(0, K, 8):  # one input a token: y is the weight itself
        y, _ = emulator.small_gemm(
            *("run_weight_only", torch.eye(K, dtype=dtype)[k : k + 8].contiguous(), memory, bits),
            N=N,
            K=K,
            dtype=dtype,
            outputs=OUTPUTS[bits],
        )
        assert_equal(y, weight.T[k : k + 8].to(dtype), f"inputs {k} … {k + 7}")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("group", [0, 1, 32])
def test_quantize_equals_the_reference(group: int, dtype: torch.dtype) -> None:
    x = tokens(6, 224, dtype)
    x[1], x[2, 5], x[3, 40], x[4] = 0, float("inf"), float("nan"), 1e-38
    codes, scale = emulator.quantize(x, group)
    expected = activation.quantize_activation(x, group)
    assert_equal(codes[:, :224].contiguous(), expected[0], "codes")
    assert not codes[:, 224:].any(), "codes past K are not zero"
    assert_equal(scale, expected[1], "scale")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("M", "N", "K"), [s for s in SHAPES if s[0] <= 33])
def test_int8_equals_the_reference_to_the_bit(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    weight = torch.randint(-127, 128, (N, K), generator=generator(1), dtype=torch.int8)
    scale = torch.rand(N, 1, generator=generator(2)) + 0.1
    x, bias = tokens(M, K, dtype), torch.randn(N, generator=generator(3))
    codes, x_scale = emulator.quantize(x)
    memory = {"weight": tiles.pack(weight, 8, K), "scale": scale, "x_scale": x_scale, "bias": bias}
    expected = ops._Int8Linear(x, weight, scale, bias).reference()
    for splits in (1, 3):
        y, counters = emulator.small_gemm(
            *("run_int8", codes, memory),
            N=N,
            K=K,
            dtype=dtype,
            outputs=32,
            splits=splits,
        )
        assert_equal(y, expected, f"{splits} splits")
        assert counters.shared_wavefronts == counters.shared_ideal_wavefronts, "bank conflicts"


@pytest.mark.parametrize(("K", "group"), [(320, 32), (192, 64), (192, 96)])
@pytest.mark.parametrize("M", [3, 13, 32])
def test_int8_of_activation_groups(M: int, K: int, group: int) -> None:
    N = 40
    weight = torch.randint(-127, 128, (N, K), generator=generator(1), dtype=torch.int8)
    scale, x = torch.rand(N, 1, generator=generator(2)) + 0.1, tokens(M, K, torch.float32)
    codes, x_scale = emulator.quantize(x, group)
    memory = {"weight": tiles.pack(weight, 8, K), "scale": scale, "x_scale": x_scale}
    coded = codes[:, :K].float() * x_scale.repeat_interleave(group, 1)
    for splits in (1, 2):
        y, _ = emulator.small_gemm(
            *("run_int8", codes, memory),
            N=N,
            K=K,
            dtype=torch.float32,
            outputs=32,
            splits=splits,
        )
        assert_product(y, coded, weight * scale, None, f"{splits} splits")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
def test_compiles_without_warnings_spills_or_local_memory(arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to compile the CUDA kernels with")
    sources = sorted(emulator.CUDA.glob("*.cu"))
    flags = ["-std=c++20", "-O3", f"-arch={arch}", "-Xptxas=-v", "-Werror=all-warnings", "-c"]
    for source in sources:
        target = str(tmp_path / f"{source.stem}.o")
        command = [nvcc, *flags, str(source), "-o", target]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        usage = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", result.stderr)
        assert usage and all(size == "0" for size, _ in usage), f"{source.name}: {usage}"
