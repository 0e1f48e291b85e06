"""The verb `plan`: measures which format each layer bears and what it gains, and chooses.

Minimizes Σ cost(layer, format) with Σ KL(layer, format) under a budget (a multiple-choice knapsack,
solved by its Lagrangian), where each KL is that of the whole model's output with that layer alone
compressed. Small changes add up nearly; how nearly is measured on the whole choice, the budget
follows, and text that had no part in the choice decides.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.candidates import fits, make_layer, parse, seconds_a_call
from llmq.evaluate import WINDOW, batches_of
from llmq.nn import CompressedLayer, QuantLinear, SparseLinear, linear_weight
from llmq.prune import prune
from llmq.quantize import quantize
from llmq.sensitivity import Distance, Sensitivity, Unit
from llmq.walk import Target, check_weight, find

FLOAT = "float"  # left alone
FORMATS = (
    "w8a8",
    "w8a8-g64",
    "w8a16",
    "w4a8-g32",
    "w4a16-g32",
    "w4a16-quantile-g32",
    "sparse 50 % w8a8",
)
Minimize = Literal["both", "time", "bytes"]
_PROBE = 256  # tokens that single layers are measured on; every format of every layer runs them
_FIT = 2048  # tokens that whole choices are measured on
_ROUNDS = 8  # whole choices tried on those
_MARGIN = 0.95  # of the bound, aimed at


@dataclass(frozen=True)
class Option:
    """One format for one unit: what it costs and what it loses.

    Args:
        format: a scheme's name, `"sparse N % <scheme>"` or `"float"`.
        kl: of the whole model's output with this unit alone in that format, in nats a token.
        seconds: of one call of each of the unit's layers.
        bytes: of the unit's layers in a checkpoint.
    """

    format: str
    kl: float
    seconds: float
    bytes: int


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
    tries: int = 0
    skipped: list[str] = field(default_factory=list)

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
        """Seconds of one call of each layer as it is."""
        return sum(choice.before.seconds for choice in self.choices)

    @property
    def seconds_after(self) -> float:
        """Seconds of one call of each layer as chosen."""
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
        formats = {choice.option.format for choice in self.choices} - {FLOAT}
        for name in sorted(formats):
            taken = {n for c in self.choices if c.option.format == name for n in c.names}
            # As shell patterns, which name one layer and nothing inside or outside of it.
            skip = tuple(f"[{n[0]}]{glob.escape(n[1:])}" for n in present.keys() - taken)
            rate, scheme = parse(name)
            if rate:
                prune(model, rate, skip=skip)
            quantize(model, scheme=scheme, skip=skip)
        return model

    def to_json(self) -> str:
        """Return everything as JSON."""
        totals = {
            name: getattr(self, name)
            for name in ("bytes_before", "bytes_after", "seconds_before", "seconds_after")
        }
        return json.dumps({**asdict(self), **totals}, indent=1)

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
            f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        )
        if self.measured is not None:
            loss = "" if self.measured.nll is None else f", nll +{self.measured.nll:.5f}"
            lines.append(
                f"held-out text: KL {self.measured.kl:.5f}{loss} over {self.measured.rows} tokens; "
                f"bound: {kind} {limit:g}; {self.tries} choices tried"
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
    by magnitude.

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
        formats: names of schemes, or `"sparse N % SCHEME"`, among which to choose.
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
        units, options = _measure(model, probe, found.groups, tuple(formats), tokens, resume)
        plan = _choose(model, units, options, fit, held, bound, minimize)
    finally:
        if device is not None:
            model.to(home)
    plan.tokens = tokens
    plan.skipped = sorted({f"{name}: {why}" for name, why in found.reasons.items()})
    return plan


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


def _split(data: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Return batches to measure single layers on, whole choices on, and to check the outcome on."""
    batches = list(batches_of(data))
    if len(batches) < 2:
        raise ValueError(
            f"data holds {len(batches)} batch; plan needs two at least, one to measure on and one "
            f"to check the outcome on (running text is cut into windows of {WINDOW} tokens)"
        )
    half = (len(batches) + 1) // 2
    fit, held = batches[:half], batches[half:]
    probe = [fit[0][:, :_PROBE]] if isinstance(fit[0], Tensor) else fit[:1]
    taken: list[Any] = []
    rows = 0
    for batch in fit:
        if rows < _FIT:
            taken.append(batch)
            rows += batch.numel() if isinstance(batch, Tensor) else 1
    return probe, taken, held


