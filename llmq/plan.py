"""The verb `plan`: measures which format each layer bears and what it gains, and chooses.

Minimizes Σ cost(layer, format) with Σ KL(layer, format) under a budget (a multiple-choice knapsack,
solved exactly), where each KL is that of the whole model's output with that layer alone
compressed. Small changes add up nearly; how nearly is measured on the whole choice, the budget
follows, and text that had no part in the choice decides.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.candidates import make_layer, parse
from llmq.evaluate import WINDOW, batches_of
from llmq.nn import CompressedLayer, linear_weight
from llmq.options import (
    FLOAT,
    Measured,
    Minimize,
    Moments,
    Option,
    costs,
    measure,
    solve,
    unit_layers,
)
from llmq.prune import prune
from llmq.quantize import quantize
from llmq.report import Change, attach, relative_error
from llmq.sensitivity import Distance, Sensitivity, Unit, distance, input_moments
from llmq.walk import Found, Target, check_weight, find, swap

FORMATS = (
    "w8a8",
    "w8a8-g64",
    "w8a16",
    "w4a8-g32",
    "w4a16-g32",
    "w4a16-quantile-g32",
    "sparse 50 % w8a8",
)
_PROBE = 256  # tokens that single layers are measured on; every format of every layer runs them
_FIT = 2048  # tokens that whole choices are measured on
_ROUNDS = 8  # whole choices tried on those
_MARGIN = 0.95  # of the bound, aimed at


@dataclass(frozen=True)
class Choice:
    """What one unit becomes: `names` of its layers, the `option` taken, and the `reason`."""

    names: tuple[str, ...]
    title: str
    before: Option
    option: Option
    reason: str


@dataclass
class Plan:
    """What `llmq.plan` chose; `print` shows it as a table, `apply` does it.

    Args:
        choices: one a unit, in the order in which the model runs them.
        bound: what must hold: `"KL"` or `"perplexity"`, and the number.
        measured: on text that had no part in the choice; None if everything was left alone.
        tokens: of each call whose time was measured.
        tries: whole choices that were measured, the last of which held.
    """

    choices: list[Choice]
    bound: tuple[str, float]
    measured: Distance | None
    tokens: int
    tries: int
    skipped: list[str] = field(default_factory=list)
    moments: Moments = field(default_factory=dict, repr=False)  # of units that become low-rank

    @property
    def bytes_before(self) -> int:
        """Bytes of the layers' weights and biases as they are."""
        return sum(choice.before.bytes for choice in self.choices)

    @property
    def bytes_after(self) -> int:
        """Bytes of the layers as chosen."""
        return sum(choice.option.bytes for choice in self.choices)

    @property
    def seconds_before(self) -> float:
        """Seconds of the layers in one pass of the model, as they are."""
        return sum(choice.before.seconds for choice in self.choices)

    @property
    def seconds_after(self) -> float:
        """Seconds of the layers in one pass of the model, as chosen."""
        return sum(choice.option.seconds for choice in self.choices)

    def apply(self, model: nn.Module) -> nn.Module:
        """Compress `model` in place as planned and return it; its report is attached.

        Raises:
            ValueError: if the model's layers are not those that the plan was made for. The model is
                then as it was.
        """
        present = {
            target.name: target
            for group in find(model, (), embeddings=True).groups
            for target in group
        }
        planned = {name for choice in self.choices for name in choice.names}
        if planned - present.keys():
            raise ValueError(
                f"the plan is of another model: it names {min(planned - present.keys())}, which is "
                f"no layer here that can be compressed"
            )
        for name in planned:
            _check(present[name])
        before = [
            (parent, attribute, child)
            for parent in model.modules()
            for attribute, child in parent._modules.items()
        ]
        try:
            self._apply(model, present)
        except BaseException:
            for parent, attribute, child in before:
                parent._modules[attribute] = child
            raise
        return model

    def _apply(self, model: nn.Module, present: dict[str, Target]) -> None:
        formats = {choice.option.format for choice in self.choices} - {FLOAT}
        factored: set[str] = set()
        for name in sorted(formats, key=lambda name: not parse(name).low_rank):
            taken = {n for c in self.choices if c.option.format == name for n in c.names}
            wanted = parse(name)
            if wanted.low_rank:
                self._factor(model, name, {n: present[n] for n in sorted(taken)})
                factored |= taken
                continue
            # As shell patterns, which name one layer and nothing inside or outside of it.
            skip = tuple(f"[{n[0]}]{glob.escape(n[1:])}" for n in present.keys() - taken)
            skip += tuple(f"[{n[0]}]{glob.escape(n[1:])}.*" for n in factored)
            if wanted.sparse:
                prune(model, wanted.sparse, skip=skip)
            if wanted.scheme is not None:
                quantize(model, scheme=wanted.scheme, skip=skip)

    def _factor(self, model: nn.Module, format_: str, targets: dict[str, Target]) -> None:
        titles = {name: choice.title for choice in self.choices for name in choice.names}
        changes: dict[str, Change] = {}
        for name, target in targets.items():
            layer = make_layer(target.module, format_, self.moments[titles[name]])
            weight, bias = linear_weight(target.module)
            size = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)
            swap(model, Found(), [(target, layer)])
            error = relative_error(weight, layer.dequantize())
            changes[f"{name}.down"] = Change("low-rank", None, 0)
            changes[f"{name}.up"] = Change("low-rank", error, size)
        attach(model, changes, {})

    def to_json(self) -> str:
        """Return everything as JSON, but what `apply` needs of the data."""
        totals = {
            name: getattr(self, name)
            for name in ("bytes_before", "bytes_after", "seconds_before", "seconds_after")
        }
        kept = asdict(replace(self, moments={}))
        del kept["moments"]
        return json.dumps({**kept, **totals}, indent=1)

    def __str__(self) -> str:
        rows = [("layers", "format", "KL alone", "us", "was", "bytes", "reason")]
        for choice in self.choices:
            option, before = choice.option, choice.before
            rows.append(
                (
                    choice.title,
                    option.format,
                    f"{option.kl:.5f}",
                    f"{1e6 * option.seconds:.1f}",
                    f"{1e6 * before.seconds:.1f}",
                    f"{option.bytes / max(before.bytes, 1):.3f}",
                    choice.reason,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        kind, limit = self.bound
        lines.append(
            f"{len(self.choices)} units: {self.bytes_before / 1e6:.1f} MB -> "
            f"{self.bytes_after / 1e6:.1f} MB "
            f"({self.bytes_after / max(self.bytes_before, 1):.3f}), "
            f"{1e6 * self.seconds_before:.0f} us -> {1e6 * self.seconds_after:.0f} us for "
            f"{self.tokens} token{'s' if self.tokens > 1 else ''} through all of them"
        )
        if self.measured is not None:
            found = self.measured
            kl: Any = found.intervals.get("kl", found.kl)
            rise: Any = found.intervals.get("nll", found.nll)
            loss = "" if found.nll is None else f", nll {rise:+.5f}"
            lines.append(
                f"held-out text: KL {kl:.5f}{loss} over {found.tokens} tokens; bound: {kind} "
                f"{limit:g}; {self.tries} choices tried"
            )
        lines += [f"left alone: {name}" for name in self.skipped]
        return "\n".join(lines)


def plan(
    model: nn.Module,
    data: Any,
    *,
    max_kl: float | None = None,
    max_perplexity_increase: float | None = None,
    device: torch.device | str | None = None,
    minimize: Minimize = "both",
    formats: Sequence[str] = FORMATS,
    tokens: int = 1,
    skip: tuple[str, ...] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Plan:
    """Choose a format for each linear layer of `model`, which stays as it is.

    Layers that share an input (q/k/v, gate/up) get one format. Formats round to nearest and prune
    by magnitude; factors are those that lose least for the data's inputs.

    Args:
        model: a language model or classifier, not compressed yet.
        data: as `llmq.evaluate` takes it, two batches or windows at least: the first half is
            measured on, the second checks the outcome.
        max_kl: bound on the mean KL divergence from the original's output, in nats a token; 0.01
            if no bound is given.
        max_perplexity_increase: bound on perplexity instead, as a share: 0.005 for half a percent.
        device: where to measure; None for where the model is.
        minimize: `"time"` (of one call of each layer), `"bytes"` of a checkpoint, or the sum of
            `"both"` as shares of the original's.
        formats: names of schemes, `"sparse N % SCHEME"` or `"low-rank N % SCHEME"` (factors with N
            % of the weight's numbers), or `… float`, among which to choose.
        tokens: that a call is timed for; 1 for decoding.
        skip: layers to leave alone, as in `llmq.quantize`.
        resume: a file that keeps what is measured, from which an interrupted plan goes on.

    Returns:
        A plan whose bound held on the second half of the data.

    Raises:
        ValueError: if a bound or format is unusable, the data is too short, a layer is compressed
            already or has weights that are not finite, or `resume` belongs to another plan.

    Example:
        >>> plan = llmq.plan(model, tokens, max_kl=0.01)
        >>> print(plan)
        >>> plan.apply(model)
    """
    bound = _bound(max_kl, max_perplexity_increase)
    if minimize not in ("both", "time", "bytes"):
        raise ValueError(f'minimize must be "both", "time" or "bytes", got {minimize!r}')
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a positive integer, got {tokens!r}")
    for name in formats:
        parse(name)
    found = find(model, skip, embeddings=False)
    for group in found.groups:
        for target in group:
            _check(target)
    probe, fit, held = _split(data)
    home = next(model.parameters()).device
    if device is not None:
        model.to(device)
    try:
        sensitivity = Sensitivity(model, probe)
        units = sensitivity.units(found.groups)
        kept = Measured(resume, model, probe, units)
        factored = any(parse(name).low_rank for name in formats)
        moments = input_moments(model, fit, units) if factored else {}
        options = measure(sensitivity, units, tuple(formats), tokens, kept, moments)
        del sensitivity  # holds the logits and every block's output
        choice, measured, tries = _choose(
            model, units, options, fit, held, bound, minimize, moments
        )
    finally:
        if device is not None:
            model.to(home)
    cost = costs(options, minimize)
    choices = [_reason(*parts) for parts in zip(units, options, cost, choice, strict=True)]
    skipped = sorted(f"{name}: {why}" for name, why in found.reasons.items())
    taken = {c.title: moments[c.title] for c in choices if c.option.format.startswith("low-rank")}
    return Plan(choices, bound, measured, tokens, tries, skipped, taken)


def _bound(max_kl: float | None, max_perplexity_increase: float | None) -> tuple[str, float]:
    if max_kl is not None and max_perplexity_increase is not None:
        raise ValueError("give max_kl or max_perplexity_increase, not both")
    name = "max_perplexity_increase" if max_kl is None else "max_kl"
    value = max_kl if max_perplexity_increase is None else max_perplexity_increase
    value = 0.01 if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return ("KL" if max_perplexity_increase is None else "perplexity", float(value))


def _check(target: Target) -> None:
    if isinstance(target.module, CompressedLayer):
        raise ValueError(f"{target.name} is compressed already; plan the original model")
    check_weight(target.name, linear_weight(target.module)[0])


def _split(data: Any) -> tuple[Any, list[Any], list[Any]]:
    """Return what to measure single layers on, whole choices on, and to check the outcome on."""
    batches = list(batches_of(data))
    if len(batches) < 2:
        raise ValueError(
            f"data holds {len(batches)} batch; plan needs two at least, one to measure on and one "
            f"to check the outcome on (running text is cut into windows of {WINDOW} tokens)"
        )
    half = (len(batches) + 1) // 2
    fit, held = batches[:half], batches[half:]
    probe = fit[0][:, :_PROBE] if isinstance(fit[0], Tensor) else fit[0]
    taken: list[Any] = []
    rows = 0
    for batch in fit:
        if rows < _FIT:
            taken.append(batch)
            rows += batch.numel() if isinstance(batch, Tensor) else 1
    return probe, taken, held


def _choose(
    model: nn.Module,
    units: list[Unit],
    options: list[list[Option]],
    fit: list[Any],
    held: list[Any],
    bound: tuple[str, float],
    minimize: Minimize,
    moments: Moments,
) -> tuple[list[int], Distance | None, int]:
    """Return the choice of the largest budget that keeps the bound as a whole, and its check."""
    kind, given = bound
    limit = given if kind == "KL" else math.log1p(given)
    cost = costs(options, minimize)
    tries = 0

    def whole(choice: list[int], batches: list[Any]) -> Distance:
        nonlocal tries
        tries += 1
        layers: dict[str, nn.Module] = {}
        targets: list[Target] = []
        for unit, row, i in zip(units, options, choice, strict=True):
            if i:
                layers.update(unit_layers(unit, row[i].format, moments))
                targets += unit.targets
        return distance(model, batches, layers, targets)

    def loss(found: Distance) -> float:
        if kind == "KL":
            return found.kl
        if found.nll is None:
            raise ValueError("a bound on perplexity needs labels; give max_kl, or data with labels")
        return found.nll

    budget = _largest(options, cost, _MARGIN * limit, lambda choice: loss(whole(choice, fit)))
    choice = solve(options, cost, budget)
    while any(choice):
        measured = whole(choice, held)
        if loss(measured) <= limit:
            return choice, measured, tries
        # Held-out text is harder: back off by as much as it is past the bound, and a little more.
        failed = choice
        budget = min(budget, _spent(options, choice)) * 0.9 * limit / loss(measured)
        while any(choice) and choice == failed:
            choice, budget = solve(options, cost, budget), 0.9 * budget
    return choice, None, tries


def _largest(
    options: list[list[Option]],
    cost: list[list[float]],
    limit: float,
    loss: Callable[[list[int]], float],
) -> float:
    """Return a budget for Σ KL whose choice loses nearly `limit` as a whole, and not more."""
    cheapest = solve(options, cost, math.inf)
    low, high, budget = 0.0, math.inf, limit
    with tqdm(total=_ROUNDS, desc="plan: whole", unit="choice", delay=1, leave=False) as progress:
        for _ in range(_ROUNDS):
            choice = solve(options, cost, budget)
            if not any(choice):
                break
            found = loss(choice)
            progress.update()
            if found <= limit:
                low = budget
                if choice == cheapest or found > 0.9 * limit:
                    break
            else:
                high = budget
            budget *= min(limit / max(found, 1e-12), 4.0)
            if not 1.02 * low < budget < 0.98 * high:
                budget = (low + high) / 2 if high < math.inf else 2 * low
    return low


def _spent(options: list[list[Option]], choice: list[int]) -> float:
    return sum(row[i].kl for row, i in zip(options, choice, strict=True))


def _reason(unit: Unit, row: list[Option], cost: list[float], i: int) -> Choice:
    if not unit.calls:
        reason = "the data does not reach it"
    elif len(row) == 1:
        reason = "no format fits its shape"
    elif cost[i] == min(cost):
        reason = "costs least"
    else:
        cheaper = min((j for j in range(len(row)) if cost[j] < cost[i]), key=lambda j: row[j].kl)
        reason = f"{row[cheaper].format} would lose {row[cheaper].kl:.5f}"
    names = tuple(target.name for target in unit.targets)
    return Choice(names, unit.name, row[0], row[i], reason)
