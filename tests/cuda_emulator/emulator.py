"""Builds csrc/cuda for the CPU and calls its launchers on torch's CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
BLOCK_OUTPUTS = 128
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# No contraction: what must round on its own is written so for the GPU, too.
FLAGS = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
# No symbol is shared among libraries, each of which is a machine of its own.
FLAGS += ["-fno-gnu-unique", "-fvisibility=hidden"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-clobbered", "-U_FORTIFY_SOURCE", "-DLLMQ_CUDA_EMULATOR"]

P, INT, I64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class SmallGemm(ctypes.Structure):
    """SmallGemm of csrc/cuda/kernels.h."""

    _fields_ = (
        *(("x", P), ("x_dtype", INT), ("x_scale", P), ("x_groups", INT)),
        *(("weight", P), ("bitmask", P), ("offsets", P), ("scale", P), ("zero_point", P)),
        *(("groups", INT), ("bias", P), ("bias_dtype", INT), ("y", P), ("y_dtype", INT)),
        *(("M", INT), ("N", INT), ("K", INT), ("splits", INT), ("partial", P), ("arrivals", P)),
    )


class SparseGemm(ctypes.Structure):
    """SparseGemm of csrc/cuda/kernels.h."""

    _fields_ = (
        *(("x", P), ("x_scale", P), ("weight", P), ("meta", P), ("scale", P), ("bias", P)),
        *(("bias_dtype", INT), ("y", P), ("y_dtype", INT)),
        *(("M", INT), ("N", INT), ("K", INT), ("plan", INT)),
    )


class QuantizeRows(ctypes.Structure):
    """QuantizeRows of csrc/cuda/kernels.h."""

    _fields_ = (
        *(("x", P), ("x_dtype", INT), ("groups", I64), ("group_size", INT)),
        *(("codes", P), ("scale", P), ("given", P)),
    )


class Counters(ctypes.Structure):
    """emulator::Counters: what the launches since the last reset did."""

    _fields_ = tuple(
        (name, I64)
        for name in (
            *("global_requests", "global_sectors", "global_ideal_sectors"),
            *("weight_sectors", "weight_ideal_sectors"),
            *("shared_requests", "shared_wavefronts", "shared_ideal_wavefronts"),
            *("mma", "barriers", "shared_bytes", "bytes_in_flight"),
        )
    )


def build(
    sources: list[Path],
    target: Path,
    optimize: str,
    flags: tuple[str, ...] = (),
    libraries: tuple[str, ...] = (),
) -> Path:
    """Compile what changed of `sources` into the shared library `target`."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the emulated kernels with")
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*CUDA.glob("*.h"), *CUDA.glob("*.cuh"), *HERE.glob("*.h"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in headers)

    def run(command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-4000:]}"

    def compile_one(source: Path) -> Path:
        built = folder / f"{source.stem}.o"
        if not built.exists() or built.stat().st_mtime < max(newest, source.stat().st_mtime):
            partial = built.with_suffix(f".{os.getpid()}")
            language = ["-x", "c++", "-c", str(source), "-o", str(partial)]
            run([compiler, *FLAGS, *flags, optimize, f"-I{HERE}", *language])
            os.replace(partial, built)
        return built

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    if not target.exists() or target.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        partial = target.with_suffix(f".{os.getpid()}")
        run([compiler, "-shared", *map(str, objects), "-o", str(partial), *libraries])
        os.replace(partial, target)
    return target


def load(sources: list[Path], target: Path, optimize: str = "-O1") -> ctypes.CDLL:
    """Load the kernels of `sources`, emulated."""
    loaded = ctypes.CDLL(str(build([*sources, HERE / "bindings.cpp"], target, optimize)))
    for name in (
        "run_weight_only",
        "run_int4_of_codes",
        "run_int8",
        "run_bitmap",
        "run_bitmap_expand",
        "run_semi_structured",
        "run_quantize",
    ):
        getattr(loaded, name).restype = ctypes.c_char_p
    assert loaded.small_gemm_size() == ctypes.sizeof(SmallGemm)
    assert loaded.sparse_gemm_size() == ctypes.sizeof(SparseGemm)
    assert loaded.quantize_rows_size() == ctypes.sizeof(QuantizeRows)
    return loaded


@functools.cache
def library() -> ctypes.CDLL:
    """Every kernel of csrc/cuda, emulated."""
    return load(sorted(CUDA.glob("*.cu")), ROOT / "build/cuda_emulator/kernels.so")


