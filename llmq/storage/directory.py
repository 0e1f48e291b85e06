"""Directories that are replaced whole: after a crash the old one is there, or the new one."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmq.storage.atomic import sync

if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # renameat2(2), Linux 3.15


@contextmanager
def replaced(target: Path, *, marker: str, ours: tuple[str, ...]) -> Iterator[Path]:
    """Give an empty directory beside `target`, which becomes `target` when the block succeeds.

    Args:
        target: is made, or replaced if it is empty or holds the file `marker`.
        marker: the file by which a directory is known as one of ours.
        ours: names that the block writes; other files of the old directory are carried over.

    Raises:
        ValueError: if `target` is a file, or a directory of something else.
    """
    target = Path(os.path.realpath(target))
    recover(target)
    check(target, marker=marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    with _partial(target) as folder:
        yield folder
        if target.exists():
            shutil.copymode(target, folder)
            for entry in target.iterdir():
                if entry.name not in ours:
                    _carry(entry, folder / entry.name)
        for path, _, files in os.walk(folder):
            for file in files:
                sync(Path(path, file))
            sync(Path(path))
        _swap(folder, target)
        sync(target.parent)


def check(target: Path, *, marker: str) -> None:
    """Raise `ValueError` if `target` is a file, or a directory of something else."""
    if target.exists():
        if not target.is_dir():
            raise ValueError(f"{target} is a file; name a directory")
        if any(target.iterdir()) and not (target / marker).is_file():
            raise ValueError(
                f"{target} holds something else (no {marker} in it); name another directory"
            )


def recover(target: Path) -> None:
    """Undo a replacement that was cut off between its two renames (`_swap` without exchange)."""
    target = Path(os.path.realpath(target))
    aside = _aside(target)
    if aside.exists():
        if target.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, target)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """Make a directory beside `target`, locked while this process lives, and gone afterwards."""
    while True:
        folder = target.parent / (_prefix(target) + secrets.token_hex(4))
        folder.mkdir()
        lock = _lock(folder)
        if folder.exists():  # else another process swept it before it was locked
            break
        _unlock(lock)
    try:
        yield folder
    finally:
        _unlock(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Delete what processes that were killed have left: directories that nobody locks."""
    for folder in target.parent.glob(f"{_prefix(target)}*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _lock(folder: Path) -> int | None:
    """Return a handle that locks `folder` until it is closed, None if somebody else does."""
    if sys.platform == "win32":
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _unlock(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _carry(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    """Let the file be in both directories, the old of which is about to go; else copy it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(folder: Path, target: Path) -> None:
    if not target.exists():
        os.rename(folder, target)
    elif not _exchange(folder, target):
        os.rename(target, _aside(target))
        os.rename(folder, target)
        shutil.rmtree(_aside(target))


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step, where the system and the file system can."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    # What else may be wrong, the two plain renames that follow will say.
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)
