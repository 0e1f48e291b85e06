"""Replaces a file in one step: after a crash the old file is there, or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write to; that file becomes `target` if the block succeeds."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(target.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file or a directory's entries; links have nothing of their own."""
    if sys.platform == "win32" or path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems refuse this for directories.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
