"""Shares a pruning rate out among layers, so that the model's output changes least.

Each unit u, of layers that share an input, is pruned alone at the asked rate r by its scores s, as
magnitude or Wanda give them, and the KL divergence of the whole model's output is measured. Other
rates follow from the error of the unit's own outputs, E_u(q) = Σ s² of the share q that goes:

    KL_u(q) = KL_u(r) E_u(q) / E_u(r)

Least Σ KL_u(q_u) with Σ n_u q_u = r Σ n_u, n_u the unit's weights, takes the cheapest steps first,
as each E_u is convex. No q_u is further than `SPAN` from r, near which the scaling holds; OWL (Yin
et al., arXiv:2310.05175, section 3.3), which shares rates out by the outliers among Wanda's scores,
bounds them so too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.calibrate.blockwise import still
from llmq.calibrate.stages import Call, Stage
from llmq.calibrate.statistics import gather
from llmq.evaluation.sensitivity import Sensitivity, Unit
from llmq.models.targets import Target
from llmq.nn import SparseLinear, dense_weight
from llmq.pruning import magnitude
from llmq.scheme import Pattern
from llmq.storage.resume import Store

# Wanda's masks of SmolLM2-135M at a rate of 0.5, perplexity: 27.0 with the same rate for all, 24.6
# within 0.1 of it, 24.1 within 0.2, 24.0 within 0.3.
SPAN = 0.2
_STEPS = 40  # of a unit's rate between its bounds
_ROWS = 512  # of outputs that are compared, from as many of the first calls as that takes
_CALLS = 4  # but no more than these
_KEY = "sensitivities"  # of the entry that keeps what is measured


def allocate(
    model: nn.Module,
    groups: list[list[Target]],
    calls: list[Call],
    pattern: Pattern,
    rate: float,
    *,
    wanda: bool,
    kept: Store | None = None,
) -> dict[str, float]:
    """Return the share of its weights that each layer is to lose, by name; `rate` in all.

    Layers that the data does not reach, and experts that are still fused, lose `rate` each. What
    is measured takes a run of the model a unit, of the blocks from the unit's own on.

    Args:
        model: that the layers are in; is afterwards as it was.
        groups: layers that share one weight together.
        calls: of the model.
        pattern: unstructured or block.
        rate: in (0, 1).
        wanda: whether scores are magnitudes times the norms of inputs, or magnitudes.
        kept: where what is measured is kept, for this run of `llmq.prune`.

    Raises:
        ValueError: if more than `rate` is gone already.
    """
    probes: list[Sensitivity] = []
    for call in calls[:_CALLS]:
        if sum(probe.rows for probe in probes) < _ROWS:
            probes.append(Sensitivity(model, call, headless=True))
    units = [unit for unit in probes[0].units(groups) if unit.calls]
    entry = None if kept is None else kept.get(_KEY)
    losses: dict[str, float] = {} if entry is None else entry.info
    squares = _squares(model, calls, units) if wanda else {}
    tasks = [_Task.of(unit, squares.get(unit.name), pattern, rate) for unit in units]
    for task in tqdm(tasks, desc="allocate", unit="unit", delay=1, leave=False):
        name = task.unit.name
        if name not in losses:
            layers = task.pruned(squares.get(name), pattern)
            every = [probe.kl(layers, task.unit.targets) for probe in probes]
            losses[name] = sum(every) / len(every)
            if kept is not None:
                kept.put(_KEY, {}, losses)
        task.loss = losses[name] if math.isfinite(losses[name]) else 1e30
    shares = {target.name: rate for group in groups for target in group}
    for task, count in zip(tasks, _solve(tasks, rate), strict=True):
        shares |= task.shares(count)
    return shares


@dataclass
class _Task:
    """A unit, and what it loses when it is pruned. A piece is a weight, or a block of them.

    Args:
        unit: of layers that lose the same share.
        sizes: pieces of each distinct layer.
        gone: how many of them are pruned already.
        errors: of each distinct layer, Σ s² of what goes with the least k pieces of each row,
            float64 [pieces of a row + 1].
        rate: that the loss is measured at.
        bounds: pieces that go at least and at most.
        loss: at `rate`.
    """

    unit: Unit
    sizes: list[int]
    gone: list[int]
    errors: list[Tensor]
    rate: float
    bounds: tuple[int, int]
    loss: float = 0.0

    @classmethod
    def of(cls, unit: Unit, squares: Tensor | None, pattern: Pattern, rate: float) -> _Task:
        sizes, gone, errors = [], [], []
        for target in unit.distinct():
            pieces = _pieces(_scores(target, squares).square(), pattern)
            size = pieces.numel()
            sizes.append(size)
            rows = pieces.double().sort(1).values.cumsum(1).sum(0)
            errors.append(torch.cat([rows.new_zeros(1), rows]).cpu())
            gone.append(0)
            if isinstance(target.module, SparseLinear):
                left = _pieces(target.module.mask().float(), pattern).bool()
                gone[-1] = size - int(left.sum())
        total = sum(sizes)
        least = max(sum(gone), math.floor(total * max(rate - SPAN, 0.0)))
        most = max(least, math.ceil(total * min(rate + SPAN, (1 + rate) / 2)))
        shares = [had / size for had, size in zip(gone, sizes, strict=True)]
        return cls(unit, sizes, gone, errors, max(rate, *shares), (least, most))

    def pruned(self, squares: Tensor | None, pattern: Pattern) -> dict[str, nn.Module]:
        """Return the unit's layers pruned at `rate`, by name."""
        layers: dict[str, nn.Module] = {}
        for target in self.unit.targets:
            before = target.module.mask() if isinstance(target.module, SparseLinear) else None
            mask = magnitude.mask(_scores(target, squares), pattern, self.rate, before)
            layers[target.name] = SparseLinear.from_linear(target.module, pattern, mask=mask)
        return layers

    def steps(self) -> list[tuple[float, int]]:
        """Return (loss a piece, pieces) of each step from the least to the most."""
        least, most = self.bounds
        counts = [least + (most - least) * i // _STEPS for i in range(_STEPS + 1)]
        total = sum(self.sizes)
        scale = self.loss / max(self._error(self.rate), 1e-300)
        losses = [scale * self._error(count / total) for count in counts]
        steps, slope = [], 0.0
        for i in range(_STEPS):
            pieces = counts[i + 1] - counts[i]
            if pieces:  # a slope never falls but by rounding
                slope = max(slope, (losses[i + 1] - losses[i]) / pieces)
                steps.append((slope, pieces))
        return steps

    def _error(self, share: float) -> float:
        total = 0.0
        for rows in self.errors:
            place = share * (len(rows) - 1)
            low = min(int(place), len(rows) - 2)
            total += float(torch.lerp(rows[low], rows[low + 1], place - low))
        return total

    def shares(self, count: int) -> dict[str, float]:
        """Return what share each layer loses if the unit loses `count` pieces."""
        total = sum(self.sizes)
        counts = [
            max(gone, count * size // total)
            for gone, size in zip(self.gone, self.sizes, strict=True)
        ]
        for i, (gone, size) in enumerate(zip(self.gone, self.sizes, strict=True)):
            missing = count - sum(counts)
            counts[i] = min(size, max(gone, counts[i] + missing)) if missing else counts[i]
        own = {
            id(target.module._parameters["weight"]): own / size
            for target, own, size in zip(self.unit.distinct(), counts, self.sizes, strict=True)
        }
        return {t.name: own[id(t.module._parameters["weight"])] for t in self.unit.targets}


def _solve(tasks: list[_Task], rate: float) -> list[int]:
    """Return how many pieces each unit loses, of least loss in all, `rate` of all together."""
    counts = [task.bounds[0] for task in tasks]
    left = round(sum(sum(task.sizes) for task in tasks) * rate) - sum(counts)
    if left < 0:
        raise ValueError(
            f"more weights are pruned already than pruning_rate={rate} allows; raise the rate "
            f'(with allocation="uniform" the error names the layers)'
        )
    steps = [
        (slope, i, j, pieces)
        for i, task in enumerate(tasks)
        for j, (slope, pieces) in enumerate(task.steps())
    ]
    for _, i, _, pieces in sorted(steps):
        taken = min(pieces, left)
        counts[i] += taken
        left -= taken
    return counts


def _scores(target: Target, squares: Tensor | None) -> Tensor:
    weight = dense_weight(target.module).detach().float().abs()
    return weight if squares is None else weight * squares.sqrt()


def _pieces(weight: Tensor, pattern: Pattern) -> Tensor:
    """Return the sums over what goes together, [rows, pieces of a row]; blocks are one row."""
    if pattern.block is None:
        return weight
    N, K = weight.shape
    R, C = pattern.block
    return weight.reshape(N // R, R, K // C, C).sum((1, 3)).reshape(1, -1)


def _squares(model: nn.Module, calls: list[Call], units: list[Unit]) -> dict[str, Tensor]:
    """Return Σ x² of the inputs of each unit, float32 [K], by its name."""
    # One layer of a unit speaks for all: they share the input.
    groups = [[unit.targets[0]] for unit in units]
    with still(model):
        found = gather(Stage("", model, calls, [{} for _ in calls]), groups, full=False)
    return {unit.name: own.squares for unit, own in zip(units, found, strict=True) if own.rows}
