"""Which kernel runs an op, and why.

On a GPU this is where it is chosen, among Triton, CUDA and the reference; `llmq/runtime/gpu.py`
asks and calls it. On CPU torch's dispatcher calls native code wherever it is loaded, and
`csrc/cpu/dispatch.cpp` chooses the kernel of the instruction set: here stands what it chose, for
reports, and in which layout a layer keeps its weight.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import NamedTuple

import torch

from llmq.runtime import extension
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

# The module of `llmq_kernels` whose function bears the op's name and takes its arguments.
TRITON_MODULES = {
    "quantize_activation": "quantize_rows",
    "int8_linear": "int8_gemm",
    "weight_only_linear": "weight_only_gemm",
    "codebook_linear": "codebook_gemm",
    "bitmap_sparse_linear": "bitmap_gemm",
    "semi_structured_linear": "bitmap_gemm",
    "block_sparse_linear": "block_sparse_gemm",
}

# op → rows of (tokens up to this many, kinds of kernel, best first); the first that is there and
# takes the call runs it, or else the reference. CUDA kernels are those that Triton does not reach:
# few tokens, bitmaps, 2:4. "dense" writes the weight out, for the op of dense weights. The limits
# follow from what bounds each kernel; not yet measured.
GPU_KERNELS: dict[str, tuple[tuple[float, tuple[str, ...]], ...]] = {
    "quantize_activation": ((math.inf, ("triton", "cuda")),),
    "int8_linear": ((32, ("cuda", "triton")), (math.inf, ("triton", "cuda"))),
    "weight_only_linear": ((64, ("cuda", "triton")), (math.inf, ("triton", "cuda"))),
    "codebook_linear": ((math.inf, ("triton",)),),
    "bitmap_sparse_linear": ((64, ("cuda", "triton", "dense")), (math.inf, ("triton", "dense"))),
    "semi_structured_linear": ((63, ("triton", "cuda")), (math.inf, ("cuda", "triton"))),
    "block_sparse_linear": ((math.inf, ("triton",)),),
}
LEAST_CAPABILITY = (8, 0)  # of a GPU: asynchronous copies, int8 and bfloat16 tensor cores


class Kernel(NamedTuple):
    """A kernel's `name` and the `reason` for which it was chosen."""

    name: str
    reason: str


class OpShape(NamedTuple):
    """What a choice needs to know beside device, dtype, M, N and K.

    Args:
        bits: of a stored weight: 4 or 8 of codes, 16 or 32 of floating-point values.
        group: inputs that share a weight scale; 0 is the whole row.
        activation_group: inputs that share an activation scale; 0 is the whole token, None leaves
            inputs in floating point.
        tiles: whether the weight stands in bitmap tiles, which CUDA kernels alone read.
    """

    bits: int = 8
    group: int = 0
    activation_group: int | None = None
    tiles: bool = False


def choose(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    op_shape: OpShape = OpShape(),  # noqa: B008  (immutable)
) -> Kernel:
    """Return the kernel that runs `op` on x [M, K] and weight [N, K], with the reason.

    Args:
        op: name of an op in `torch.ops.llmq`, or `"dense"` for a plain matrix product.
        device: where x and the weight are.
        dtype: of x and y.
        M, N, K: tokens, output features, input features.
        op_shape: of the weight and the inputs.
    """
    kind = torch.device(device).type
    if op == "dense":
        return Kernel("torch_linear", "floating-point values run as a dense matrix")
    if M == 0 or N == 0 or K == 0:
        return Kernel("reference", "empty product")
    if kind == "cuda":
        return choose_gpu(op, torch.device(device).index, dtype, M, N, K, op_shape)
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


@functools.lru_cache(4096)
def choose_gpu(
    op: str, index: int | None, dtype: torch.dtype, M: int, N: int, K: int, op_shape: OpShape
) -> Kernel:
    """Return what `choose` does for the GPU of that index, None for the current one."""
    if M == 0 or N == 0 or K == 0:
        return Kernel("reference", "empty product")
    refused: list[str] = []
    for limit, kinds in GPU_KERNELS.get(op, ()):
        if limit < M:
            continue
        for kind in kinds:
            refusal = _refusal(kind, op, index, dtype, K, op_shape)
            if refusal is None:
                best = f"first choice for M up to {limit}" if limit < math.inf else "first choice"
                return Kernel(f"{op}_{kind}", "; ".join(refused) or best)
            refused.append(f"{kind}: {refusal}")
        break
    return Kernel("reference", "; ".join(refused) or f"no kernel for {op} on GPUs")


