"""What a verb did to a model: one line a compressed layer, one a weight that it left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmq.nn import CompressedLayer, QuantEmbedding, QuantLinear, SparseLinear
from llmq.scheme import Scheme


class Untouched(NamedTuple):
    """A weight left as it was: the tensor's `name`, its `numel`, and the `reason`."""

    name: str
    numel: int
    reason: str


@dataclass
class LayerReport:
    """What became of one layer.

    Args:
        name: of the layer in the model.
        kind: what it was before: `"Linear"`, `"Conv1D"`, `"Embedding"`, `"expert"`.
        scheme: how its values are coded, None for floating point.
        pattern: which values are kept, None for all.
        weight_error: ‖before − after‖ / ‖before‖ of the last change to its weight; None if unknown.
        bytes_before: of weight and bias before any compression.
        bytes_after: of all its tensors, as a checkpoint holds them.
        kernel: what runs it for one token.
        reason: why that kernel.
        shape_before: weight [N, K] before a structured pruning.
        pruned: share of its weights that is gone, where it has a pattern.
    """

    name: str
    kind: str
    scheme: str | None
    pattern: str | None
    weight_error: float | None
    bytes_before: int
    bytes_after: int
    kernel: str
    reason: str
    shape_before: list[int] | None = None
    pruned: float | None = None


