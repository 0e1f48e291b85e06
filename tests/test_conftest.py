"""The guard against testing a build that does not run, and memory that is poisoned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmq.runtime import extension
from tests import conftest


def test_what_was_built_is_what_runs() -> None:
    assert conftest.wrong_extension() is None


@pytest.mark.parametrize("loaded", [None, Path("elsewhere/llmq/_C.abi3.so")], ids=str)
def test_another_build_than_the_one_loaded_is_refused(
    monkeypatch: pytest.MonkeyPatch, loaded: Path | None
) -> None:
    built = Path("here/llmq/_C.abi3.so").resolve()
    monkeypatch.setattr(conftest, "built_extensions", lambda: [built])
    found = extension.Extension(loaded, None if loaded else "it does not load")
    monkeypatch.setattr(extension, "load", lambda: found)
    assert str(built) in (conftest.wrong_extension() or "")
    monkeypatch.setattr(conftest, "built_extensions", list)
    assert conftest.wrong_extension() is None


def test_triton_kernels_are_those_of_this_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert conftest.wrong_kernels() is None
    monkeypatch.setattr(conftest, "KERNELS", tmp_path)
    assert f"not {tmp_path}; pip install -e ." in (conftest.wrong_kernels() or "")


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int8) == 127).all()
