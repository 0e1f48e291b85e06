"""The choice of least cost as a knapsack problem: one format for each unit.

Σ cost is least with Σ KL within a budget, and Σ time within limits.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch

from llmq.planner.costs import Option, total_seconds

_STEPS = 1 << 14  # of the budget that `solve` tells apart
_DEAREST = 1e3  # price of time, in costs of the whole model, above which a limit is out of reach
_PAIRS = 256  # changes that are tried at once with each of the others
_SINGLY = 1 << 13  # changes beyond which pairs would take minutes: the experts of a large model
_LEAST = 0.01  # share of what is left, below which a change counts as taking that much


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


def solve_within(
    options: list[list[Option]], costs: list[list[float]], budget: float, limits: list[float]
) -> list[int]:
    """Choose as `solve` does, with Σ seconds for each count of tokens within `limits`.

    By Lagrange multipliers (the same book, section 11.2): time past a limit gets a price, the
    least at which the choice is within; then single units change, and pairs of units, as prices
    alone move units that are alike together. If no price is enough, as the budget of KL needs
    slower formats, it stays at the highest.
    """
    prices = [0.0] * len(limits)

    def solve_priced() -> list[int]:
        priced = [
            [
                c + sum(p * s / t for p, s, t in zip(prices, o.seconds, limits, strict=False))
                for c, o in zip(cost, row, strict=True)
            ]
            for cost, row in zip(costs, options, strict=True)
        ]
        return solve(options, priced, budget)

    def past(i: int, choice: list[int]) -> bool:
        taken = [row[j] for row, j in zip(options, choice, strict=True)]
        return total_seconds(taken)[i] > limits[i] * (1 + 1e-9)

    choice = solve_priced()
    for _ in limits:  # a price on one count of tokens may make another's choice slower
        for i in range(len(limits)):
            if past(i, choice) and prices[i] < _DEAREST:
                choice = _raise_price(prices, i, solve_priced, functools.partial(past, i))
    return _exchanged(options, costs, budget, limits, choice) if limits else choice


def _raise_price(
    prices: list[float],
    i: int,
    solve_priced: Callable[[], list[int]],
    past: Callable[[list[int]], bool],
) -> list[int]:
    """Raise `prices[i]` to the least at which the choice is not `past` its limit; return it."""
    low, prices[i] = prices[i], max(2 * prices[i], 1 / 16)
    while past(choice := solve_priced()):
        if prices[i] >= _DEAREST:
            return choice
        low, prices[i] = prices[i], 4 * prices[i]
    for _ in range(10):
        high, prices[i] = prices[i], (low + prices[i]) / 2
        found = solve_priced()
        if past(found):
            low, prices[i] = prices[i], high
        else:
            choice = found
    return choice


def _exchanged(
    options: list[list[Option]],
    costs: list[list[float]],
    budget: float,
    limits: list[float],
    choice: list[int],
) -> list[int]:
    """Change formats of one unit, or of two, while that costs less and keeps budget and limits.

    The most gained for what is left of the scarcest goes first. Two at a time, as prices leave
    little of one thing but more of another: a slower format here for a smaller one there.
    """
    bounds = torch.tensor([budget, *limits], dtype=torch.float64).clamp_min(1e-300)
    unit = torch.tensor([u for u, row in enumerate(options) for _ in row] + [len(options)])
    # The last unit has one option, which takes nothing: the partner of a single change.
    cost = torch.tensor([c for row in costs for c in row] + [0.0], dtype=torch.float64)
    spent = [[option.kl, *option.seconds] for row in options for option in row]
    used = torch.tensor([*spent, [0.0] * len(bounds)], dtype=torch.float64) / bounds
    starts = [0, *itertools.accumulate(len(row) for row in options)]
    taken = torch.tensor([*(at + i for at, i in zip(starts, choice, strict=False)), starts[-1]])
    every = torch.arange(len(unit))
    others = every if len(every) <= _SINGLY else every[-1:]
    while True:
        left = (1 - used[taken].sum(0)).clamp_min(1e-12)
        gains, more = cost[taken][unit] - cost, (used - used[taken][unit]) / left
        best, pair = 0.0, None
        for part in every.split(_PAIRS):
            gain = gains[part, None] + gains[others]
            share = torch.zeros_like(gain)
            for each in more.T:
                share = torch.maximum(share, each[part, None] + each[others])
            possible = (gain > 1e-12) & (share <= 1 + 1e-12) & (unit[part, None] != unit[others])
            worth = torch.where(possible, gain / share.clamp_min(_LEAST), 0.0)
            if float(worth.max()) > best:
                best = float(worth.max())
                a, b = divmod(int(worth.argmax()), len(others))
                pair = (int(part[a]), int(others[b]))
        if pair is None:
            return [int(at) - start for at, start in zip(taken[:-1], starts, strict=False)]
        for at in pair:
            taken[unit[at]] = at
