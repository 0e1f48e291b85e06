"""A student: the same model with fewer layers, which then learns from the whole one.

    student = make_student(teacher, layers=15, data=windows)
    llmq.fine_tune(student, windows, teacher=teacher, hidden_weight=1.0)

Narrower ones are made by `llmq.prune(…, pattern="structured")`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import nn

from llmq.calibrate.data import calls_of
from llmq.pruning import depth


def make_student(model: nn.Module, layers: int, *, data: Any = None) -> nn.Module:
    """Return a copy of `model` with `layers` of its layers, encoder and decoder each.

    The first layer always stays. Without data the others are taken evenly, the last among them, as
    DistilBERT did (Sanh et al., arXiv:1910.01108). With data those go that change their input
    least (ShortGPT: `llmq/pruning/depth.py`).

    Args:
        model: a transformers model; stays as it is.
        layers: 1 or more, fewer than there are.
        data: as `llmq.quantize` takes it.

    Raises:
        TypeError: if `layers` is no integer.
        ValueError: if the model has no list of layers that its configuration counts, or not more
            than `layers`.
    """
    if isinstance(layers, bool) or not isinstance(layers, int):
        raise TypeError(f"layers must be an integer, got {layers!r}")
    found = depth.lists(model)
    for name, blocks in found.items():
        if not 1 <= layers < len(blocks):
            raise ValueError(
                f"layers must be 1 … {len(blocks) - 1}, fewer than {name} has, got {layers}"
            )
    if data is None:
        kept = {name: _evenly(len(blocks), layers) for name, blocks in found.items()}
    else:
        influence = depth.influences(model, calls_of(model, data))
        kept = {n: depth.chosen(n, len(b), layers, influence) for n, b in found.items()}
    # The copy must not copy what goes.
    gone: dict[int, Any] = {}
    for name, blocks in found.items():
        gone |= {id(block): None for i, block in enumerate(blocks) if i not in kept[name]}
    student = copy.deepcopy(model, gone)
    depth.keep(student, kept)
    return student


def _evenly(count: int, layers: int) -> list[int]:
    step = (count - 1) / max(layers - 1, 1)
    return [math.floor(i * step + 0.5) for i in range(layers)]
