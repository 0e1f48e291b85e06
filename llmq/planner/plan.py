"""The verb `plan`: measures which format each layer bears and what it gains, and chooses.

Minimizes Σ cost(layer, format) with Σ KL(layer, format) under a budget (a multiple-choice knapsack)
and Σ time(layer, format) no more than the fastest 8-bit format takes for all layers, to decode and
to read a prompt. Each KL is that of the whole model's output with that layer alone compressed.
Small changes add up nearly; how nearly is measured on the whole choice, the budget follows, and
text that had no part in the choice decides, by the upper end of its confidence interval.
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibrate.data import calls_of
from llmq.evaluation.evaluate import WINDOW, batches_of
from llmq.evaluation.sensitivity import Distance, Sensitivity, Unit, input_moments
from llmq.models.targets import Found, Target, check_weight, find, swap
from llmq.nn import CompressedLayer, linear_bytes, linear_weight
from llmq.planner.calibrated_layers import (
    CalibratedLayers,
    CalibratedUnit,
    Divisions,
    divisions_of,
)
from llmq.planner.costs import (
    EIGHT_BITS,
    FLOAT,
    Measurements,
    Minimize,
    Moments,
    Option,
    costs,
    measure,
    parted,
    replacement,
    total_seconds,
    uniform_seconds,
)
from llmq.planner.knapsack import choose, solve_within
from llmq.planner.layer_format import make_layer, parse
from llmq.pruning.prune import prune
from llmq.quantization.quantize import quantize
from llmq.report import Change, attach, relative_error
from llmq.storage.fingerprint import fingerprint
from llmq.storage.resume import Store

# What `accelerate` takes into one op a decoder layer; quantile and sparse formats it does not.
FORMATS = ("w8a8", "w8a8-g64", "w8a16", "w4a8-g32", "w4a16-g32")
# And what data can make of them.
CALIBRATED = (
    "w8a8 smoothquant+gptq",
    "w8a8-g64 smoothquant+gptq",
    "w4a8-g32 gptq",
    "w4a8-g64 gptq",
    "w4a16-g32 gptq",
    "w4a16-g64 gptq",
)
TOKENS = (1, 512)  # decoding, and a prompt
_PROBE = 256  # tokens that single layers are measured on; every format of every layer runs them
_FIT = 2048  # tokens that whole choices are measured on
_TIE = 1.03  # times of the same layer differ by as much from one measurement to the next


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
        tokens: of the calls whose time was measured.
        tries: whole choices that were measured.
        limits: seconds that the layers were to take at most in one pass, for each of `tokens`.
        validated: what `measured` is, on each further text.
        calibrated: what data made of the units that become calibrated formats, by title.
    """

    choices: list[Choice]
    bound: tuple[str, float]
    measured: Distance | None
    tokens: tuple[int, ...]
    tries: int
    skipped: list[str] = field(default_factory=list)
    limits: tuple[float, ...] = ()
    validated: dict[str, Distance] = field(default_factory=dict)
    moments: Moments = field(default_factory=dict, repr=False)  # of units that become low-rank
    calibrated: dict[str, CalibratedUnit] = field(default_factory=dict, repr=False)

    @property
    def bytes_before(self) -> int:
        """Bytes of the layers' weights and biases as they are."""
        return sum(choice.before.bytes for choice in self.choices)

    @property
    def bytes_after(self) -> int:
        """Bytes of the layers as chosen."""
        return sum(choice.option.bytes for choice in self.choices)

    @property
    def seconds_before(self) -> tuple[float, ...]:
        """Seconds of the layers in one pass of the model as they are, for each of `tokens`."""
        return tuple(total_seconds([choice.before for choice in self.choices]))

    @property
    def seconds_after(self) -> tuple[float, ...]:
        """Seconds of the layers in one pass of the model as chosen, for each of `tokens`."""
        return tuple(total_seconds([choice.option for choice in self.choices]))

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
        # What scales divide comes first, so that all formats are made of what is divided already.
        divisions = divisions_of(self.calibrated.values())
        for writer, division in divisions.items():
            target = present.get(writer) or division.target(model)
            divided = replace(target, module=division.of(target.module))
            swap(model, Found(), [(target, divided.module)])
            present = {**present, writer: divided}
        formats = {choice.option.format for choice in self.choices} - {FLOAT}
        factored: set[str] = set()
        for name in sorted(formats, key=lambda name: not parse(name).low_rank):
            taken = {n for c in self.choices if c.option.format == name for n in c.names}
            wanted = parse(name)
            if wanted.low_rank:
                self._factor(model, name, {n: present[n] for n in sorted(taken)})
                factored |= taken
                continue
            if wanted.calibrated:
                self._place(model, name, present, divisions)
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
            weight, size = linear_weight(target.module)[0], linear_bytes(target.module)
            swap(model, Found(), [(target, layer)])
            error = relative_error(weight, layer.dequantize())
            changes[f"{name}.down"] = Change("low-rank", None, 0)
            changes[f"{name}.up"] = Change("low-rank", error, size)
        attach(model, changes, {})

    def _place(
        self, model: nn.Module, format_: str, present: dict[str, Target], divisions: Divisions
    ) -> None:
        changes: dict[str, Change] = {}
        for choice in self.choices:
            if choice.option.format != format_:
                continue
            made = self.calibrated[choice.title]
            targets = [present[name] for name in choice.names]
            layers = made.layers(format_, {t.name: t.module for t in targets}, divisions)
            for target in targets:
                weight = linear_weight(target.module)[0]
                error = relative_error(weight, made.unscaled(layers[target.name].dequantize()))
                changes[target.name] = Change(target.kind, error, linear_bytes(target.module))
            swap(model, Found(), [(target, layers[target.name]) for target in targets])
        attach(model, changes, {})

    def to_json(self) -> str:
        """Return everything as JSON, but what `apply` needs of the data."""
        totals = {
            name: getattr(self, name)
            for name in ("bytes_before", "bytes_after", "seconds_before", "seconds_after")
        }
        kept = asdict(replace(self, moments={}, calibrated={}))
        del kept["moments"], kept["calibrated"]
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
                    _micro(option.seconds),
                    _micro(before.seconds),
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
            f"({self.bytes_after / max(self.bytes_before, 1):.3f})"
        )
        parts = zip(self.tokens, self.seconds_before, self.seconds_after, strict=True)
        for i, (M, before_, after) in enumerate(parts):
            limit_ = f", at most {1e6 * self.limits[i]:.0f} asked" if self.limits else ""
            lines.append(
                f"{M} token{'s' if M > 1 else ''} through all of them: {1e6 * before_:.0f} us -> "
                f"{1e6 * after:.0f} us{limit_}"
            )
        if self.measured is not None:
            for name, found in {"held-out text": self.measured, **self.validated}.items():
                kl: Any = found.intervals.get("kl", found.kl)
                rise: Any = found.intervals.get("nll", found.nll)
                loss = "" if found.nll is None else f", nll {rise:+.5f}"
                lines.append(f"{name}: KL {kl:.5f}{loss} over {found.tokens} tokens")
            lines.append(f"bound: {kind} {limit:g}; {self.tries} choices tried")
        lines += [f"left alone: {name}" for name in self.skipped]
        return "\n".join(lines)


