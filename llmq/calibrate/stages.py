"""Runs data through a model block by block.

The calls of one block are kept at a time: those of the next are found by running the model again up
to it, with the blocks before standing for what they gave, as already compressed. So each block is
compressed for the inputs that it will get, as in GPTQ (Frantar et al., arXiv:2210.17323, section
3.3), in memory for the model and one block's activations. No model's code needs to be known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.models.blocks import blocks, constant, running

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a forward


@dataclass
class Stage:
    """A part of a model that is compressed at a time, and what each batch calls it with."""

    name: str  # of a block; "" for all that is in no block, which is called with the batches
    module: nn.Module
    calls: list[Call]
    replayed: list[dict[str, Any]]  # by batch, outputs of blocks that need not run again

    def run(self) -> Iterator[Any]:
        """Give the part's output of each batch, as the part is now."""
        for call, outputs in zip(self.calls, self.replayed, strict=True):
            with _replaying(self.module, outputs):
                yield self.module(*call[0], **call[1])


def stages(model: nn.Module, batches: list[Call], what: str = "calibrate") -> Iterator[Stage]:
    """Give the parts of `model` in the order in which they run; change each before the next.

    Args:
        model: in evaluation mode; runs without gradients.
        batches: what the model is called with.
        what: on the progress bar.

    Raises:
        ValueError: if the data gives a block NaN or infinite inputs.
    """
    order = _order(model, batches[0])
    replayed: list[dict[str, Any]] = [{} for _ in batches]
    with tqdm(total=len(order) + 1, desc=what, unit="block", delay=1, leave=False) as progress:
        for i, name in enumerate(order):
            block = model.get_submodule(name)
            calls = [
                _call_of(model, block, batch, outputs)
                for batch, outputs in zip(batches, replayed, strict=True)
            ]
            if not all(_finite(call) for call in calls):
                raise ValueError(
                    f"{name} gets NaN or infinite inputs from the data; check the data, or run "
                    f"the model in float32"
                )
            stage = Stage(name, block, calls, [{}] * len(calls))
            yield stage
            stage.module = model.get_submodule(name)  # itself a layer that was replaced, perhaps
            before = order[i - 1] if i else ""
            for output, outputs in zip(stage.run(), replayed, strict=True):
                outputs[name] = output
                if before.rpartition(".")[0] == name.rpartition(".")[0]:
                    outputs[before] = _poisoned(outputs[before])
            progress.update()
        yield Stage("", model, batches, replayed)
        progress.update()


class _Reached(Exception):  # noqa: N818
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call: Call = (args, kwargs)


def _call_of(model: nn.Module, block: nn.Module, batch: Call, outputs: dict[str, Any]) -> Call:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(args, kwargs)

    try:
        with _replaying(model, outputs), running(block, stop):
            model(*batch[0], **batch[1])
    except _Reached as reached:
        return reached.call
    raise ValueError("a batch does not reach a block that the first batch reaches")


@contextmanager
def _replaying(model: nn.Module, outputs: dict[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, output in outputs.items():
            stack.enter_context(running(model.get_submodule(name), constant(output)))
        yield


def _order(model: nn.Module, batch: Call) -> list[str]:
    """Return the blocks in the order in which they run; none, if they cannot be told apart.

    Each must run once, and read outputs of the block before it and of the last of another list
    (an encoder) only, so that the others need not be kept.
    """
    calls: list[str] = []
    outputs: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, block in blocks(model).items():

            def note(_m: nn.Module, _i: Any, output: Any, name: str = name) -> None:
                calls.append(name)
                outputs[name] = output

            stack.callback(block.register_forward_hook(note).remove)
        model(*batch[0], **batch[1])
    order = [name for name in dict.fromkeys(calls) if calls.count(name) == 1]
    known: dict[str, Any] = {}
    for i, name in enumerate(order):
        if not _finite(_call_of(model, model.get_submodule(name), batch, known)):
            genuine = i == 0 or not _finite(outputs[order[i - 1]])
            return order if genuine else []
        known[name] = outputs[name]
        if i and order[i - 1].rpartition(".")[0] == name.rpartition(".")[0]:
            known[order[i - 1]] = _poisoned(outputs[order[i - 1]])
    return order


def _poisoned(value: Any) -> Any:
    """Return `value` with its floating-point tensors as NaN that take no memory."""
    return _mapped(value, lambda t: t.new_full((), torch.nan).expand(t.shape))


def _finite(value: Any) -> bool:
    """Whether the floating-point tensors in `value` hold no NaN; infinities stand in masks."""
    bad: list[bool] = []

    def note(tensor: Tensor) -> Tensor:
        bad.append(bool(tensor.isnan().any()))
        return tensor

    _mapped(value, note)
    return not any(bad)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        made = {key: _mapped(entry, change) for key, entry in value.items()}
        return type(value)(**made) if hasattr(value, "to_tuple") else made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(entry, change) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(entry, change) for entry in value)
    return value