def _measure(
    model: nn.Module,
    probe: list[Any],
    groups: list[Any],
    formats: tuple[str, ...],
    tokens: int,
    resume: str | os.PathLike[str] | None,
) -> tuple[list[Unit], list[list[Option]]]:
    """Return the units and, for each, its options; the first is to leave it alone."""
    sensitivity = Sensitivity(model, probe)
    units = sensitivity.units(groups)
    kept = _Measured(resume, model, probe, units)
    device = next(model.parameters()).device
    options: list[list[Option]] = []
    with tqdm(units, desc="plan", unit="unit", delay=1, leave=False) as progress:
        for unit in progress:
            shapes = [linear_weight(t.module)[0].shape for t in unit.distinct()]
            dtype = linear_weight(unit.targets[0].module)[0].dtype
            fitting = tuple(f for f in formats if all(fits(f, *shape) for shape in shapes))
            times: dict[str, float] = dict.fromkeys((FLOAT, *fitting), 0.0)
            for target in unit.targets:
                N, K = linear_weight(target.module)[0].shape
                for name, seconds in seconds_a_call(N, K, fitting, tokens, dtype, device).items():
                    times[name] += seconds
            size = sum(_float_bytes(t.module) for t in unit.distinct())
            row = [Option(FLOAT, 0.0, times[FLOAT], size)]
            for name in fitting if unit.reached else ():
                layers, after = _layers(unit, name)
                kl = kept.get(unit, name)
                if kl is None:
                    kl = sensitivity.distance(layers, list(unit.targets)).kl
                    kept.put(unit, name, kl)
                row.append(Option(name, max(kl, 0.0), times[name], after))
            options.append(row)
    return units, options


def _layers(unit: Unit, name: str) -> tuple[dict[str, nn.Module], int]:
    """Return the unit's layers in format `name`, by target, and their bytes."""
    made: dict[int, QuantLinear | SparseLinear] = {}
    layers: dict[str, nn.Module] = {}
    for target in unit.targets:
        key = id(target.module._parameters["weight"])
        if key not in made:
            layer = make_layer(target.module, name)
            assert isinstance(layer, (QuantLinear, SparseLinear))
            made[key] = layer
        layers[target.name] = made[key]
    return layers, sum(layer.bytes() for layer in made.values())


def _float_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in linear_weight(module) if t is not None)


def solve(options: list[list[Option]], costs: list[list[float]], budget: float) -> list[int]:
    """Choose one option a unit, of least Σ cost with Σ KL within `budget`.

    By the Lagrangian cost + λ · KL (Everett, Operations Research 11, 1963), whose λ is bisected;
    what is left of the budget then goes to the changes that save the most for it. Every first
    option has KL 0, so there is always a choice.
    """

    def best(multiplier: float) -> list[int]:
        choice = []
        for row, cost in zip(options, costs, strict=True):
            total = [c + multiplier * option.kl for c, option in zip(cost, row, strict=True)]
            choice.append(total.index(min(total)))
        return choice

    def spent(choice: list[int]) -> float:
        return sum(row[i].kl for row, i in zip(options, choice, strict=True))

    choice = best(0.0)
    if spent(choice) <= budget:
        return choice
    low, high = 0.0, 1.0
    while spent(best(high)) > budget:
        low, high = high, high * 4
        if high > 1e30:
            return [0] * len(options)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(best(middle)) <= budget else (middle, high)
    choice = best(high)
    left = budget - spent(choice)
    while True:
        gains = [
            ((cost[at] - cost[i]) / max(row[i].kl - row[at].kl, 1e-30), u, i)
            for u, (row, cost, at) in enumerate(zip(options, costs, choice, strict=True))
            for i in range(len(row))
            if cost[i] < cost[at] and row[i].kl - row[at].kl <= left
        ]
        if not gains:
            return choice
        _, u, i = max(gains)
        left -= options[u][i].kl - options[u][choice[u]].kl
        choice[u] = i


