"""The store of interrupted runs: entries whole or not at all, and of one run only."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from llmq.storage.atomic import replaced_file
from llmq.storage.resume import Store
from tests.helpers import assert_equal

SHARED = torch.arange(6.0)
TENSORS = {"a": SHARED, "again": SHARED, "turned": torch.arange(6).view(2, 3).T, "none": SHARED[:0]}
INFO = {"kl": {"layers.0 w8a8": 0.1 + 0.2}, "names": ["ü"], "best": None}


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_gives_back_what_it_was_given(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "kept" if kind == "file" else None
    store = Store(folder, "run")
    assert store.get("x") is None and "x" not in store
    store.put("x", {}, {})
    store.put("x", TENSORS, INFO)
    store.put("empty", {}, {})
    if folder is not None:
        store = Store(folder, "run")
    found = store.get("x")
    assert found is not None and found.info == INFO and "x" in store
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in found.tensors.items():
        assert_equal(tensor, TENSORS[name], name)
    assert store.get("empty") == ({}, {})
    store.remove("x")
    store.remove("x")
    assert store.get("x") is None and "x" not in store


def test_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    Store(folder, "run").put("x", TENSORS, INFO)
    with pytest.raises(ValueError, match="kept holds work of another model, data or options; rep"):
        Store(folder, "other")
    file = folder / "x.safetensors"
    with pytest.raises(ValueError, match="is a file; name a directory"):
        Store(file, "run")
    store = Store(folder, "run")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged .* delete it"):
        store.get("x")
    with pytest.raises(ValueError, match="is damaged"):
        Store(folder, "run")


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, "run")
    store.put("x", TENSORS, INFO)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.put("x", {}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    found = store.get("x")
    assert found is not None and found.info == INFO


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")
    for moment in ("written", "synced", "replaced"):
        pid = os.fork()
        if pid == 0:
            try:
                if moment != "written":
                    step = "fsync" if moment == "synced" else "replace"
                    genuine = getattr(os, step)

                    def killed(*args: object) -> None:
                        genuine(*args)  # noqa: B023
                        os.kill(os.getpid(), signal.SIGKILL)

                    setattr(os, step, killed)
                with replaced_file(target) as file:
                    file.write_text("new")
                    if moment == "written":
                        os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert target.read_text() == ("new" if moment == "replaced" else "old")
    with replaced_file(target) as file:
        file.write_text("last")
    assert [found.name for found in tmp_path.iterdir()] == ["x"]
