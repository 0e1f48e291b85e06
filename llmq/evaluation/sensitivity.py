"""How much a model's output changes when some of its layers are compressed.

Layers that share an input (q/k/v, gate/up) are found by watching one batch pass, so that no model's
code needs to be known. Blocks before the one in question do not run again: their outputs, which
cannot have changed, are kept from the first run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.evaluation import intervals
from llmq.evaluation.compare import divergences
from llmq.evaluation.evaluate import inference, progress
from llmq.evaluation.intervals import Interval
from llmq.models.batches import aligned, by_row, counted, logits_of, unpack
from llmq.models.blocks import blocks, constant, running
from llmq.models.targets import Target

_ROWS = 1024  # rows of logits that one log-softmax takes


@dataclass(frozen=True)
class Unit:
    """Linear layers that get one format: they share an input or a weight."""

    targets: tuple[Target, ...]
    calls: int  # of each in a pass of the model; 0 where the data does not come through

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
    """Between the outputs of the original and of a changed model.

    Args:
        kl: KL(original ‖ changed) in nats a token.
        nll: by how much the negative log-likelihood of the labels rose, in nats; None if there
            are no labels.
        tokens: compared.
        intervals: of 95 % of `"kl"` and `"nll"`; none if the data is one row.
    """

    kl: float
    nll: float | None
    tokens: int
    intervals: dict[str, Interval]


class Sensitivity:
    """Compares what `model` gives on one batch with some layers replaced with what it gave before.

    Args:
        model: that gives logits.
        batch: as `evaluate.unpack` takes it; the original's log-probabilities are kept, one
            float32 a token and vocabulary entry, and the output of each block.
        headless: whether a model without logits is judged by its first output, what is kept then.

    Raises:
        ValueError: if the model gives no logits, or not even a tensor.
    """

    def __init__(self, model: nn.Module, batch: Any, *, headless: bool = False) -> None:
        self.model = model
        self.batch = batch
        self.headless = False
        self._blocks = blocks(model)
        self._order: dict[str, int] = {}
        self._kept: dict[str, Any] = {}  # each block's output
        with inference(model), _watched(self._blocks, self._kept, self._order):
            output, labels = _call(model, batch)
            self.headless = headless and logits_of(output) is None
            logits = self._of(output, labels)
            # In place of the logits: each comparison needs it, and takes twice as long without.
            parts = [part.float() for part in logits.split(_ROWS)]
            self._log = torch.cat([p if self.headless else p.log_softmax(-1) for p in parts])

    @property
    def rows(self) -> int:
        """How many rows of outputs are compared."""
        return len(self._log)

    def _of(self, output: Any, labels: Tensor | None) -> Tensor:
        """Return what is compared of a model's output, [rows, features]."""
        if not self.headless:
            return _flat(self.model, output, labels)[0]
        hidden = output[0]
        if not isinstance(hidden, Tensor):
            raise ValueError(f"{type(self.model).__name__} gives neither logits nor a tensor first")
        return hidden.reshape(-1, hidden.shape[-1])

    def units(self, groups: list[list[Target]]) -> list[Unit]:
        """Gather the targets that share an input, in the order in which they run."""
        named = {target.name: group for group in groups for target in group}
        calls: list[tuple[str, Tensor]] = []
        with inference(self.model), ExitStack() as stack:
            for group in groups:
                for target in group:
                    stack.enter_context(_noted(target, calls))
            _call(self.model, self.batch)
        units: list[list[Target]] = []
        placed: dict[str, list[Target]] = {}
        # Within a block only: all decoder layers read an encoder's output, and need not be alike.
        by_input: dict[tuple[int, str | None], list[Target]] = {}
        for name, x in calls:
            if name in placed:
                continue
            unit = by_input.setdefault((id(x), self._block_of(name)), [])
            if not unit:
                units.append(unit)
            for target in named[name]:
                placed[target.name] = unit
                unit.append(target)
        rest = [group for group in groups if group[0].name not in placed]
        times = [name for name, _ in calls]
        return [
            *(Unit(tuple(targets), times.count(targets[0].name)) for targets in units),
            *(Unit(tuple(group), 0) for group in rest),
        ]

    def kl(self, replaced: dict[str, nn.Module], targets: Sequence[Target]) -> float:
        """Return the mean KL with `targets` replaced by the layers of their names.

        Of a headless model it is Σ‖h − h'‖² / Σ‖h‖² of its first output h.
        """
        with _replaced(replaced, targets), inference(self.model), self._replayed(targets):
            logits = self._of(*_call(self.model, self.batch))
        if self.headless:
            gone = (self._log - logits.float()).double().square().sum()
            return float(gone / self._log.double().square().sum().clamp_min(1e-300))
        total = 0.0
        for before, after in zip(self._log.split(_ROWS), logits.split(_ROWS), strict=True):
            log = after.float().log_softmax(-1)
            total += float(F.kl_div(log, before, log_target=True, reduction="sum"))
        return total / logits.shape[0]

    @contextmanager
    def _replayed(self, targets: Sequence[Target]) -> Iterator[None]:
        """Let blocks that come before all of `targets` give what they gave before."""
        first = min(self._order.get(self._block_of(t.name) or "", -1) for t in targets)
        with ExitStack() as stack:
            for name, block in self._blocks.items():
                if self._order.get(name, first) < first:
                    stack.enter_context(running(block, constant(self._kept[name])))
            yield

    def _block_of(self, name: str) -> str | None:
        return next((block for block in self._blocks if name.startswith(f"{block}.")), None)