def _choose(
    model: nn.Module,
    units: list[Unit],
    options: list[list[Option]],
    fit: list[Any],
    held: list[Any],
    bound: tuple[str, float],
    minimize: Minimize,
) -> Plan:
    """Find the largest budget whose choice keeps within the bound as a whole, and check it."""
    kind, given = bound
    limit = given if kind == "KL" else math.log1p(given)
    costs = _costs(options, minimize)
    seen: dict[tuple[int, ...], float] = {}
    sensitivity = Sensitivity(model, fit)

    def loss(distance: Distance) -> float:
        if kind == "KL":
            return distance.kl
        if distance.nll is None:
            raise ValueError("a bound on perplexity needs labels; give max_kl, or data with labels")
        return distance.nll

    def whole(choice: list[int], on: Sensitivity) -> Distance:
        layers: dict[str, nn.Module] = {}
        targets: list[Target] = []
        for unit, row, i in zip(units, options, choice, strict=True):
            if i:
                layers.update(_layers(unit, row[i].format)[0])
                targets += unit.targets
        return on.distance(layers, targets)

    budget, low, high = _MARGIN * limit, 0.0, math.inf
    accepted: list[int] | None = None
    with tqdm(total=_ROUNDS, desc="plan: whole", unit="choice", delay=1, leave=False) as progress:
        for _ in range(_ROUNDS):
            choice = solve(options, costs, budget)
            key = tuple(choice)
            if not any(choice):
                break
            if key not in seen:
                seen[key] = loss(whole(choice, sensitivity))
                progress.update()
            if seen[key] <= _MARGIN * limit:
                accepted, low = choice, budget
                if seen[key] > 0.9 * _MARGIN * limit or choice == solve(options, costs, math.inf):
                    break
            else:
                high = budget
            ratio = _MARGIN * limit / max(seen[key], 1e-12)
            budget = min(max(budget * min(ratio, 2.0), 1.02 * low), 0.98 * high)
            if not low < budget < high:
                budget = (low + min(high, 2 * low)) / 2 if low else high / 2
    choice = accepted or [0] * len(units)
    check = Sensitivity(model, held)
    tries = len(seen)
    measured: Distance | None = None
    budget = low
    while any(choice):
        measured = whole(choice, check)
        tries += 1
        if loss(measured) <= limit:
            break
        # Held-out text is harder: back off by as much as it is past the bound, and a little more.
        budget *= 0.9 * min(1.0, limit / loss(measured))
        choice = solve(options, costs, budget)
        measured = None
    choices = [
        _reason(unit, row, cost, i)
        for unit, row, cost, i in zip(units, options, costs, choice, strict=True)
    ]
    return Plan(choices, bound, measured, tokens=1, tries=tries)


def _costs(options: list[list[Option]], minimize: Minimize) -> list[list[float]]:
    seconds = max(sum(row[0].seconds for row in options), 1e-30)
    size = max(sum(row[0].bytes for row in options), 1)
    by_time, by_size = minimize != "bytes", minimize != "time"
    return [
        [by_time * option.seconds / seconds + by_size * option.bytes / size for option in row]
        for row in options
    ]


def _reason(unit: Unit, row: list[Option], cost: list[float], i: int) -> Choice:
    if not unit.reached:
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


class _Measured:
    """KL by unit and format, in a file that an interrupted plan goes on from."""

    def __init__(
        self,
        file: str | os.PathLike[str] | None,
        model: nn.Module,
        probe: list[Any],
        units: list[Unit],
    ) -> None:
        self.file = None if file is None else Path(file)
        self.values: dict[str, float] = {}
        if self.file is None:
            return
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            digest.update(
                f"{name} {list(parameter.shape)} {float(parameter.double().sum())}".encode()
            )
        digest.update(repr(probe).encode())
        digest.update(" ".join(unit.name for unit in units).encode())
        self.key = digest.hexdigest()
        if self.file.exists():
            try:
                kept = json.loads(self.file.read_text())
                key, self.values = kept["key"], kept["kl"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.file} holds no measurements of a plan") from error
            if key != self.key:
                raise ValueError(
                    f"{self.file} was measured for another model or other data; delete it or name "
                    f"another file"
                )

    def get(self, unit: Unit, name: str) -> float | None:
        return self.values.get(f"{unit.name} {name}")

    def put(self, unit: Unit, name: str, kl: float) -> None:
        self.values[f"{unit.name} {name}"] = kl
        if self.file is not None:
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps({"key": self.key, "kl": self.values}))
            os.replace(partial, self.file)
