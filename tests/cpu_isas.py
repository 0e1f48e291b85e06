"""What tests of native kernels share: instruction sets, comparison, tolerances."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmq.ops  # noqa: F401  defines torch.ops.llmq
from llmq import extension

X86_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    | {"avx512_vnni", "avx512vbmi", "avx512_vbmi2"},
}
ARM_FLAGS = {"neondot": {"asimddp"}, "i8mm": {"asimddp", "i8mm"}}
ARM = platform.machine().lower() in ("aarch64", "arm64")
ISA_FLAGS: dict[str, set[str]] = {"portable": set()} | (ARM_FLAGS if ARM else X86_FLAGS)
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


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


def assert_close(y: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    """Fail with the first place where float64 `expected` and y differ by more than `tolerance`."""
    assert y.shape == expected.shape
    wrong = ~((y.double() - expected).abs() <= tolerance)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        pytest.fail(
            f"{what}: y{at} = {y[at].item()}, expected {expected[at].item()} ± {tolerance[at]}"
        )


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