def _refusal(
    kind: str, op: str, index: int | None, dtype: torch.dtype, K: int, op_shape: OpShape
) -> str | None:
    """Say why kernels of `kind` cannot run the op, or return None."""
    if dtype not in NATIVE_DTYPES:
        return f"no kernel for {dtype}"
    if kind == "cuda":
        return _cuda_refusal(op, dtype, K, op_shape) if has_cuda(op) else "not compiled in"
    if kind == "dense":
        if not op_shape.tiles or K % 4:
            return "only expands bitmap tiles whose rows are a multiple of 4 weights"
        return None if has_cuda("expand_bitmap") else "not compiled in"
    missing = [name for name in ("triton", "llmq_kernels") if not _found(name)]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if op not in TRITON_MODULES:
        return f"no kernel for {op}"
    if op_shape.tiles:
        return "does not read bitmap tiles"
    if op_shape.bits == 4 and op_shape.group % 2:
        return f"groups of {op_shape.group} share bytes of 4-bit weights"
    found = capability(index)
    if found < LEAST_CAPABILITY and not interpreted():
        wanted = "compute capability {}.{}".format(*LEAST_CAPABILITY)
        return f"needs {wanted}, this GPU has {found[0]}.{found[1]}"
    return None


def _cuda_refusal(op: str, dtype: torch.dtype, K: int, op_shape: OpShape) -> str | None:
    if op == "quantize_activation":
        return None
    if op == "bitmap_sparse_linear" and not op_shape.tiles:
        return "only reads bitmap tiles"
    if op == "semi_structured_linear":
        if op_shape.bits != 8 or op_shape.activation_group not in (0, K):
            return "weights and inputs are not int8 codes, inputs with one scale a token"
        return f"{K} inputs are no multiple of 128" if K % 128 else None
    if K * op_shape.bits % 128:
        return f"rows of {K} weights of {op_shape.bits} bits are no multiple of 16 bytes"
    for group in (op_shape.group, op_shape.activation_group or 0):
        if group % 32 and group != K:
            return f"groups of {group} are no multiple of 32"
    if op_shape.activation_group is not None and op == "weight_only_linear" and op_shape.bits == 8:
        return "inputs of 8-bit weights are codes"
    if op_shape.activation_group is None and dtype == torch.float32:
        return "inputs are float32"
    return None


@functools.cache
def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def has_cuda(op: str) -> bool:
    """Whether the library has `cuda_<op>`, a CUDA kernel that takes the arguments of `op`."""
    extension.load()
    name = f"cuda_{op}"
    return hasattr(torch.ops.llmq, name) and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"llmq::{name}", "CUDA"
    )


@functools.cache
def capability(index: int | None = None) -> tuple[int, int]:
    """Return the GPU's compute capability, (0, 0) without one."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else (0, 0)


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cpu_isa() -> str | None:
    """Return the instruction set that CPU kernels use now, or None without the library."""
    return torch.ops.llmq.cpu_isa() if extension.load().loaded else None


def has_fast_int8(device: torch.device | str) -> bool:
    """Whether int8 dot products on `device` are faster than floating point, with our kernels."""
    if torch.device(device).type == "cuda":
        kernel = choose("int8_linear", device, torch.bfloat16, 256, 4096, 4096)
        return kernel.name != "reference"
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


def keeps_tiles(
    device: torch.device, scheme: Scheme | None, N: int, K: int, kept: int, dtype: torch.dtype
) -> bool:
    """Whether a layer of `scheme` on `device` holds an unstructured weight in bitmap tiles.

    Args:
        N, K: output features, input features.
        kept, dtype: how many values of the N · K are stored, and as what: int8 where there is a
            scheme. Floating-point ones are held so if they are of 16 bits, and then take less
            memory than all of them would, and if N, which no scale tells, is whole strips.
    """
    op = "bitmap_sparse_linear"
    if device.type != "cuda" or not has_cuda(op):
        return False
    if scheme is None:
        masks = N * K * 9 // 64  # bytes, with where runs begin
        pays = dtype.itemsize == 2 and 2 * kept + masks < 2 * N * K
        op_shape = OpShape(8 * dtype.itemsize, tiles=True)
        return pays and N % 32 == 0 and _cuda_refusal(op, dtype, K, op_shape) is None
    group = None if scheme.activations is None else scheme.activation_group_size or 0
    return _cuda_refusal(op, torch.bfloat16, K, OpShape(8, 0, group, tiles=True)) is None
