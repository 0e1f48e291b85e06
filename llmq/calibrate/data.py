"""Calibration data in any form that the verbs take, as calls of the model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from llmq.calibrate.stages import Call
from llmq.models.batches import batches_of, unpack

_log = logging.getLogger("llmq")
WINDOWS = 128  # of running text that are used, evenly from all of it


def calls_of(model: nn.Module, data: Any) -> list[Call]:
    """Return what `model` is called with for each batch of `data`, on its device.

    Args:
        model: that will run it.
        data: running text as token ids [T] or [windows, T], of which at most 128 windows of 512
            are used, evenly from all of it; a pair (text or texts, tokenizer); or any iterable of
            batches: token ids, tensors, dicts of the model's arguments, or pairs (inputs,
            targets).

    Raises:
        ValueError: if there is no data.
        TypeError: if the data is of none of these forms.
    """
    is_text = isinstance(data, (Tensor, tuple)) and not (
        isinstance(data, Tensor) and data.is_floating_point()
    )
    if isinstance(data, Tensor) and data.is_floating_point():
        data = [data]
    batches: Iterable[Any] = batches_of(data)
    chosen = list(batches)
    if is_text and len(chosen) > WINDOWS:
        chosen = [chosen[i * len(chosen) // WINDOWS] for i in range(WINDOWS)]
    if not chosen:
        raise ValueError("data is empty; give at least one batch of what the model takes")
    parameter = next(model.parameters())
    takes = inspect.signature(model.forward).parameters
    calls = []
    for batch in chosen:
        args: tuple[Any, ...]
        kwargs: dict[str, Any]
        if isinstance(batch, Tensor) and "input_ids" not in takes:
            args, kwargs = (batch.to(parameter.device),), {}
        else:
            args, kwargs, _ = unpack(batch, parameter.device)
        calls.append((args, kwargs))
    return calls
