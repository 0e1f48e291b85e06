"""How much a model's output changes when some of its layers are compressed.

Layers that share an input (q/k/v, gate/up) are found by watching one batch pass, so that no model's
code needs to be known. Blocks before the one in question do not run again: their outputs, which
cannot have changed, are kept from the first run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from llmq.blocks import blocks, constant, running
from llmq.compare import divergence
from llmq.evaluate import aligned, inference, logits_of, unpack
from llmq.walk import Target

_ROWS = 1024  # rows of logits that one log-softmax takes


@dataclass(frozen=True)
class Unit:
    """Linear layers that get one format: they share an input or a weight."""

    targets: tuple[Target, ...]
    reached: bool  # whether the data came through

    @property
    def name(self) -> str:
        """Names that share a parent as one: `layers.0.self_attn.{q_proj,k_proj}`."""
        by_parent: dict[str, list[str]] = {}
        for target in self.targets:
            parent, _, last = target.name.rpartition(".")
            by_parent.setdefault(parent, []).append(last)
        parts = []
        for parent, children in by_parent.items():
            names = children[0] if len(children) == 1 else f"{{{','.join(children)}}}"
            parts.append(f"{parent}.{names}" if parent else names)
        return " ".join(parts)

    def distinct(self) -> list[Target]:
        """The targets, those that share a weight once."""
        return list({id(t.module._parameters["weight"]): t for t in self.targets}.values())


@dataclass(frozen=True)
class Distance:
    """Between the outputs of the original and of a changed model, a mean over `rows`.

    Args:
        kl: KL(original ‖ changed) in nats a token.
        nll: by how much the negative log-likelihood of the labels rose, in nats; None if there
            are no labels.
        rows: compared.
    """

    kl: float
    nll: float | None
    rows: int


class Sensitivity:
    """Compares outputs of `model`, with some layers replaced, with those it had before.

    Args:
        model: that gives logits.
        batches: as `evaluate.unpack` takes them; the original's logits on them are kept, one
            float32 a row and vocabulary entry, and the output of each block.

    Raises:
        ValueError: if the model gives no logits.
    """

    def __init__(self, model: nn.Module, batches: list[Any]) -> None:
        self.model = model
        self.batches = batches
        takes = inspect.signature(model.forward).parameters
        self._without_cache = {"use_cache": False} if "use_cache" in takes else {}
        self._blocks = blocks(model)
        self._order: dict[str, int] = {}
        self._kept: list[dict[str, Any]] = []  # by batch, each block's output
        self._logits: list[Tensor] = []
        self._nll: list[float | None] = []
        with inference(model):
            for batch in batches:
                kept: dict[str, Any] = {}
                with _watched(self._blocks, kept, self._order):
                    logits, nll = self._run(batch)
                self._kept.append(kept)
                self._logits.append(logits)
                self._nll.append(nll)

    def units(self, groups: list[list[Target]]) -> list[Unit]:
        """Gather the targets that share an input, in the order in which they run."""
        named = {target.name: group for group in groups for target in group}
        calls: list[tuple[str, Tensor]] = []
        with inference(self.model), ExitStack() as stack:
            for group in groups:
                for target in group:
                    stack.enter_context(_noted(target, calls))
            self._run(self.batches[0])
        units: list[list[Target]] = []
        placed: dict[str, list[Target]] = {}
        previous: Tensor | None = None
        for name, x in calls:
            if name not in placed:
                if previous is None or x is not previous:
                    units.append([])
                for target in named[name]:
                    placed[target.name] = units[-1]
                    units[-1].append(target)
            previous = x
        rest = [group for group in groups if group[0].name not in placed]
        return [
            *(Unit(tuple(targets), reached=True) for targets in units if targets),
            *(Unit(tuple(group), reached=False) for group in rest),
        ]

    def distance(self, replaced: dict[str, nn.Module], targets: list[Target]) -> Distance:
        """Compare with `targets` replaced by the layers of their names, and put them back."""
        kl, nll, rows, labelled = 0.0, 0.0, 0, True
        with _replaced(replaced, targets), inference(self.model):
            for i, batch in enumerate(self.batches):
                with self._replayed(i, targets):
                    logits, loss = self._run(batch)
                kl += divergence(self._logits[i], logits)[0]
                rows += logits.shape[0]
                before = self._nll[i]
                if loss is None or before is None:
                    labelled = False
                else:
                    nll += (loss - before) * logits.shape[0]
        return Distance(kl / rows, nll / rows if labelled else None, rows)

    def _run(self, batch: Any) -> tuple[Tensor, float | None]:
        """Return logits [rows, vocabulary], and the mean loss where there are labels."""
        args, kwargs, labels = unpack(batch, next(self.model.parameters()).device)
        output = self.model(*args, **{**kwargs, **self._without_cache})
        logits = logits_of(output)
        if logits is None:
            raise ValueError(
                f"{type(self.model).__name__} gives no logits; plan needs a model with a head"
            )
        if labels is None:
            return logits.reshape(-1, logits.shape[-1]), None
        logits, labels = aligned(self.model, output, labels)
        flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        counted = wanted != -100
        flat, wanted = flat[counted], wanted[counted]
        loss = sum(
            float(F.cross_entropy(part.float(), right, reduction="sum"))
            for part, right in zip(flat.split(_ROWS), wanted.split(_ROWS), strict=True)
        )
        return flat, loss / max(len(wanted), 1)

    @contextmanager
    def _replayed(self, batch: int, targets: list[Target]) -> Iterator[None]:
        """Let blocks that come before all of `targets` give what they gave before."""
        first = min(self._order.get(self._block_of(t.name) or "", -1) for t in targets)
        with ExitStack() as stack:
            for name, block in self._blocks.items():
                if self._order.get(name, first) < first:
                    stack.enter_context(running(block, constant(self._kept[batch][name])))
            yield

    def _block_of(self, name: str) -> str | None:
        return next((block for block in self._blocks if name.startswith(f"{block}.")), None)


@contextmanager
def _watched(
    blocks: dict[str, nn.Module], kept: dict[str, Any], order: dict[str, int]
) -> Iterator[None]:
    """Note what each block gives, and when it ran; one that runs twice is not noted."""
    handles = []
    twice: set[str] = set()
    for name, block in blocks.items():

        def note(_m: nn.Module, _i: Any, output: Any, name: str = name) -> None:
            if name in kept:
                twice.add(name)
            kept[name] = output
            order.setdefault(name, len(order))

        handles.append(block.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in twice:
            order.pop(name, None)


@contextmanager
def _noted(target: Target, calls: list[tuple[str, Tensor]]) -> Iterator[None]:
    handle = target.module.register_forward_pre_hook(
        lambda _module, args: calls.append((target.name, args[0]))
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced(layers: dict[str, nn.Module], targets: list[Target]) -> Iterator[None]:
    try:
        for target in targets:
            for parent, attribute in target.places:
                setattr(parent, attribute, layers[target.name])
        yield
    finally:
        for target in targets:
            for parent, attribute in target.places:
                setattr(parent, attribute, target.module)
