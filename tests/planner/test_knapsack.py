"""The choice of least cost, against brute force, and within limits on time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from llmq.planner import knapsack
from llmq.planner.costs import Option
from llmq.planner.knapsack import solve
from tests.helpers import generator, seeds


def _problem(seed: int) -> tuple[list[list[Option]], list[list[float]]]:
    g = generator(seed)
    rows, costs = [], []
    for _ in range(int(torch.randint(1, 6, (), generator=g))):
        count = int(torch.randint(0, 5, (), generator=g))
        kl = torch.rand(count, generator=g).double() ** 3
        cost = torch.rand(count, generator=g).double()
        rows.append([Option("float", 0.0, (), 0), *(Option("f", float(x), (), 0) for x in kl)])
        costs.append([1.0, *map(float, cost)])
    return rows, costs


@settings(max_examples=60, deadline=None)
@given(seed=seeds)
def test_solve_is_brute_force(seed: int) -> None:
    rows, costs = _problem(seed)
    budget = float(torch.rand((), generator=generator(seed + 1))) * 2

    def outcome(choice: Any) -> tuple[float, float]:
        kl = sum(row[i].kl for row, i in zip(rows, choice, strict=True))
        return kl, sum(cost[i] for cost, i in zip(costs, choice, strict=True))

    spent, cost = outcome(solve(rows, costs, budget))
    assert spent <= budget
    within = budget * (1 - len(rows) / knapsack._STEPS)  # each KL is rounded up to a step
    every = [outcome(choice) for choice in itertools.product(*(range(len(r)) for r in rows))]
    assert cost <= min(c for kl, c in every if kl <= within) + 1e-12
    assert cost >= min(c for kl, c in every if kl <= budget) - 1e-12


def test_solve_without_a_bound_or_without_a_budget() -> None:
    rows, costs = _problem(3)
    free = solve(rows, costs, math.inf)
    assert [c[i] for c, i in zip(costs, free, strict=True)] == [min(c) for c in costs]
    assert not any(solve(rows, costs, 0.0))
    assert solve([], [], 1.0) == []


@settings(max_examples=60, deadline=None)
@given(seed=seeds)
def test_a_choice_within_limits_cannot_be_bettered_in_one_unit_or_two(seed: int) -> None:
    g = generator(seed)
    plain, costs = _problem(seed)
    rows = [
        [Option(o.format, o.kl, (*map(float, torch.rand(2, generator=g)),), 0) for o in row]
        for row in plain
    ]
    budget = float(torch.rand((), generator=g)) * 2
    limits = [float(x) * len(rows) for x in torch.rand(2, generator=g)]

    def used(choice: Any) -> list[float]:
        taken = [row[i] for row, i in zip(rows, choice, strict=True)]
        return [sum(o.kl for o in taken), *(sum(o.seconds[m] for o in taken) for m in range(2))]

    choice = knapsack.solve_within(rows, costs, budget, limits)
    spent = used(choice)
    assert spent[0] <= budget + 1e-12
    if all(s <= limit for s, limit in zip(spent[1:], limits, strict=True)):
        spared = sum(row[i] for row, i in zip(costs, choice, strict=True)) - 1e-9
        for other in itertools.product(*(range(len(row)) for row in rows)):
            moved = sum(i != j for i, j in zip(other, choice, strict=True))
            if moved <= 2 and sum(row[i] for row, i in zip(costs, other, strict=True)) < spared:
                within = zip(used(other), (budget, *limits), strict=True)
                assert any(s > limit - 1e-9 for s, limit in within)
    # The least time that the budget leaves is found where the limit is less.
    shrunk = budget * (1 - len(rows) / knapsack._STEPS)
    every = [used(each) for each in itertools.product(*(range(len(row)) for row in rows))]
    for m in range(2):
        alone = [limits[m] if k == m else math.inf for k in range(2)]
        taken = used(knapsack.solve_within(rows, costs, budget, alone))[1 + m]
        least = min(found[1 + m] for found in every if found[0] <= shrunk)
        assert taken <= max(limits[m], least + 1e-3)


def test_single_units_change_where_pairs_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_SINGLY", 0)
    rows = [[Option("float", 0.0, (2.0,), 2), Option("w8a8", 1e-3, (1.0,), 1)] for _ in range(5)]
    costs = [[2.0, 1.0]] * 5
    assert knapsack._exchanged(rows, costs, 1.0, [10.0], [0] * 5) == [1] * 5
    assert sum(knapsack._exchanged(rows, costs, 2.5e-3, [10.0], [0] * 5)) == 2


def test_units_that_are_alike_share_what_time_is_left() -> None:
    fast, small = (1.0, 2.0), (0.5, 5.0)
    rows = [
        [
            Option("float", 0.0, (9.0, 9.0), 4),
            Option("w8a8", 1e-6, fast, 2),
            Option("w4a16-g32", 1e-5 * (u + 1), small, 1),
        ]
        for u in range(8)
    ]
    costs = [[4.0, 2.0, 1.0]] * 8
    choice = knapsack.solve_within(rows, costs, 1.0, [8.0, 16.0 + 3 * 3.0 + 1.0])
    assert sorted(choice) == [1] * 5 + [2] * 3
    choice = knapsack.solve_within(rows, costs, 1.0, [0.9 * 8.0, 16.0 + 3 * 3.0])
    assert choice.count(2) == 3, "each limit is kept, the first by what the second leaves"
