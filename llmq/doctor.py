"""`llmq.doctor`: which parts load here, which do not and why, and how to get them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmq import dispatch, extension


@dataclass(frozen=True)
class Part:
    """One part: whether it is there, what was found where, and what to do if it is missing."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What `llmq.doctor` found."""

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
            lines.append(f"{'ok' if part.ok else '--'}  {part.name:<{width}}  {part.found}")
            if not part.ok:
                lines.append(f"    {'':<{width}}  {part.remedy}")
        return "\n".join(lines)


_OPTIONAL = {
    "transformers": ("loads and rebuilds Hugging Face models", "transformers"),
    "gguf": ("reads GGUF files", "eval"),
    "accelerate": ("loads large checkpoints", "eval"),
    "matplotlib": ("draws the plots of HTML reports", "plots"),
    "pytest_benchmark": ("runs benchmarks/micro.py", "bench"),
}


def doctor() -> Diagnosis:
    """Return which kernels load on this machine, and why others do not; takes milliseconds.

    Example:
        >>> print(llmq.doctor())
    """
    return Diagnosis([*_core(), *_kernels(), *_extras()])


def _core() -> list[Part]:
    package = Path(__file__).parent
    try:
        version = importlib.metadata.version("llmq-kernels")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed, run from its source"
    enough = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10)
    remedy = "pip install 'torch>=2.10'"
    torch_found = f"{torch.__version__} in {Path(torch.__file__).parent}"
    cpu = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads"
    return [
        Part("llmq", True, f"{version}, {package}"),
        Part("python", True, f"{platform.python_version()}, {sys.executable}"),
        Part("torch", enough, torch_found, remedy),
        Part("machine", True, cpu),
    ]


def _kernels() -> list[Part]:
    library = extension.load()
    build = "install a C++20 compiler (apt-get install g++), then pip install again"
    parts = [Part("C++ kernels", library.loaded, str(library.path or library.error), build)]
    isa = dispatch.cpu_isa()
    forced = os.environ.get("LLMQ_ISA")
    chosen = f"{isa}{', forced by LLMQ_ISA' if forced else ''}" if isa else "reference only"
    fast = "AVX2 or AVX-512 VNNI would run int8 faster than floating point"
    parts.append(Part("instruction set", isa not in (None, "portable"), chosen, fast))
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    where = str(shutil.which(compiler)) if compiler else "none"
    parts.append(Part("C++ compiler", compiler is not None, where, "apt-get install g++"))
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"none (torch {torch.__version__})"
    parts.append(Part("CUDA device", cuda, device, "GPUs run the reference path so far"))
    triton = _version("triton")
    found = triton or "not installed"
    parts.append(Part("Triton", triton is not None, found, "comes with CUDA builds of torch"))
    return parts


def _extras() -> list[Part]:
    parts = []
    for module, (use, extra) in _OPTIONAL.items():
        version = _version(module)
        remedy = f"{use}: pip install 'llmq-kernels[{extra}]'"
        parts.append(Part(module, version is not None, version or "not installed", remedy))
    return parts


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"