def input_moments(model: nn.Module, batches: list[Any], units: list[Unit]) -> dict[str, Tensor]:
    """Return Σ xᵀx, float32 [K, K], of the inputs of each unit that is reached, by its name.

    All units' are in memory at once, K² numbers each.
    """
    found: dict[str, Tensor] = {}
    with inference(model), ExitStack() as stack:
        for unit in units:

            def add(_m: nn.Module, args: Any, kwargs: Any, name: str = unit.name) -> None:
                x = (*args, *kwargs.values())[0]
                x = x.reshape(-1, x.shape[-1]).float()
                if name not in found:
                    found[name] = x.new_zeros(x.shape[1], x.shape[1])
                found[name].addmm_(x.T, x)

            # One layer of a unit speaks for all: they share the input.
            module = unit.targets[0].module
            handle = module.register_forward_pre_hook(add, with_kwargs=True)
            stack.callback(handle.remove)
        for batch in progress(batches, "plan: inputs"):
            _run(model, batch)
    return found


def distance(
    model: nn.Module,
    batches: list[Any],
    replaced: dict[str, nn.Module],
    targets: Sequence[Target],
) -> Distance:
    """Compare a model with itself with `targets` replaced, batch by batch; none is kept."""
    kl: list[float] = []
    counts: list[float] = []
    nll: tuple[list[float], list[float]] = ([], [])
    with inference(model):
        for batch in progress(batches, "plan: check"):
            before, loss, rows = _run(model, batch)
            with _replaced(replaced, targets):
                after, changed, _ = _run(model, batch)
            found = divergences(before, after)[0]
            kl += by_row(found, rows)
            counts += by_row(torch.ones_like(found), rows)
            if loss is not None and changed is not None:
                nll[0].extend(by_row(loss, rows))
                nll[1].extend(by_row(changed, rows))
    total = sum(counts)
    labelled = len(nll[0]) == len(kl)
    found_intervals = {}
    if len(kl) > 1:
        found_intervals["kl"] = intervals.mean(kl, counts)
        if labelled:
            found_intervals["nll"] = intervals.difference(*nll, counts)
    rise = (sum(nll[1]) - sum(nll[0])) / total if labelled else None
    return Distance(sum(kl) / total, rise, int(total), found_intervals)


def _run(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return logits [tokens, vocabulary], the loss of each where there are labels, and its row."""
    return _flat(model, *_call(model, batch))


def _call(model: nn.Module, batch: Any) -> tuple[Any, Tensor | None]:
    """Return the model's output, and labels where there are some."""
    args, kwargs, labels = unpack(batch, next(model.parameters()).device)
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False
    return model(*args, **kwargs), labels


def _flat(
    model: nn.Module, output: Any, labels: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    logits = logits_of(output)
    if logits is None:
        raise ValueError(f"{type(model).__name__} gives no logits; plan needs a model with a head")
    if labels is None:
        flat = logits.reshape(-1, logits.shape[-1])
        rows = torch.arange(flat.shape[0], device=flat.device)
        return flat, None, rows // max(flat.shape[0] // logits.shape[0], 1)
    flat, wanted, rows = counted(*aligned(model, output, labels))
    parts = zip(flat.split(_ROWS), wanted.split(_ROWS), strict=True)
    loss = [F.cross_entropy(part.float(), right, reduction="none") for part, right in parts]
    return flat, torch.cat(loss), rows


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
        lambda _module, args, kwargs: calls.append((target.name, (*args, *kwargs.values())[0])),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced(layers: dict[str, nn.Module], targets: Sequence[Target]) -> Iterator[None]:
    try:
        for target in targets:
            for parent, attribute in target.places:
                setattr(parent, attribute, layers[target.name])
        yield
    finally:
        for target in targets:
            for parent, attribute in target.places:
                setattr(parent, attribute, target.module)
