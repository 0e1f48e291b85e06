"""What each format would cost and lose in each part of a model, and the choice of least cost.

A multiple-choice knapsack: one format a unit, least Σ cost with Σ KL within a budget.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq import dispatch
from llmq.candidates import fits, make_layer, parse, seconds_a_call
from llmq.nn import LowRankLinear, QuantLinear, SparseLinear, linear_weight
from llmq.sensitivity import Sensitivity, Unit

FLOAT = "float"  # left alone
Minimize = Literal["both", "time", "bytes"]
_STEPS = 1 << 14  # of the budget that `solve` tells apart
_LEAST = 1e-9  # KL of whatever is not left alone: rounding makes it 0 or less


@dataclass(frozen=True)
class Option:
    """One format for one unit: what it costs and what it loses.

    Args:
        format: a scheme's name, `"sparse N % <scheme>"` or `"float"`.
        kl: of the whole model's output with this unit alone in that format, in nats a token.
        seconds: of the unit's layers in one pass of the model.
        bytes: of the unit's layers in a checkpoint.
    """

    format: str
    kl: float
    seconds: float
    bytes: int


def measure(
    sensitivity: Sensitivity,
    units: list[Unit],
    formats: tuple[str, ...],
    tokens: int,
    kept: Measured,
    moments: Moments,
) -> list[list[Option]]:
    """Return the options of each unit; the first is to leave it alone.

    Args:
        sensitivity: of the model that the units are of.
        units: of `sensitivity.units`.
        formats: to choose among; those that do not fit a unit's shapes are left out.
        tokens: that a call is timed for.
        kept: KL and times measured before.
        moments: of the inputs of each unit, where there are any.
    """
    shapes = [(*linear_weight(t.module)[0].shape,) for unit in units for t in unit.targets]
    layers = Counter(shapes)
    options: list[list[Option]] = []
    with tqdm(units, desc="plan", unit="unit", delay=1, leave=False) as progress:
        for unit in progress:
            weights = [linear_weight(t.module)[0] for t in unit.targets]
            fitting = tuple(f for f in formats if _fit(unit, f, weights))
            times = Counter[str]()
            for weight in weights:
                N, K = weight.shape
                found = kept.seconds(
                    N, K, fitting, tokens, weight.dtype, weight.device, layers[N, K]
                )
                times.update({name: unit.calls * seconds for name, seconds in found.items()})
            size = sum(_float_bytes(t.module) for t in unit.distinct())
            row = [Option(FLOAT, 0.0, times[FLOAT], size)]
            for name in fitting if unit.calls else ():
                made = unit_layers(unit, name, moments)
                kl = kept.get(unit, name)
                if kl is None:
                    kl = sensitivity.kl(made, unit.targets)
                    kept.put(unit, name, kl)
                if math.isfinite(kl):
                    after = sum(_bytes(made[target.name]) for target in unit.distinct())
                    row.append(Option(name, max(kl, _LEAST), times[name], after))
            options.append(row)
    return options


Moments = dict[str, Tensor]  # Σ xᵀx of a unit's inputs [K, K], by the unit's name


def _fit(unit: Unit, name: str, weights: list[Tensor]) -> bool:
    # Factors of a weight that several layers share would have to be shared too.
    shared = parse(name).low_rank and len(unit.distinct()) < len(unit.targets)
    return not shared and all(fits(name, *weight.shape) for weight in weights)


def unit_layers(unit: Unit, name: str, moments: Moments) -> dict[str, nn.Module]:
    """Return the unit's layers in format `name`, by target."""
    own = moments.get(unit.name)
    return {target.name: make_layer(target.module, name, own) for target in unit.targets}


def _bytes(layer: nn.Module) -> int:
    assert isinstance(layer, (QuantLinear, SparseLinear, LowRankLinear))
    return layer.bytes()


def _float_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in linear_weight(module) if t is not None)


def costs(options: list[list[Option]], minimize: Minimize) -> list[list[float]]:
    """Return the cost of each option: time, bytes or both, as shares of the original's."""
    seconds = max(sum(row[0].seconds for row in options), 1e-30)
    size = max(sum(row[0].bytes for row in options), 1)
    by_time, by_size = minimize != "bytes", minimize != "time"
    return [
        [by_time * option.seconds / seconds + by_size * option.bytes / size for option in row]
        for row in options
    ]


def solve(options: list[list[Option]], costs: list[list[float]], budget: float) -> list[int]:
    """Choose one option a unit, of least Σ cost with Σ KL within `budget`.

    By dynamic programming over the budget in 2¹⁴ steps (Kellerer, Pferschy and Pisinger, Knapsack
    Problems, 2004, section 11.5), each KL rounded up to a step: no choice whose KL is a step a unit
    within the budget costs less. Every first option has KL 0, so there is always a choice.
    """
    if budget == math.inf:
        return [cost.index(min(cost)) for cost in costs]
    least = torch.zeros(_STEPS + 1, dtype=torch.float64)  # cost of the units so far, by steps spent
    picked = []
    for row, cost in zip(options, costs, strict=True):
        totals = torch.full((len(row), _STEPS + 1), math.inf, dtype=torch.float64)
        for i, option in enumerate(row):
            steps = _steps(option, budget)
            if steps <= _STEPS:
                totals[i, steps:] = least[: _STEPS + 1 - steps] + cost[i]
        least, pick = totals.min(0)
        picked.append(pick)
    left, choice = _STEPS, []
    for row, pick in zip(reversed(options), reversed(picked), strict=True):
        choice.append(int(pick[left]))
        left -= _steps(row[choice[-1]], budget)
    return choice[::-1]


def _steps(option: Option, budget: float) -> int:
    if option.kl <= 0:
        return 0
    return math.ceil(min(option.kl / budget, 2.0) * _STEPS) if budget > 0 else _STEPS + 1


class Measured:
    """KL by unit and format, and times, in a file that an interrupted plan goes on from.

    Times too, as those of another minute might make another plan than the one that was interrupted.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | None,
        model: nn.Module,
        batch: Any,
        units: list[Unit],
    ) -> None:
        self.file = None if file is None else Path(file)
        self.values: dict[str, float] = {}
        self.times: dict[str, dict[str, float]] = {}
        self.key = ""
        if self.file is None:
            return
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            total = float(parameter.detach().double().sum())
            digest.update(f"{name} {list(parameter.shape)} {total}".encode())
        _digest(batch, digest)
        digest.update(" ".join(unit.name for unit in units).encode())
        self.key = digest.hexdigest()
        if self.file.exists():
            try:
                kept = json.loads(self.file.read_text())
                key, self.values, self.times = kept["key"], kept["kl"], kept["seconds"]
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
        self._write()

    def seconds(self, *call: Any) -> dict[str, float]:
        """Return `seconds_a_call(*call)`, as measured before on such a CPU with as many threads."""
        if self.file is None:
            return seconds_a_call(*call)
        name = " ".join(map(str, (dispatch.cpu_isa(), torch.get_num_threads(), *call)))
        if name not in self.times:
            self.times[name] = seconds_a_call(*call)
            self._write()
        return self.times[name]

    def _write(self) -> None:
        if self.file is not None:
            kept = {"key": self.key, "kl": self.values, "seconds": self.times}
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(kept))
            os.replace(partial, self.file)


def _digest(value: Any, digest: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, value.shape, value.flatten().tolist())).encode())
    elif isinstance(value, (tuple, list)):
        for entry in value:
            _digest(entry, digest)
    elif hasattr(value, "items"):
        for name, entry in value.items():
            _digest((name, entry), digest)
    else:
        digest.update(repr(value).encode())