@functools.cache
def load_ops() -> None:
    """Give the ops cuda_… an implementation for CPU tensors: their own driver, kernels emulated."""
    torch_folder = Path(torch.__file__).parent
    flags = ("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{torch_folder}/include")
    sources = [*CUDA.glob("*.cpp"), *CUDA.glob("*.cu"), HERE / "ops.cpp"]
    libraries = (f"-L{torch_folder}/lib", "-ltorch_cpu")
    target = ROOT / "build/cuda_emulator_ops/ops.so"
    torch.ops.load_library(str(build(sources, target, "-O1", flags, libraries)))


def launch(
    loaded: ctypes.CDLL, name: str, *arguments: object, memory: dict[str, Tensor], seed: int = 1
) -> Counters:
    """Call a launcher that may touch `memory` only; RuntimeError says what it did wrong."""
    loaded.emulator_reset(seed)
    for key, tensor in memory.items():
        size = tensor.numel() * tensor.element_size()
        loaded.emulator_register(P(tensor.data_ptr()), ctypes.c_size_t(size), key.encode())
    error = getattr(loaded, name)(*arguments)
    if error is not None:
        raise RuntimeError(error.decode())
    counters = Counters()
    loaded.emulator_counters(ctypes.byref(counters))
    return counters


def small_gemm(
    name: str,
    x: Tensor,
    memory: dict[str, Tensor],
    *arguments: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    splits: int = 1,
    seed: int = 1,
    loaded: ctypes.CDLL | None = None,
) -> tuple[Tensor, Counters]:
    """Return y [M, N] of a SmallGemm, whose fields are the tensors `memory` names."""
    M = x.shape[0]
    tokens = 8 if M <= 8 else 16 if M <= 16 else 32
    blocks = -(-N // BLOCK_OUTPUTS) * -(-M // tokens)
    y = torch.full((M, N), float("nan"), dtype=dtype)
    memory = {"x": x, "y": y, **memory}
    if splits > 1:
        memory["partial"] = torch.full(
            (blocks * splits * BLOCK_OUTPUTS * tokens,), -1, dtype=torch.int32
        )
        memory["arrivals"] = torch.zeros(blocks, dtype=torch.int32)
    scale, x_scale, bias = (memory.get(key) for key in ("scale", "x_scale", "bias"))
    g = SmallGemm(
        **{key: tensor.data_ptr() for key, tensor in memory.items()},
        x_dtype=DTYPES.get(x.dtype, 0),
        y_dtype=DTYPES[dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        x_groups=1 if x_scale is None else x_scale.shape[1],
        groups=1 if scale is None else scale.shape[1],
        M=M,
        N=N,
        K=K,
        splits=splits,
    )
    counters = launch(
        loaded or library(), name, ctypes.byref(g), *arguments, memory=memory, seed=seed
    )
    if splits > 1:
        assert not memory["arrivals"].any(), "arrivals are not left at zero"
    return y, counters


def semi_structured(
    codes: Tensor,
    memory: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    plan: int,
    loaded: ctypes.CDLL | None = None,
) -> tuple[Tensor, Counters]:
    """Return y [M, N] of a SparseGemm, whose fields are the tensors `memory` names."""
    (M, K), N = codes.shape, memory["weight"].shape[0]
    y, bias = torch.full((M, N), float("nan"), dtype=dtype), memory.get("bias")
    memory = {"x": codes, "y": y, **memory}
    g = SparseGemm(
        **{key: tensor.data_ptr() for key, tensor in memory.items()},
        y_dtype=DTYPES[dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        M=M,
        N=N,
        K=K,
        plan=plan,
    )
    counters = launch(loaded or library(), "run_semi_structured", ctypes.byref(g), memory=memory)
    return y, counters


def quantize(x: Tensor, group_size: int = 0, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes [M, K] and scales [M, groups] of the emulated kernel."""
    M, K = x.shape
    group = group_size or K
    codes = torch.full((M, K), 77, dtype=torch.int8)
    scale = torch.full((M, K // group), 77.0)
    memory = {"x": x, "codes": codes, "scale": scale}
    if given is not None:
        memory["given"] = given
    q = QuantizeRows(
        **{key: tensor.data_ptr() for key, tensor in memory.items()},
        x_dtype=DTYPES[x.dtype],
        groups=M * K // group,
        group_size=group,
    )
    launch(library(), "run_quantize", ctypes.byref(q), memory=memory)
    return codes, scale
