"""Directories that are replaced whole: after a crash the old one is there, or the new one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    target = Path(os.path.abspath(target))
    recover(target)
    if target.exists():
        if not target.is_dir():
            raise ValueError(f"{target} is a file; name a directory")
        if any(target.iterdir()) and not (target / marker).is_file():
            raise ValueError(
                f"{target} holds something else (no {marker} in it); name another directory"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        os.chmod(folder, 0o755)
        yield folder
        if target.exists():
            for entry in target.iterdir():
                if entry.name not in ours:
                    copy = shutil.copytree if entry.is_dir() else shutil.copy2
                    copy(entry, folder / entry.name)
        for entry in folder.rglob("*"):
            _sync(entry)
        _sync(folder)
        _swap(folder, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def recover(target: Path) -> None:
    """Undo a replacement that was cut off between its two renames (`_swap` without exchange)."""
    target = Path(os.path.abspath(target))
    aside = _aside(target)
    if aside.exists():
        if target.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, target)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _swap(folder: Path, target: Path) -> None:
    if not target.exists():
        os.rename(folder, target)
    elif not _exchange(folder, target):
        os.rename(target, _aside(target))
        os.rename(folder, target)
        shutil.rmtree(_aside(target))


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step, where the system and the file system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
