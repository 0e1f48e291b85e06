"""The verb `plan`: measures what each format costs and loses in each layer, and chooses.

Minimizes Σ cost(layer, format) with Σ KL(layer, format) within a budget (a multiple-choice
knapsack), and with Σ time(layer, format) at most that of the fastest 8-bit format. Each KL is that
of the whole model's output with this layer alone compressed. KLs of single layers add up only
approximately, so `search.py` measures whole choices and corrects the budget. The bound must hold on
text that had no part in the choice, at the upper end of its confidence interval.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibrate.data import calls_of
from llmq.evaluation.sensitivity import Sensitivity, Unit, input_moments
from llmq.models.batches import WINDOW, batches_of
from llmq.models.targets import Target, find
from llmq.planner.calibrated_layers import CalibratedLayers
from llmq.planner.costs import (
    EIGHT_BITS,
    FLOAT,
    Measurements,
    Minimize,
    Option,
    costs,
    measure,
    parted,
    replacement,
    uniform_seconds,
)
from llmq.planner.knapsack import solve_within
from llmq.planner.layer_format import parse
from llmq.planner.result import Choice, Plan, check_target, microseconds
from llmq.planner.search import choose_within_bound
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
    """Choose a format for each linear layer, so that the whole model stays within a bound.

    The model is not changed: `apply` of the returned plan compresses it. Layers that share an input
    (q/k/v, gate/up) get the same format. Weights are rounded to nearest and pruned by magnitude
    unless a format names an algorithm.

    Args:
        model: a language model or classifier that is not compressed yet.
        data: as `llmq.evaluate` takes it, at least two batches or windows. Formats are measured on
            the first half; the bound is checked on the second half.
        max_kl: bound on the mean KL divergence from the original's output, in nats a token. It is
            0.01 if no bound is given.
        max_perplexity_increase: bound on the rise of perplexity, as a share: 0.005 for 0.5 %. Give
            this or `max_kl`.
        device: where to measure. None measures where the model is.
        minimize: `"time"` of one call of each layer, `"bytes"` of a checkpoint, or `"both"`: the
            sum of the two, each as a share of the original's.
        formats: the formats to choose from. Each is a scheme's name (`"w8a8"`), a scheme's name and
            an algorithm of `llmq.quantize` (`"w4a16-g32 gptq"`), `"sparse N % SCHEME"`, or
            `"low-rank N % SCHEME"` for two factors with N % of the weight's numbers. SCHEME may be
            `float`. None stands for `FORMATS`, and for `CALIBRATED` too if there is `calibration`.
        tokens: how many tokens a timed call has, as one number or several: 1 for decoding, more for
            a prompt. Of several, the mean share of the original's time counts.
        no_slower_than: a limit on time: the layers may take at most 3 % longer than if all of them
            had this format, for each of `tokens`. Timing cannot tell smaller differences. Choose
            one of `formats`, `"float"`, or `"8 bits"` for the fastest 8-bit format. None sets no
            limit. If no choice is within both, the bound holds and the limit does not: compare
            `seconds_after` with `limits`.
        calibration: data for the algorithms, as `llmq.quantize` takes it. None stands for the first
            half of `data`.
        validation: more text on which the bound must hold, as `data`, or several as a dict by name.
            Text of another kind than `data` may lose more.
        skip: layers to leave alone, as in `llmq.quantize`.
        resume: a directory that keeps what is measured and calibrated. If the call is interrupted,
            the same call goes on from there. None keeps it in memory.

    Returns:
        The plan. Its bound holds on the second half of `data` and on each text of `validation`: the
        upper end of the 95 % confidence interval over windows is within it, or the mean if there is
        only one window. With few windows the interval is wide and the plan cautious; 16 windows of
        each text are enough.

    Raises:
        ValueError: if a bound or a format cannot be used, if there is too little data, if a layer
            is compressed already or has weights that are not finite, or if `resume` holds work of
            another plan.

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
            check_target(target)
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

        checked = choose_within_bound(model, options, cost, solved, changed, fit, texts, bound)
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
        takes = f", take {microseconds(other.seconds)} us" if slower else ""
        reason = f"{other.format} would lose {other.kl:.5f}{takes}"
    names = tuple(target.name for target in unit.targets)
    return Choice(names, unit.name, row[0], row[i], reason)
