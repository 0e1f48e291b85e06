"""Which kernel runs an op, and why: the one place that decides it.

On CPU the instruction set is chosen once a process, in `csrc/cpu/dispatch.cpp`; this table tells
which of the two, native or reference, an op gets, and which layout its weight is kept in.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from llmq import extension
from llmq.scheme import Scheme

NATIVE_CPU_OPS = frozenset(
    {
        "quantize_activation",
        "int8_linear",
        "weight_only_linear",
        "codebook_linear",
        "bitmap_sparse_linear",
    }
)
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernel(NamedTuple):
    """A kernel's `name` and the `reason` for which it was chosen."""

    name: str
    reason: str


def choose(
    op: str, device: torch.device | str, dtype: torch.dtype, M: int, N: int, K: int
) -> Kernel:
    """Return the kernel that runs `op` on x [M, K] and weight [N, K], with the reason.

    Args:
        op: name of an op in `torch.ops.llmq`, or `"dense"` for a plain matrix product.
        device: where x and the weight are.
        dtype: of x and y.
        M, N, K: tokens, output features, input features.
    """
    kind = torch.device(device).type
    if op == "dense":
        return Kernel("torch_linear", "floating-point values run as a dense matrix")
    if M == 0 or N == 0 or K == 0:
        return Kernel("reference", "empty product")
    if kind != "cpu":
        return Kernel("reference", f"no kernel for {op} on {kind} yet")
    library = extension.load()
    if not library.loaded:
        return Kernel("reference", library.error or "no compiled library")
    if op not in NATIVE_CPU_OPS:
        return Kernel("reference", f"no CPU kernel for {op}")
    if dtype not in NATIVE_DTYPES:
        return Kernel("reference", f"no kernel for {dtype}")
    isa = cpu_isa()
    forced = os.environ.get("LLMQ_ISA")
    why = f"LLMQ_ISA={forced}" if forced else "best of this CPU"
    return Kernel(f"{op}_{isa}", why)


def cpu_isa() -> str | None:
    """Return the instruction set that CPU kernels use now, or None without the library."""
    return torch.ops.llmq.cpu_isa() if extension.load().loaded else None


def has_fast_int8(device: torch.device | str) -> bool:
    """Whether int8 dot products on `device` are faster than floating point, with our kernels."""
    fast = ("avx512vnni", "avxvnni", "avx2", "i8mm", "neondot")
    return torch.device(device).type == "cpu" and cpu_isa() in fast


def keeps_panels(device: torch.device, scheme: Scheme | None) -> bool:
    """Whether a layer of `scheme` on `device` holds its weight in the CPU kernels' panels."""
    if device.type != "cpu" or scheme is None or not extension.load().loaded:
        return False
    # A panel interleaves 4 (8 bits) or 8 (4 bits) inputs: a scale may not change inside one.
    step = 32 // scheme.bits
    groups = (scheme.group_size, scheme.activation_group_size)
    return all(group is None or group % step == 0 for group in groups)
