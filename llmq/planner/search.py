"""Finds the largest budget of KL whose choice, measured as a whole, keeps the bound.

KLs of single layers add up only approximately, so whole choices are measured. The bound is checked
on text that had no part in the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from llmq.evaluation.sensitivity import Distance, distance
from llmq.models.targets import Target
from llmq.planner.costs import Option

_ROUNDS = 8  # whole choices tried on the text that is measured on
_FURTHER_CHECKS = 2  # checks, after the first that held, of whether more would hold too
_MARGIN = 0.7  # of the bound, aimed at by the mean: its upper end, and other text, take the rest


@dataclass
class CheckedChoice:
    """A choice, its distance from the original on each text, and how many were tried."""

    choice: list[int]
    distances: dict[str, Distance]
    tries: int


def choose_within_bound(
    model: nn.Module,
    options: list[list[Option]],
    costs: list[list[float]],
    solved: Callable[[float], list[int]],
    changed: Callable[[list[int]], tuple[dict[str, nn.Module], list[Target]]],
    fit: list[Any],
    texts: dict[str, list[Any]],
    bound: tuple[str, float],
) -> CheckedChoice:
    """Return the choice of the largest budget that keeps the bound as a whole, and its check."""
    kind, given = bound
    limit = given if kind == "KL" else math.log1p(given)
    measure_of = "kl" if kind == "KL" else "nll"
    tries = 0

    def loss(found: Distance, certain: bool) -> float:
        mean = found.kl if kind == "KL" else found.nll
        if mean is None:
            raise ValueError("a bound on perplexity needs labels; give max_kl, or data with labels")
        return found.intervals[measure_of].high if certain and found.intervals else mean

    def whole(choice: list[int]) -> float:
        nonlocal tries
        tries += 1
        return loss(distance(model, fit, *changed(choice)), certain=False)

    def checked(choice: list[int]) -> tuple[dict[str, Distance], float]:
        nonlocal tries
        tries += 1
        made = changed(choice)
        found = {name: distance(model, text, *made) for name, text in texts.items()}
        return found, max(loss(each, certain=True) for each in found.values())

    def cost(choice: list[int]) -> float:
        return sum(row[i] for row, i in zip(costs, choice, strict=True))

    kept, distances = [0] * len(options), dict[str, Distance]()
    failed: list[list[int]] = []
    low, budget, high = 0.0, _largest_budget(solved, _MARGIN * limit, whole), math.inf
    again = -1  # checks after the first that held
    while again < _FURTHER_CHECKS:
        choice = solved(budget)
        if not any(choice) or choice == kept:
            break
        if choice in failed:
            budget *= 0.9
            continue
        found, worst = checked(choice)
        if worst <= limit:
            low = budget
            if not any(kept) or cost(choice) < cost(kept):
                kept, distances = choice, found
        else:
            failed.append(choice)
            high = min(budget, _spent(options, choice))
        if not any(kept):
            # Other text is harder, or less sure: back off by as much, and a little more.
            budget = 0.95 * high * limit / worst
            continue
        again += 1
        budget = math.sqrt(low * high) if failed else low * limit / max(worst, 1e-12)
        if budget < 1.02 * low:
            break
    return CheckedChoice(kept, distances, tries)


def _largest_budget(
    solved: Callable[[float], list[int]], limit: float, loss: Callable[[list[int]], float]
) -> float:
    """Return a budget for Σ KL whose choice loses nearly `limit` as a whole, and not more."""
    cheapest = solved(math.inf)
    low, high, budget = 0.0, math.inf, limit
    with tqdm(total=_ROUNDS, desc="plan: whole", unit="choice", delay=1, leave=False) as progress:
        for _ in range(_ROUNDS):
            choice = solved(budget)
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
