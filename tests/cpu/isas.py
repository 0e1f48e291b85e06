"""What tests of native kernels share: instruction sets, shapes, references, tolerances."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import llmq.ops  # noqa: F401  defines torch.ops.llmq
from llmq.formats import activation
from llmq.runtime import extension

X86_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    | {"avx512_vnni", "avx512vbmi", "avx512_vbmi2"},
}
ARM_FLAGS = {"neondot": {"asimddp"}, "i8mm": {"asimddp", "i8mm"}}
ARM = platform.machine().lower() in ("aarch64", "arm64")
ISA_FLAGS: dict[str, set[str]] = {"portable": set()} | (ARM_FLAGS if ARM else X86_FLAGS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# M, N, K, weight group (None: the whole row) of grouped weights. One above and below a tile of 12
# rows (4 tokens of 3 digits), a panel of 16 outputs, blocks of 4 and 8 inputs, 256 inputs that are
# dequantized or split at a time, a pass of 80 or 240 tokens; primes; groups that end in a block.
GROUPED_SHAPES = (
    (0, 16, 8, None),
    (3, 0, 8, None),
    (3, 5, 0, None),
    (1, 1, 1, None),
    (1, 16, 8, None),
    (1, 15, 3, None),
    (2, 15, 3, None),
    (3, 17, 5, 5),
    (4, 16, 7, None),
    (5, 33, 9, 3),
    (11, 16, 64, 8),
    (12, 31, 96, 32),
    (13, 48, 60, 12),
    (1, 20, 30, 6),
    (7, 20, 30, 6),
    (2, 18, 40, 20),
    (1, 37, 257, None),
    (1, 100, 576, 32),
    (6, 16, 255, 51),
    (25, 19, 256, 128),
    (2, 20, 600, 300),
    (3, 64, 1032, 516),
    (81, 20, 101, None),
    (241, 35, 128, 64),
    (9, 16, 4096, None),
)


def available() -> list[str]:
    """The instruction sets that this CPU has, whether or not the library runs them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    start = ("flags", "Features")  # x86, Arm
    flags = next((set(line.split()) for line in lines if line.startswith(start)), set())
    return [name for name, needed in ISA_FLAGS.items() if needed <= flags]


def each_isa() -> Iterator[str]:
    """Run on each instruction set of this CPU in turn; raises if the library does not have one."""
    assert extension.load().loaded, extension.load().error
    before = torch.ops.llmq.cpu_isa()
    try:
        for name in available():
            torch.ops.llmq.set_cpu_isa(name)
            assert torch.ops.llmq.cpu_isa() == name
            yield name
    finally:
        torch.ops.llmq.set_cpu_isa(before)


def int8_product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: int,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [..., N] of int8 activations in float64, and how far kernels may be off.

    Dots of the reference's codes are exact. Float32 rounds each group's dot, its product with
    x_scale and its addition, then the products and sums with weight_scale and bias: G + 4 roundings
    of values no larger than the sum of the magnitudes.
    """
    K, N = x.shape[-1], weight.shape[0]
    rows = torch.atleast_2d(x).flatten(0, -2)
    codes, x_scale = activation.quantize_activation(rows, group, given)
    G = x_scale.shape[1]
    exact = torch.einsum(
        "mgk,ngk->mgn",
        codes.double().reshape(codes.shape[0], G, K // G),
        weight.double().reshape(N, G, K // G),
    )
    terms = exact * x_scale.double()[:, :, None] * scale.double()[:, 0]
    shift = torch.zeros(N) if bias is None else bias.double()
    expected = terms.sum(1) + shift
    tolerance = (G + 4) * 2**-24 * (terms.abs().sum(1) + shift.abs())
    tolerance = stored_tolerance(tolerance, expected, x.dtype)
    return tuple(t.reshape(*x.shape[:-1], N) for t in (expected, tolerance))


def float_tolerance(x: Tensor, weight: Tensor, bias: Tensor | None, expected: Tensor) -> Tensor:
    """How far y = x Wᵀ + bias, accumulated in float32 and stored in x's dtype, may be off.

    Each product is rounded when the weight is scaled, when it is added and when its sum is: errors
    of K independent additions grow with √K (Higham & Mary, 2019, with λ = 4), and 8 more roundings
    are for scales, chains and bias. Where x is split into integers, an input is off by half a unit,
    2⁻²⁴ of the largest input in its run; 2⁻²³ of the row's bounds that and its two lost ties.
    """
    K = x.shape[-1]
    absolute = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        absolute += bias.double().abs()
    largest = x.double().abs().amax(-1, keepdim=True) if K else x.double().new_zeros(len(x), 1)
    split = 2**-23 * largest * weight.double().norm(dim=-1)
    tolerance = (4 * math.sqrt(K) + 8) * 2**-24 * absolute + split + 2**-126
    return stored_tolerance(tolerance, expected, x.dtype)


def stored_tolerance(tolerance: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The same after y is rounded once more to `dtype`; 2⁻²⁵ is half of float16's least value."""
    if dtype == torch.float32:
        return tolerance
    return tolerance + ROUNDOFF[dtype] * (expected.abs() + tolerance) + 2**-25
