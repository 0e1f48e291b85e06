"""How far each compressed layer's output is from the original's, by layer and by kind of layer."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmq.nn import CompressedLayer

_NUMBER = re.compile(r"\.(\d+)(?=\.)|^(\d+)(?=\.|$)")


@dataclass(frozen=True)
class LayerError:
    """How far one layer's output is from the original's: ‖y − y′‖ / ‖y‖, with its own input."""

    name: str
    scheme: str
    output_error: float
    kernel: str


def layer_errors(
    original: nn.Module, compressed: nn.Module, args: Any, kwargs: dict[str, Any]
) -> list[LayerError]:
    """Return each compressed layer's error, given the input that the layer has in the original.

    Args:
        original, compressed: models with layers of the same names.
        args, kwargs: what the original is called with, once.
    """
    before = dict(original.named_modules())
    pairs = [
        (name, before[name], module)
        for name, module in compressed.named_modules()
        if isinstance(module, CompressedLayer) and name in before and hasattr(module, "kernel")
    ]
    inputs: dict[str, tuple[Tensor, Tensor]] = {}
    with _recorded(pairs, inputs):
        original(*args, **kwargs)
    errors = []
    for name, _, module in pairs:
        if name not in inputs:
            continue
        x, y = inputs[name]
        device = next(module.parameters()).device
        given = module(x.to(device)).to(y.device)
        if given.shape != y.shape:  # a layer that structured pruning has shrunk
            continue
        norm = y.float().norm()
        error = float((given.float() - y.float()).norm() / norm) if norm > 0 else 0.0
        scheme = module.scheme.name if module.scheme else "float"  # type: ignore[union-attr]
        kernel = module.kernel(x.numel() // x.shape[-1]).name  # type: ignore[operator]
        errors.append(LayerError(name, str(scheme), error, kernel))
    return errors


@contextmanager
def _recorded(
    pairs: Sequence[tuple[str, nn.Module, nn.Module]], inputs: dict[str, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    handles = []
    for name, module, _ in pairs:

        def record(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                inputs[name] = (args[0].detach(), output.detach())

        handles.append(module.register_forward_hook(record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_kind(layers: Iterable[LayerError]) -> dict[str, dict[int, float]]:
    """Return the largest error at each depth, by kind of layer, in the order of the model.

    The kind is the name without its numbers, the depth the first number: `layers.3.mlp.up_proj` is
    `mlp.up_proj` at depth 3. What stands before that number belongs to the kind only if it differs
    between layers (`encoder.block`, `decoder.block`). A layer without a number is at depth 0.
    """
    places = []
    for layer in layers:
        found = _NUMBER.search(layer.name)
        start, end = found.span() if found else (0, 0)
        kind = _NUMBER.sub("", layer.name[end:]).lstrip(".")
        depth = int(found[1] or found[2]) if found else 0
        places.append((layer.name[:start] if found else None, kind, depth, layer.output_error))
    stacks = {stack for stack, *_ in places if stack is not None}
    kinds: dict[str, dict[int, float]] = {}
    for stack, kind, depth, error in places:
        name = f"{stack} {kind}" if stack and len(stacks) > 1 else kind or "layer"
        cells = kinds.setdefault(name, {})
        cells[depth] = max(error, cells.get(depth, 0.0))
    return kinds


def kind_rows(layers: Iterable[LayerError]) -> list[tuple[str, str, str, str, str]]:
    """Return rows of text by kind of layer: kind, count, median and largest error, its depth."""
    rows = []
    for kind, cells in by_kind(layers).items():
        depth, worst = max(cells.items(), key=lambda item: item[1])
        median = statistics.median(cells.values())
        rows.append(
            (kind, str(len(cells)), f"{100 * median:.2f} %", f"{100 * worst:.2f} %", str(depth))
        )
    return rows
