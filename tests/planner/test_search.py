"""The search for the largest budget that keeps the bound on every text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

import llmq
from llmq.evaluation.sensitivity import Distance
from llmq.planner import search
from llmq.planner.costs import Option
from llmq.planner.knapsack import solve
from tests.planner.small_model import FORMATS, model, tokens


def test_backs_off_where_held_out_text_is_harder(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, asked = search.distance, []

    def harder(*args: Any) -> Any:
        found = genuine(*args)
        asked.append(found.tokens)
        # The second half of the data loses four times as much as the first.
        factor = 4 if found.tokens == 511 else 1
        return type(found)(factor * found.kl, found.nll, found.tokens, found.intervals)

    easy = llmq.plan(model(), tokens(1536), max_kl=0.01, formats=FORMATS)
    monkeypatch.setattr(search, "distance", harder)
    hard = llmq.plan(model(), tokens(1536), max_kl=0.01, formats=FORMATS)
    assert hard.measured is not None
    assert hard.measured.kl <= 0.01
    assert hard.bytes_after > easy.bytes_after
    assert asked.count(511) >= 2, "the first choice failed"


def test_after_backing_off_it_looks_for_what_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[Option("float", 0.0, (), 2), Option("w8a8", 0.01, (), 1)] for _ in range(100)]
    costs = [[float(option.bytes) for option in row] for row in rows]
    spent: list[float] = []

    def loss(_model: Any, text: list[str], choice: list[int], _targets: Any) -> Distance:
        kl = sum(choice) / 100
        if text == ["held"]:  # where the whole loses much more than its parts, beyond 0.6
            spent.append(kl)
            kl = (kl / 0.6) ** 4
        return Distance(kl, None, 1, {})

    monkeypatch.setattr(search, "distance", loss)
    checked = search.choose_within_bound(
        nn.Module(),
        rows,
        costs,
        lambda budget: solve(rows, costs, budget),
        lambda choice: (choice, []),  # type: ignore[arg-type, return-value]
        ["fit"],
        {"": ["held"]},
        ("KL", 1.0),
    )
    assert spent[0] > 0.6 > spent[1], "the first choice failed, the second held"
    assert len(spent) == 4
    assert sum(checked.choice) / 100 == max(each for each in spent if each <= 0.6) > 0.55
    assert checked.distances[""].kl <= 1


def test_the_bound_holds_on_every_text_and_at_the_upper_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genuine = search.distance
    data, other = tokens(1536), tokens(1300).flip(0)
    settings: dict[str, Any] = {"max_kl": 0.01, "formats": FORMATS}
    easy = llmq.plan(model(), data, **settings)
    both = llmq.plan(model(), data, validation={"other": other, "third": data[:600]}, **settings)
    assert list(both.validated) == ["other", "third"]
    assert "other: KL" in str(both)
    assert json.loads(both.to_json())["validated"]["other"]["tokens"] == 1297
    for found in (both.measured, *both.validated.values()):
        high = found.intervals["kl"].high if found.intervals else found.kl
        assert high <= 0.01

    def unsure(*args: Any) -> Any:
        found = genuine(*args)
        if found.tokens != 1297:  # not the further text, whose interval is wide
            return found
        wide = replace(found.intervals["kl"], high=3 * found.kl)
        return replace(found, intervals={**found.intervals, "kl": wide})

    monkeypatch.setattr(search, "distance", unsure)
    sure = llmq.plan(model(), data, validation=other, **settings)
    assert sure.validated["validation"].intervals["kl"].high <= 0.01
    assert sure.bytes_after > easy.bytes_after
