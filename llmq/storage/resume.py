"""Keeps what a run has done in a directory, so that the same call goes on after an interruption.

Each entry is one safetensors file: tensors, and in its metadata JSON and what tells the run from
others. Entries are written whole or not at all, so that a run may be killed at any moment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmq.storage.atomic import replaced_file


class Entry(NamedTuple):
    """What was kept under one key: tensors, on CPU if they come from a file, and JSON values."""

    tensors: Mapping[str, Tensor]
    info: dict[str, Any]


class Store:
    """The entries of one run, by key.

    Args:
        directory: is made if it is missing. None keeps entries in memory, as they are given.
        run: `fingerprint` of all that the entries depend on.

    Raises:
        ValueError: if `directory` is a file, or holds entries of another run.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, run: str = "") -> None:
        self.folder = None if directory is None else Path(directory)
        self.run = run
        self._in_memory: dict[str, Entry] = {}
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; name a directory to resume from")
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.folder.glob("*.safetensors"))[:1]:
            self._read(file)

    def __contains__(self, key: str) -> bool:
        return key in self._in_memory or (self.folder is not None and self._file(key).exists())

    def get(self, key: str) -> Entry | None:
        """Return the entry of `key`, None if there is none.

        Raises:
            ValueError: if the file is damaged, or of another run.
        """
        if self.folder is None or key not in self:
            return self._in_memory.get(key)
        tensors: dict[str, Tensor] = {}
        return Entry(tensors, self._read(self._file(key), tensors))

    def put(self, key: str, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> None:
        """Keep an entry in place of any earlier one.

        Args:
            key: may stand in a file's name.
            tensors: may share memory.
            info: what JSON can hold.
        """
        if self.folder is None:
            self._in_memory[key] = Entry(tensors, info)
            return
        copies = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
        with replaced_file(self._file(key)) as file:
            save_file(copies, file, {"run": self.run, "info": json.dumps(info)})

    def remove(self, key: str) -> None:
        """Forget an entry, if it is there."""
        self._in_memory.pop(key, None)
        if self.folder is not None:
            self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    def _read(self, file: Path, into: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """Return the JSON of an entry's file, and add its tensors to `into`, if given."""
        try:
            with safe_open(file, framework="pt") as opened:
                found = opened.metadata() or {}
                if into is not None:
                    into.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged ({error}); delete it to do its part again"
            ) from error
        if found.get("run") != self.run or "info" not in found:
            raise ValueError(
                f"{file.parent} holds work of another model, data or options; repeat the call that "
                f"was interrupted, delete the directory, or name another one"
            )
        info: dict[str, Any] = json.loads(found["info"])
        return info