def _micro(seconds: tuple[float, ...]) -> str:
    return " ".join(f"{1e6 * each:.0f}" for each in seconds)


def plan(
    model: nn.Module,
    data: Any,
    *,
    max_kl: float | None = None,
    max_perplexity_increase: float | None = None,
    device: torch.device | str | None = None,
    minimize: Minimize = "both",
    formats: Sequence[str] | None = None,
    tokens: int | Sequence[int] = TOKENS,
    no_slower_than: str | None = EIGHT_BITS,
    calibration: Any = None,
    validation: Any = None,
    skip: tuple[str, ...] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Plan:
    """Choose a format for each linear layer of `model`, which stays as it is.

    Layers that share an input (q/k/v, gate/up) get one format. Formats round to nearest and prune
    by magnitude unless they name an algorithm; factors are those that lose least for the data's
    inputs. What data made of the layers is kept in the plan, so that `apply` needs none.

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
        formats: names of schemes, alone or with an algorithm (`"w4a16-g32 gptq"`, `"w8a8
            smoothquant"`), `"sparse N % SCHEME"` or `"low-rank N % SCHEME"` (factors with N % of
            the weight's numbers), or `… float`, among which to choose. None for `FORMATS`, and
            `CALIBRATED` where there is `calibration`.
        tokens: one count or several that calls are timed for; 1 for decoding, more for prompts.
            With several, time is the mean of the shares of the original's.
        no_slower_than: one of the formats, `"float"`, or the default `"8 bits"` for the one of 8
            bits that is fastest if all layers are in it: for none of `tokens` are the layers to
            take over 3 % longer than they would so, which is what timing cannot tell apart. None
            sets no limit. Where the bound leaves no such choice, the bound comes first: compare
            `seconds_after` and `limits`.
        calibration: data for the algorithms, in any form that `llmq.quantize` takes; None for the
            first half of `data`. Scales are folded into norms and linear layers. Each layer is
            coded for the inputs that the original gives it, a block at a time in memory.
        validation: further text that the bound must hold on, as `data`, or several as a dict by
            name: text of another kind than `data` may lose more.
        skip: layers to leave alone, as in `llmq.quantize`.
        resume: a directory that keeps what is measured and calibrated. If the call is interrupted,
            the same call goes on from there. None keeps it in memory.

    Returns:
        A plan whose bound held on the second half of the data and on each text of `validation`, at
        the upper end of the 95 % interval over windows; the mean where there is one window only.
        A few windows make a wide interval, and so a timid plan: 16 of each text would do.

    Raises:
        ValueError: if a bound or format is unusable, the data is too short, a layer is compressed
            already or has weights that are not finite, or `resume` holds work of another plan.

    Example:
        >>> plan = llmq.plan(model, tokens, max_kl=0.01)
        >>> print(plan)
        >>> plan.apply(model)
    """
    bound = _bound(max_kl, max_perplexity_increase)
    if minimize not in ("both", "time", "bytes"):
        raise ValueError(f'minimize must be "both", "time" or "bytes", got {minimize!r}')
    counts = _counts(tokens)
    if formats is None:
        formats = FORMATS if calibration is None else FORMATS + CALIBRATED
    wanted = [parse(name) for name in formats]
    if no_slower_than not in (None, EIGHT_BITS, FLOAT, *formats):
        raise ValueError(
            f'no_slower_than must be "{EIGHT_BITS}", "float", None or one of the formats, got '
            f"{no_slower_than!r}"
        )
    found = find(model, skip, embeddings=False)
    for group in found.groups:
        for target in group:
            _check(target)
    probe, fit, held = _split(data)
    texts = {"": held, **_texts(validation)}
    home = next(model.parameters()).device
    if device is not None:
        model.to(device)
    try:
        sensitivity = Sensitivity(model, probe)
        units = sensitivity.units(found.groups)
        calibrated = CalibratedLayers(model)
        measurements = Measurements(_store(resume, model, probe, units))
        if any(form.calibrated for form in wanted):
            calls = calls_of(model, fit if calibration is None else calibration)
            folder = None if resume is None else Path(resume) / "calibrated"
            calibrated = CalibratedLayers(model, _store(folder, model, calls, units))
            measurements.calibration_run = calibrated.store.run
            calibrated.calibrate(units, formats, calls)
        factored = any(form.low_rank for form in wanted)
        moments = input_moments(model, fit, units) if factored else {}
        options = measure(
            sensitivity, units, tuple(formats), counts, measurements, moments, calibrated
        )
        del sensitivity  # holds the logits and every block's output
        limits = [
            _TIE * seconds
            for seconds in (uniform_seconds(options, no_slower_than) if no_slower_than else ())
        ]
        cost = costs(options, minimize)

        def solved(budget: float) -> list[int]:
            return solve_within(options, cost, budget, limits)

        def changed(choice: list[int]) -> tuple[dict[str, nn.Module], list[Target]]:
            parts = zip(units, options, choice, strict=True)
            taken = [(unit, row[i].format) for unit, row, i in parts if i]
            return parted(replacement(taken, moments, calibrated))

        checked = choose(model, options, cost, solved, changed, fit, texts, bound)
    finally:
        if device is not None:
            model.to(home)
    chosen = [_reason(*parts) for parts in zip(units, options, cost, checked.choice, strict=True)]
    chosen_units = list(zip(units, chosen, strict=True))
    return Plan(
        chosen,
        bound,
        checked.distances.pop("", None),
        counts,
        checked.tries,
        sorted(f"{name}: {why}" for name, why in found.reasons.items()),
        tuple(limits),
        checked.distances,
        {c.title: moments[c.title] for c in chosen if c.option.format.startswith("low-rank")},
        {
            choice.title: made
            for unit, choice in chosen_units
            if choice.option.format != FLOAT and parse(choice.option.format).calibrated
            if (made := calibrated.get(unit, choice.option.format)) is not None
        },
    )


def _store(
    directory: str | os.PathLike[str] | None, model: nn.Module, data: Any, units: list[Unit]
) -> Store:
    """Return the store of what this data tells of the model's units."""
    if directory is None:
        return Store(None)
    names = [unit.name for unit in units]
    return Store(directory, fingerprint(model.named_parameters(), data, names))


def _counts(tokens: int | Sequence[int]) -> tuple[int, ...]:
    counts = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    if not counts or any(isinstance(M, bool) or not isinstance(M, int) or M < 1 for M in counts):
        raise ValueError(f"tokens must be a positive integer or several, got {tokens!r}")
    return counts


def _texts(validation: Any) -> dict[str, list[Any]]:
    """Return the batches of each further text by its name."""
    if validation is None:
        return {}
    named = validation if isinstance(validation, Mapping) else {"validation": validation}
    texts = {str(name): list(batches_of(data)) for name, data in named.items()}
    for name, batches in texts.items():
        if not batches or not name:
            raise ValueError(f"validation needs names and text, got {name!r} without")
    return texts


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


def _reason(unit: Unit, row: list[Option], cost: list[float], i: int) -> Choice:
    if not unit.calls:
        reason = "the data does not reach it"
    elif len(row) == 1:
        reason = "no format fits its shape"
    elif cost[i] == min(cost):
        reason = "costs least"
    else:
        cheaper = min((j for j in range(len(row)) if cost[j] < cost[i]), key=lambda j: row[j].kl)
        other = row[cheaper]
        slower = any(a > b for a, b in zip(other.seconds, row[i].seconds, strict=True))
        takes = f", take {_micro(other.seconds)} us" if slower else ""
        reason = f"{other.format} would lose {other.kl:.5f}{takes}"
    names = tuple(target.name for target in unit.targets)
    return Choice(names, unit.name, row[0], row[i], reason)
