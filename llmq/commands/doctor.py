"""`llmq.doctor`: which parts load here, which do not and why, and how to get them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import llmq.ops  # noqa: F401  defines the ops whose kernels are asked about
from llmq.runtime import dispatch, extension


@dataclass(frozen=True)
class Part:
    """One part: whether it is there, what was found where, and what to do if it is missing.

    Args:
        name: of the part.
        ok: whether it is there and works.
        found: its version, or why it does not work.
        remedy: what to do or to know about it, if anything.
        path: where it lies, None if it is no file.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""
    path: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What `llmq.doctor` found; `print` shows it as a table."""

    parts: list[Part]

    @property
    def missing(self) -> list[Part]:
        """The parts that are not there."""
        return [part for part in self.parts if not part.ok]

    def to_json(self) -> str:
        """Return all parts as JSON."""
        return json.dumps([asdict(part) for part in self.parts], indent=1)

    def __str__(self) -> str:
        width = max(len(part.name) for part in self.parts)
        lines = []
        for part in self.parts:
            found = f"{part.found}  {part.path}" if part.path else part.found
            lines.append(f"{'ok' if part.ok else '--'}  {part.name:<{width}}  {found}")
            if part.remedy:
                lines.append(f"    {'':<{width}}  {part.remedy}")
        return "\n".join(lines)


_BUILD = "install a C++20 compiler (apt-get install g++), then pip install llmq-kernels again"
_REQUIRED = ("numpy", "safetensors", "tqdm")
_NEEDED = ("llmq", "python", "torch", *_REQUIRED, "C++ kernels")
_OPTIONAL = {
    "transformers": ("loads and rebuilds Hugging Face models", "transformers"),
    "gguf": ("reads GGUF files", "eval"),
    "accelerate": ("loads large checkpoints", "eval"),
    "lm_eval": ("runs lm-eval's tasks", "lm-eval"),
    "pytest_benchmark": ("runs benchmarks/micro.py", "bench"),
}
_OPS = (
    "quantize_activation",
    "int8_linear",
    "weight_only_linear",
    "codebook_linear",
    "bitmap_sparse_linear",
    "semi_structured_linear",
    "block_sparse_linear",
)
# Layers of these patterns are held in another form where their own op has no kernel.
_HELD_OTHERWISE = ("semi_structured_linear", "block_sparse_linear")


def main(args: Namespace) -> int:
    """Print the diagnosis; return 1 if a part that is not optional does not work."""
    diagnosis = doctor()
    broken = [part.name for part in diagnosis.missing if part.name in _NEEDED]
    if args.json:
        print(diagnosis.to_json())
    elif not args.quiet:
        print(diagnosis)
    if not args.json:
        fine = "everything that is needed works; what is marked -- is optional"
        print(f"does not work: {', '.join(broken)}" if broken else fine)
    return 1 if broken else 0


def doctor() -> Diagnosis:
    """Return which kernels load on this machine, and why others do not; imports nothing heavy.

    Example:
        >>> print(llmq.doctor())
    """
    return Diagnosis([*_core(), *_native(), *_ops(), *_gpu(), *_extras()])


def _core() -> list[Part]:
    try:
        version = importlib.metadata.version("llmq-kernels")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed, run from its source"
    enough = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10)
    cpu = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads"
    return [
        Part("llmq", True, version, path=str(extension.PACKAGE)),
        Part("python", True, platform.python_version(), path=sys.executable),
        Part(
            "torch",
            enough,
            torch.__version__,
            "" if enough else "pip install 'torch>=2.10'",
            str(Path(torch.__file__).parent),
        ),
        *(_installed(module, f"pip install {module}") for module in _REQUIRED),
        Part("machine", True, cpu),
    ]


def _native() -> list[Part]:
    library = extension.load()
    if library.loaded:
        parts = [Part("C++ kernels", True, "loaded", path=str(library.path))]
    else:
        remedy = _BUILD
        elsewhere = _other_library()
        if elsewhere is not None:
            remedy = (
                f"{elsewhere} is compiled, but {extension.PACKAGE} comes first on sys.path; "
                f"start Python elsewhere, or pip install -e {extension.PACKAGE.parent}"
            )
        parts = [Part("C++ kernels", False, library.error or "not loaded", remedy)]
    parts.append(_instruction_set())
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    needed = not library.loaded
    parts.append(
        Part(
            "C++ compiler",
            compiler is not None,
            compiler or "none on PATH",
            "" if compiler else f"{'' if needed else 'only to build again: '}apt-get install g++",
            shutil.which(compiler) if compiler else None,
        )
    )
    return parts


def _other_library() -> Path | None:
    """Return a compiled llmq that another entry of sys.path holds and that is not imported."""
    here = extension.PACKAGE.resolve()
    for entry in sys.path:
        folder = Path(entry or ".") / "llmq"
        if folder.resolve() != here:
            for library in sorted(folder.glob("_C*.so")):
                return library
    return None


def _instruction_set() -> Part:
    name = "instruction set"
    if not extension.load().loaded:
        return Part(name, False, "none: every op runs its PyTorch reference", _BUILD)
    forced = os.environ.get("LLMQ_ISA")
    try:
        isa = dispatch.cpu_isa()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        return Part(name, False, reason, f"unset LLMQ_ISA, or set it to one of {_runnable()}")
    found = f"{isa}{', forced by LLMQ_ISA' if forced else ''} (runs here: {_runnable()})"
    if isa == "portable" and not forced:
        slow = "int8 is slower here than where AVX2 or AVX-512 VNNI runs; bits=8 picks w8a16"
        return Part(name, False, found, slow)
    return Part(name, True, found)


def _runnable() -> str:
    """Return the instruction sets that run here; the library lists them as it refuses others."""
    try:
        torch.ops.llmq.set_cpu_isa("?")
    except (RuntimeError, ValueError) as error:
        found = re.search(r"does not run here; (.*?) do(es)?\b", str(error))
        return found[1] if found else "unknown"
    return "unknown"


def _ops() -> list[Part]:
    parts = []
    for op in _OPS:
        registered = hasattr(torch.ops.llmq, op)
        try:
            kernel = dispatch.choose(op, "cpu", torch.float32, 1, 64, 64)
        except (RuntimeError, ValueError):  # of a wrong LLMQ_ISA, which has a line of its own
            kernel = dispatch.Kernel("reference", "LLMQ_ISA names no instruction set of this CPU")
        native = registered and kernel.name != "reference"
        remedy = "" if native else "see C++ kernels and instruction set"
        if op in _HELD_OTHERWISE and not native:
            remedy = "such layers are held as bitmap (int8) or dense (floating point) on CPU"
        found = f"{kernel.name} ({kernel.reason})" if registered else "not registered"
        parts.append(Part(op, native, found, remedy))
    return parts


def _gpu() -> list[Part]:
    cuda = torch.cuda.is_available()
    built = torch.version.cuda
    why = f"none found; this torch is built {f'for CUDA {built}' if built else 'without CUDA'}"
    device = torch.cuda.get_device_name() if cuda else why
    parts = [
        Part("CUDA device", cuda, device, "" if cuda else "GPUs need a CUDA build of torch"),
        _installed("triton", "kernels for GPUs: pip install 'llmq-kernels[gpu]'"),
        _installed("llmq_kernels", "kernels for GPUs: install llmq-kernels, not its folder llmq"),
    ]
    if cuda:
        parts += [_gpu_op(op) for op in _OPS]
    return parts


def _gpu_op(op: str) -> Part:
    few, many = (dispatch.choose(op, "cuda", torch.bfloat16, M, 4096, 4096) for M in (1, 4096))
    found = f"{few.name} ({few.reason})"
    if many != few:
        found = f"1 token: {found}; 4096: {many.name} ({many.reason})"
    return Part(f"{op} on GPU", "reference" not in (few.name, many.name), found)


def _extras() -> list[Part]:
    return [
        _installed(module, f"{use}: pip install 'llmq-kernels[{extra}]'")
        for module, (use, extra) in _OPTIONAL.items()
    ]


def _installed(module: str, remedy: str) -> Part:
    """Describe a package without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # blocked, or in sys.modules without a spec
        spec = None
    folders = [] if spec is None else [*(spec.submodule_search_locations or ())]
    if spec is None or (spec.origin is None and not folders):
        return Part(module, False, "not installed", remedy)
    try:
        version = importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    path = folders[0] if spec.origin is None else Path(spec.origin).parent
    return Part(module, True, version, path=str(path))
