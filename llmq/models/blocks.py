"""The blocks of a model, such as a Transformer's layers, and running a model with some replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the entries of the outermost ModuleLists by name, such as a Transformer's layers."""
    found: dict[str, nn.Module] = {}
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{o}.") for o in lists):
            lists.append(name)
            found.update({f"{name}.{i}": child for i, child in enumerate(module)})
    # One that stands in two places, or runs twice, has no single output to keep.
    modules = [id(module) for module in found.values()]
    return {name: module for name, module in found.items() if modules.count(id(module)) == 1}


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` run `forward`; its attributes, which model code reads, stay."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def constant(value: Any) -> Callable[..., Any]:
    """Return a function that returns `value`, whatever it is called with."""
    return lambda *args, **kwargs: value
