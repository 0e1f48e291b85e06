"""Finds and loads the compiled CPU/CUDA library; without it every op runs its reference."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGE = Path(__file__).parent.parent  # `llmq/`, where the library lies


class Extension(NamedTuple):
    """Whether the compiled library is loaded: its `path`, or the `error` that stands in the way."""

    path: Path | None
    error: str | None

    @property
    def loaded(self) -> bool:
        return self.path is not None


@functools.cache
def load() -> Extension:
    """Load `llmq/_C*.so`, or what LLMQ_LIBRARY names, once; return what came of it, never raise."""
    named = os.environ.get("LLMQ_LIBRARY")
    candidates = [Path(named)] if named else []
    candidates = candidates or sorted(PACKAGE.glob("_C*.so")) + sorted(PACKAGE.glob("_C*.pyd"))
    if not candidates:
        return Extension(
            None, f"no compiled library in {PACKAGE}; install with a C++ compiler to build it"
        )
    try:
        torch.ops.load_library(str(candidates[0]))
    except (OSError, RuntimeError, ValueError) as error:
        return Extension(None, f"{candidates[0]} does not load: {error}")
    return Extension(candidates[0], None)