@dataclass
class ModelReport:
    """Every compressed layer of a model, every weight left alone, and what was chosen for it."""

    layers: list[LayerReport] = field(default_factory=list)
    untouched: list[Untouched] = field(default_factory=list)
    choice: str = ""

    @property
    def bytes_before(self) -> int:
        """Bytes of the compressed layers before any compression."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the compressed layers now."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_json(self) -> str:
        """Return the whole report as JSON."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        untouched = [weight._asdict() for weight in self.untouched]
        layers = [asdict(layer) for layer in self.layers]
        return json.dumps(
            {"choice": self.choice, **totals, "layers": layers, "untouched": untouched}, indent=1
        )

    def __str__(self) -> str:
        rows = [("layer", "kind", "scheme", "pattern", "error", "MB before", "after", "kernel")]
        for layer in self.layers:
            error = "" if layer.weight_error is None else f"{100 * layer.weight_error:.2f} %"
            share = "" if layer.pruned is None else f" {100 * layer.pruned:.1f} %"
            rows.append(
                (
                    layer.name,
                    layer.kind,
                    layer.scheme or "float",
                    (layer.pattern or "dense") + share,
                    error,
                    f"{layer.bytes_before / 1e6:.3f}",
                    f"{layer.bytes_after / 1e6:.3f}",
                    layer.kernel,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [self.choice] if self.choice else []
        for row in rows:
            cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        if self.bytes_before:
            ratio = self.bytes_after / self.bytes_before
            lines.append(
                f"{len(self.layers)} layers: {self.bytes_before / 1e6:.2f} MB -> "
                f"{self.bytes_after / 1e6:.2f} MB ({ratio:.3f})"
            )
        lines += _untouched_lines(self.untouched)
        return "\n".join(lines)


def _untouched_lines(untouched: list[Untouched]) -> list[str]:
    """One line a weight, but one for all vectors together: a model has hundreds of those."""
    vectors = [weight for weight in untouched if weight.reason == VECTOR]
    lines = []
    if untouched:
        total = sum(weight.numel for weight in untouched)
        lines.append(f"untouched: {len(untouched)} tensors, {total:,} numbers")
    lines += [f"  {w.name}: {w.numel:,} ({w.reason})" for w in untouched if w.reason != VECTOR]
    if vectors:
        total = sum(weight.numel for weight in vectors)
        lines.append(f"  {len(vectors)} norms and biases: {total:,}")
    return lines


VECTOR = "a vector: too small to matter"


def layer_report(
    name: str,
    kind: str,
    layer: nn.Module,
    *,
    weight_error: float | None,
    bytes_before: int,
    shape_before: list[int] | None = None,
) -> LayerReport:
    """Describe `layer` as it stands in the model now."""
    bytes_after = (
        layer.bytes()
        if isinstance(layer, CompressedLayer)
        else sum(p.numel() * p.element_size() for p in layer.parameters())
    )
    scheme: Scheme | None = None
    kernel, reason = "torch", "floating point"
    if isinstance(layer, QuantEmbedding):
        scheme, kernel, reason = layer.scheme, "look-up", "rows are dequantized as they are read"
    elif isinstance(layer, (QuantLinear, SparseLinear)):
        scheme = layer.scheme
        kernel, reason = layer.kernel(1)
    pattern, pruned = None, None
    if isinstance(layer, SparseLinear):
        mask = layer.mask()
        pattern, pruned = layer.pattern, 1 - int(mask.sum()) / max(mask.numel(), 1)
    return LayerReport(
        name,
        kind,
        None if scheme is None else scheme.name,
        pattern,
        weight_error,
        bytes_before,
        bytes_after,
        kernel,
        reason,
        shape_before,
        pruned,
    )


def few(names: list[str]) -> str:
    """Return the first of many names, and how many more there are."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def relative_error(before: Tensor, after: Tensor) -> float:
    """Return ‖before − after‖ / ‖before‖ of two weights [N, K]; 0 where both are zero."""
    norm = torch.linalg.vector_norm(before.float())
    error = torch.linalg.vector_norm(before.float() - after.float())
    return float(error / norm) if norm > 0 else float(error)


def untouched_weights(
    model: nn.Module, layers: set[str], reason: Callable[[str, Tensor], str]
) -> list[Untouched]:
    """Name and count each floating-point parameter of `model` outside of `layers`.

    Args:
        model: as it is after the verb.
        layers: names of modules whose own parameters the verb took care of.
        reason: from a parameter's name and tensor to why it was left alone.
    """
    return [
        Untouched(name, parameter.numel(), reason(name, parameter))
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in layers
    ]


class Change(NamedTuple):
    """What a verb did to one layer, for `attach`."""

    kind: str
    weight_error: float | None
    bytes_before: int
    shape_before: list[int] | None = None


def attach(
    model: nn.Module, changes: dict[str, Change], reasons: dict[str, str], choice: str = ""
) -> ModelReport:
    """Set `model.llmq_report`, which goes on from the report of the verb before.

    Args:
        model: as it is after the verb.
        changes: by layer name, what the verb changed.
        reasons: by module name, why a layer was left alone.
        choice: a line on what the verb chose by itself.
    """
    previous: ModelReport | None = getattr(model, "llmq_report", None)  # type: ignore[assignment]
    known = {layer.name: layer for layer in previous.layers} if previous else {}
    report = ModelReport(choice=choice or (previous.choice if previous else ""))
    for name, module in model.named_modules():
        change, before = changes.get(name), known.get(name)
        if change is None and before is None and not isinstance(module, CompressedLayer):
            continue
        if change is None and before is None:
            assert isinstance(module, CompressedLayer)
            change = Change(type(module).__name__, None, module.bytes())
        kind = before.kind if before else change.kind if change else ""
        error = change.weight_error if change else before.weight_error if before else None
        size = before.bytes_before if before else change.bytes_before if change else 0
        shape = before.shape_before if before and before.shape_before else None
        report.layers.append(
            layer_report(
                name,
                kind,
                module,
                weight_error=error,
                bytes_before=size,
                shape_before=shape or (change.shape_before if change else None),
            )
        )
    _count_shared_once(model, report)
    handled = {layer.name for layer in report.layers}

    def reason(name: str, parameter: Tensor) -> str:
        owner = name.rpartition(".")[0]
        if parameter.dim() < 2:
            return VECTOR
        module = model.get_submodule(owner)
        if isinstance(module, nn.Embedding):
            return reasons.get(owner, "embedding: skip=() compresses it")
        return reasons.get(owner, f"{type(module).__name__} is no linear layer")

    report.untouched = untouched_weights(model, handled, reason)
    model.llmq_report = report  # type: ignore[assignment]
    return report


def _count_shared_once(model: nn.Module, report: ModelReport) -> None:
    """Count a tensor that several layers share, as tied embeddings do, with the first of them."""
    seen: dict[int, str] = {}
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        parameter = module._parameters.get("weight")
        first = seen.setdefault(id(module if parameter is None else parameter), layer.name)
        if first != layer.name:
            own = 0
            bias = module._parameters.get("bias")
            if bias is not None:
                own = bias.numel() * bias.element_size()
            layer.bytes_before = layer.bytes_after = own
            layer.reason += f"; shares its tensors with {first}"
