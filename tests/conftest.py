"""Fixtures of all tests: poisoned memory, instruction sets, threads; no test of the wrong build."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmq.runtime import extension
from tests.cpu.isas import ISA_FLAGS, available

# This checkout's kernels under their import name, before those of an installed llmq.
KERNELS = Path(__file__).resolve().parent.parent / "kernels"
_LINK = KERNELS.parent / "build" / "imports" / "llmq_kernels"
_LINK.parent.mkdir(parents=True, exist_ok=True)
with contextlib.suppress(FileExistsError):
    _LINK.symlink_to(Path("../../kernels"), target_is_directory=True)
sys.path.insert(0, str(_LINK.parent))

# Before any test imports Triton's kernels: without a GPU it interprets them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def built_extensions() -> list[Path]:
    """The library that LLMQ_LIBRARY names, or those of this checkout and an installed package."""
    if os.environ.get("LLMQ_LIBRARY"):
        return [Path(os.environ["LLMQ_LIBRARY"]).resolve()]
    found = set(extension.PACKAGE.glob("_C*.so"))
    try:
        files = importlib.metadata.files("llmq-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found |= {Path(str(f.locate())) for f in files if f.match("llmq/_C*.so")}
    return sorted(path.resolve() for path in found if path.exists())


def wrong_extension() -> str | None:
    """Say what is wrong if a library was built and another one, or none, is loaded."""
    built, loaded = built_extensions(), extension.load()
    if built and (loaded.path is None or loaded.path.resolve() not in built):
        return f"built {', '.join(map(str, built))}, but loaded {loaded.path or loaded.error}"
    return None


def wrong_kernels() -> str | None:
    """Say which llmq_kernels would be tested if it is not this checkout's `kernels/`."""
    spec = importlib.util.find_spec("llmq_kernels")
    first = next(iter((spec and spec.submodule_search_locations) or ()), None)
    if first is None or Path(first).resolve() != KERNELS:
        return f"llmq_kernels is {first}, not {KERNELS}; pip install -e . in {KERNELS.parent}"
    return None


def pytest_sessionstart() -> None:
    # Tests against references alone, or of another checkout, would pass and prove nothing.
    problem = wrong_extension()
    if problem:
        pytest.exit(f"the compiled library that was built does not run: {problem}", returncode=1)
    problem = wrong_kernels()
    if problem:
        pytest.exit(f"these are another checkout's Triton kernels: {problem}", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep every n-th test from the i-th on where LLMQ_SHARD is `i/n`."""
    shard, _, shards = os.environ.get("LLMQ_SHARD", "0/1").partition("/")
    items[:] = items[int(shard) :: int(shards)]


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN or the largest integer, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISA_FLAGS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each instruction set; fails if this CPU has one that the library lacks."""
    assert extension.load().loaded, extension.load().error
    if request.param not in available():
        pytest.skip(f"this CPU has no {request.param}")
    before = torch.ops.llmq.cpu_isa()
    torch.ops.llmq.set_cpu_isa(request.param)
    yield request.param
    torch.ops.llmq.set_cpu_isa(before)


@pytest.fixture(params=[1, 2, 3], ids="{}-threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run the test on that many threads, more than a small machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
