"""How the command line reads and checks its options, without importing torch."""

from __future__ import annotations

import functools
import math
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llmq.pruning.method import check_rate
from llmq.quantization.algorithm import parse_algorithm
from llmq.scheme import Pattern, parse_pattern, resolve_scheme

_T = TypeVar("_T")


def _shown(convert: Callable[[str], _T]) -> Callable[[str], _T]:
    """Let argparse show the message of an error, which it would replace by one of its own."""

    @functools.wraps(convert)
    def converted(text: str) -> _T:
        try:
            return convert(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from error

    return converted


@_shown
def scheme(text: str) -> str:
    """Read the name of a preset."""
    resolve_scheme(text)
    return text


@_shown
def scheme_or_none(text: str) -> str:
    """Read the name of a preset, or `none`."""
    return text if text == "none" else scheme(text)


@_shown
def measured(text: str) -> str:
    """Read what `bench` measures: a preset, or sparse values of one, `sparse 50 % w8a8`."""
    scheme(text.rpartition(" ")[2] if text.startswith("sparse ") else text)
    return text


@_shown
def pattern(text: str) -> Pattern:
    """Read a sparsity pattern."""
    return parse_pattern(text)


@_shown
def algorithm(text: str) -> str:
    """Read the name of a quantization algorithm."""
    parse_algorithm(text, static=True, has_data=True)
    return text


@_shown
def share(text: str) -> float:
    """Read a share: 0.005 or 0.5%."""
    number, percent = (text[:-1], True) if text.endswith("%") else (text, False)
    try:
        return float(number) / (100 if percent else 1)
    except ValueError as error:
        raise ValueError(f"takes a share, say 0.5% or 0.005, got {text!r}") from error


@_shown
def rate(text: str) -> float:
    """Read a pruning rate: 0.5 or 50%."""
    return check_rate(share(text), Pattern("unstructured"))


@_shown
def positive(text: str) -> float:
    """Read a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"takes a positive number, got {text!r}")
    return value


@_shown
def positive_share(text: str) -> float:
    """Read a positive share: 0.005 or 0.5%."""
    return positive(str(share(text)))


@_shown
def count(text: str) -> int:
    """Read a positive integer."""
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"takes a positive integer, got {text!r}")
    return int(text)


@_shown
def shape(text: str) -> tuple[int, int]:
    """Read the shape of a layer: output x input features."""
    N, _, K = text.lower().replace("×", "x").partition("x")
    if not (N.isdecimal() and K.isdecimal() and int(N) and int(K)):
        raise ValueError(f"takes output x input features, say 4096x4096, got {text!r}")
    return int(N), int(K)


def check_text(file: Path | None, option: str) -> None:
    """Raise `ValueError` if `file`, which `option` names, is no readable text."""
    if file is None:
        return
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "does not exist"
        raise ValueError(f"{option}: {file} {what}; name a text file")
    try:
        with open(file, encoding="utf-8") as opened:
            start = opened.read(4096)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: {file} cannot be read as UTF-8 text: {error}") from error
    if not start.strip():
        raise ValueError(f"{option}: {file} is empty")


def check_writable(target: Path, option: str) -> None:
    """Raise `ValueError` if the file or directory `target` could not be written."""
    folder = target.resolve().parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".llmq-", dir=folder):
            pass
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{option}: {target} cannot be written, in {folder}: {why}") from error
