"""What each format costs and loses in each part of a model: measured, and kept for `resume`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.evaluation.sensitivity import Sensitivity, Unit
from llmq.models.targets import Target
from llmq.nn import LowRankLinear, QuantLinear, SparseLinear, linear_bytes, linear_weight
from llmq.planner.calibrated_layers import CalibratedLayers, divisions_of
from llmq.planner.layer_format import fits, make_layer, parse
from llmq.planner.timing import seconds_a_call
from llmq.runtime import dispatch
from llmq.storage.resume import Store

FLOAT = "float"  # left alone
EIGHT_BITS = "8 bits"  # whichever format of 8 bits is fastest
Minimize = Literal["both", "time", "bytes"]
_KEY = "measurements"  # of the entry that keeps them
_LEAST = 1e-9  # KL of whatever is not left alone: rounding makes it 0 or less


@dataclass(frozen=True)
class Option:
    """One format for one unit: what it costs and what it loses.

    Args:
        format: as `layer_format.parse` reads it, or `"float"`.
        kl: of the whole model's output with this unit alone in that format, in nats a token.
        seconds: of the unit's layers in one pass of the model, for each count of tokens.
        bytes: of the unit's layers in a checkpoint.
    """

    format: str
    kl: float
    seconds: tuple[float, ...]
    bytes: int


def measure(
    sensitivity: Sensitivity,
    units: list[Unit],
    formats: tuple[str, ...],
    tokens: tuple[int, ...],
    kept: Measurements,
    moments: Moments,
    calibrated: CalibratedLayers,
) -> list[list[Option]]:
    """Return the options of each unit; the first is to leave it alone.

    Args:
        sensitivity: of the model that the units are of.
        units: of `sensitivity.units`.
        formats: to choose among; those that do not fit a unit are left out.
        tokens: that calls are timed for.
        kept: what was measured before.
        moments: of the inputs of each unit, where there are any.
        calibrated: units in the formats that need data.
    """
    times = _times(units, formats, tokens, kept)
    options: list[list[Option]] = []
    with tqdm(units, desc="plan", unit="unit", delay=1, leave=False) as progress:
        for unit, seconds in zip(progress, times, strict=True):
            size = sum(linear_bytes(t.module) for t in unit.distinct())
            row = [Option(FLOAT, 0.0, seconds[FLOAT], size)]
            for name in formats if unit.calls else ():
                if not _fit(unit, name) or (
                    parse(name).calibrated and not calibrated.get(unit, name)
                ):
                    continue
                made = replacement([(unit, name)], moments, calibrated)
                kl = kept.get(unit, name)
                if kl is None:
                    kl = sensitivity.kl(*parted(made))
                    kept.put(unit, name, kl)
                if math.isfinite(kl):
                    own = {target.name: layer for target, layer in made}
                    after = sum(_bytes(own[target.name]) for target in unit.distinct())
                    row.append(Option(name, max(kl, _LEAST), seconds[timed_as(name)], after))
            options.append(row)
    return options


def _times(
    units: list[Unit], formats: tuple[str, ...], tokens: tuple[int, ...], kept: Measurements
) -> list[dict[str, tuple[float, ...]]]:
    """Return the seconds of each unit in each format that fits it, by count of tokens."""
    layers = Counter(tuple(linear_weight(t.module)[0].shape) for u in units for t in u.targets)
    times: list[dict[str, tuple[float, ...]]] = []
    for unit in units:
        fitting = tuple(dict.fromkeys(timed_as(f) for f in formats if _fit(unit, f)))
        sums = [Counter[str]() for _ in tokens]
        for target in unit.targets:
            weight = linear_weight(target.module)[0]
            N, K = weight.shape
            for M, total in zip(tokens, sums, strict=True):
                found = kept.seconds(weight, fitting, M, layers[N, K])
                total.update({name: unit.calls * seconds for name, seconds in found.items()})
        times.append({name: tuple(total[name] for total in sums) for name in (FLOAT, *fitting)})
    return times


def timed_as(name: str) -> str:
    """Return the format that takes as long as `name`: how codes were found costs no time."""
    return name.split()[0] if name != FLOAT and parse(name).calibrated else name


Moments = dict[str, Tensor]  # Σ xᵀx of a unit's inputs [K, K], by the unit's name


def _fit(unit: Unit, name: str) -> bool:
    wanted = parse(name)
    # Factors of a weight that several layers share would have to be shared too, and its codes.
    if (wanted.low_rank or wanted.calibrated) and len(unit.distinct()) < len(unit.targets):
        return False
    return all(fits(name, *linear_weight(target.module)[0].shape) for target in unit.targets)


def replacement(
    taken: list[tuple[Unit, str]], moments: Moments, calibrated: CalibratedLayers
) -> list[tuple[Target, nn.Module]]:
    """Return what units in formats consist of, and what makes their inputs where scales divide it,
    with what each replaces.
    """
    found = [calibrated.get(unit, name) if parse(name).calibrated else None for unit, name in taken]
    divisions = divisions_of(found)
    made: list[tuple[Target, nn.Module]] = []
    left = dict(divisions)
    for (unit, name), from_data in zip(taken, found, strict=True):
        linears = {
            t.name: left.pop(t.name).of(t.module) if t.name in left else t.module
            for t in unit.targets
        }
        layers: Mapping[str, nn.Module]
        if from_data is not None:
            layers = from_data.layers(name, linears, divisions)
        else:
            own = moments.get(unit.name)
            layers = {layer: make_layer(linear, name, own) for layer, linear in linears.items()}
        made += [(target, layers[target.name]) for target in unit.targets]
    for division in left.values():
        target = division.target(calibrated.model)
        made.append((target, division.of(target.module)))
    return made


def parted(made: list[tuple[Target, nn.Module]]) -> tuple[dict[str, nn.Module], list[Target]]:
    """Return replacements as layers by name, and the targets that they replace."""
    return {target.name: layer for target, layer in made}, [target for target, _ in made]


def _bytes(layer: nn.Module) -> int:
    assert isinstance(layer, (QuantLinear, SparseLinear, LowRankLinear))
    return layer.bytes()


def costs(options: list[list[Option]], minimize: Minimize) -> list[list[float]]:
    """Return the cost of each option: time, bytes or both, as shares of the original's.

    Time is the mean of the shares for each count of tokens.
    """
    totals = [max(total, 1e-30) for total in total_seconds([row[0] for row in options])]
    size = max(sum(row[0].bytes for row in options), 1)
    by_time, by_size = minimize != "bytes", minimize != "time"

    def cost(option: Option) -> float:
        shares = [s / total for s, total in zip(option.seconds, totals, strict=True)]
        return by_time * sum(shares) / max(len(shares), 1) + by_size * option.bytes / size

    return [[cost(option) for option in row] for row in options]


def total_seconds(options: list[Option]) -> list[float]:
    """Return the seconds of all options together, for each count of tokens."""
    return [sum(each) for each in zip(*(option.seconds for option in options), strict=True)]


def uniform_seconds(options: list[list[Option]], name: str) -> list[float]:
    """Return the seconds of all units in format `name`, or as they are where it does not fit.

    Args:
        options: of each unit.
        name: of a format, or `EIGHT_BITS` for the one that is fastest by its mean share of the
            original's time.

    Returns:
        By count of tokens; those of the original if no format has 8 bits.
    """

    def total(wanted: str) -> list[float]:
        rows = [{timed_as(o.format): o for o in row} for row in options]
        return total_seconds([row.get(wanted, row[FLOAT]) for row in rows])

    if name != EIGHT_BITS:
        return total(timed_as(name))
    before = total(FLOAT)
    named = {timed_as(option.format) for row in options for option in row} - {FLOAT}
    eight = [n for n in sorted(named) if (s := parse(n)).scheme and s.scheme.bits == 8]
    dense = [total(n) for n in eight if not parse(n).sparse and not parse(n).low_rank]
    return min(
        dense,
        key=lambda found: sum(f / max(b, 1e-30) for f, b in zip(found, before, strict=True)),
        default=before,
    )


class Measurements:
    """KL by unit and format, and seconds by shape, kept in a store that a plan goes on from.

    Args:
        store: of the model and the text that KL is measured on.

    Attributes:
        calibration_run: what tells the data that formats are calibrated on from other data.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.calibration_run = store, ""
        entry = store.get(_KEY)
        kept = {} if entry is None else entry.info
        self.kl: dict[str, float] = kept.get("kl", {})
        self.times: dict[str, float] = kept.get("seconds", {})

    def get(self, unit: Unit, name: str) -> float | None:
        return self.kl.get(self._name(unit, name))

    def put(self, unit: Unit, name: str, kl: float) -> None:
        self.kl[self._name(unit, name)] = kl
        self._keep()

    def seconds(
        self, weight: Tensor, names: tuple[str, ...], M: int, layers: int
    ) -> dict[str, float]:
        """Return `seconds_a_call` of layers like `weight` [N, K], measured unless it is kept."""
        (N, K), dtype, device = weight.shape, weight.dtype, weight.device
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        where = f"{device.type} {dispatch.cpu_isa()} {threads}"
        prefix = f"{N}x{K} {M} {dtype} {where} {layers}: "
        if any(prefix + name not in self.times for name in (FLOAT, *names)):
            found = seconds_a_call(N, K, names, M, dtype, device, layers)
            self.times.update({prefix + name: seconds for name, seconds in found.items()})
            self._keep()
        return {name: self.times[prefix + name] for name in (FLOAT, *names)}

    def _name(self, unit: Unit, name: str) -> str:
        run = self.calibration_run[:16] if parse(name).calibrated else ""
        return f"{unit.name} {name} {run}".rstrip()

    def _keep(self) -> None:
        self.store.put(_KEY, {}, {"kl": self.kl, "seconds": self.times})
