"""Intervals hold the truth as often as they say, and tell a difference where there is one."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import llmq
from llmq.evaluation import intervals
from tests.helpers import generator


# The published quantiles (Abramowitz and Stegun, table 26.10), to their last digit.
@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (30, 2.042), (120, 1.980), (10**6, 1.960)],
)
def test_student_is_the_published_quantile(freedom: int, quantile: float) -> None:
    assert intervals.student(freedom) == pytest.approx(quantile, abs=6e-4)


def test_mean_of_equal_rows_is_the_textbook_interval() -> None:
    values = [1.0, 2.0, 4.0, 5.0]  # mean 3, deviation sqrt(10/3), t 3.182
    found = intervals.mean(values, [1] * 4)
    half = 3.182 * math.sqrt(10 / 3 / 4)
    assert found.value == 3.0
    assert found.high - found.value == pytest.approx(half, rel=2e-3)
    assert found.value - found.low == pytest.approx(half, rel=2e-3)
    assert found.rows == 4


@pytest.mark.parametrize("rows", [8, 40])
def test_holds_the_truth_in_95_of_100_samples_of_clustered_labels(rows: int) -> None:
    g = generator(0)
    trials, held = 2000, 0
    for _ in range(trials):
        counts = torch.randint(20, 60, (rows,), generator=g).double()
        effect = torch.randn(rows, generator=g).double()  # shared by the labels of a row
        noise = torch.randn(rows, generator=g).double() * counts.sqrt()
        sums = (effect + 0.3) * counts + noise
        found = intervals.mean(sums.tolist(), counts.tolist())
        held += found.low <= 0.3 <= found.high
    # One standard deviation of the share is 0.5 points; few rows of unequal size cost a little.
    assert 0.93 <= held / trials <= 0.97


def test_pairing_finds_what_two_intervals_apart_would_not() -> None:
    g = generator(1)
    before = (torch.randn(30, generator=g).double() * 100 + 300).tolist()  # texts differ much
    after = [x + 1 + 0.5 * math.sin(i) for i, x in enumerate(before)]  # models little
    counts = [100.0] * 30
    found = intervals.difference(before, after, counts)
    assert found.distinguishable
    assert found.value == pytest.approx(0.01, rel=0.1)
    apart = intervals.mean(before, counts), intervals.mean(after, counts)
    assert apart[0].high > apart[1].low


def test_no_difference_is_not_told() -> None:
    assert not intervals.Interval(0.1, -0.1, 0.3, 5).distinguishable
    assert not intervals.Interval(0.0, 0.0, 0.0, 5).distinguishable
    assert intervals.Interval(-0.2, -0.3, -0.1, 5).distinguishable


def test_a_share_of_all_is_no_proof() -> None:
    found = intervals.share([1] * 20, [1] * 20)
    assert found.value == found.high == 1.0
    assert 0.75 < found.low < 0.95  # the rule of three says 0.86
    none = intervals.share_difference([1] * 20, [1] * 20, [1] * 20)
    assert none.low < 0 < none.high
    assert not none.distinguishable


def test_share_difference_agrees_with_a_sign_test() -> None:
    # 12 answers lost and 2 gained of 500: the exact sign test gives p = 0.013; 7 and 3, 0.34.
    for lost, gained, told in ((12, 2, True), (7, 3, False)):
        before = [1] * lost + [0] * gained + [1] * (500 - lost - gained)
        after = [0] * lost + [1] * gained + [1] * (500 - lost - gained)
        found = intervals.share_difference(before, after, [1] * 500)
        assert found.value == pytest.approx((gained - lost) / 500)
        assert found.distinguishable is told


def test_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="two rows"):
        intervals.mean([1.0], [10])


def _classifier(seed: int) -> tuple[nn.Module, list]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 4))
    x = torch.randn(300, 16)
    return model, [(x[:200], model(x[:200]).argmax(-1)), (x[200:], model(x[200:]).argmax(-1))]


def test_compare_tells_loss_from_noise() -> None:
    model, data = _classifier(0)
    close = copy.deepcopy(model)
    close[0].weight.data += 1e-4
    report = llmq.compare(model, close, data)
    assert report.original is not None
    assert report.original.intervals["accuracy"].rows == 300
    assert not report.intervals["accuracy"].distinguishable
    assert "does not differ significantly from the original" in str(report)
    torch.manual_seed(1)
    far = copy.deepcopy(model)
    far[0].weight.data += 0.3 * torch.randn_like(far[0].weight)
    report = llmq.compare(model, far, data)
    assert report.compressed is not None
    found = report.intervals["accuracy"]
    assert found.value == pytest.approx(report.compressed.accuracy - 1)
    assert found.distinguishable
    assert "perplexity" not in report.intervals
    assert "differs significantly from the original" in report.to_html()
    kept = json.loads(report.to_json())["intervals"]["kl"]
    assert kept["value"] == pytest.approx(report.kl)
    assert kept["low"] <= kept["value"] <= kept["high"]


def test_evaluate_gives_each_row_its_sum() -> None:
    model, data = _classifier(0)
    whole = llmq.evaluate(model, data)
    each = [llmq.evaluate(model, [(x[i : i + 1], y[i : i + 1])]).nll for x, y in data for i in (0,)]
    assert whole.intervals["nll"].rows == 300
    assert llmq.evaluate(model, [(data[0][0][:1], data[0][1][:1])]).intervals == {}
    both = [(torch.cat([x[:1] for x, _ in data]), torch.cat([y[:1] for _, y in data]))]
    pair = llmq.evaluate(model, both).intervals["nll"]
    half = 12.706 * abs(each[0] - each[1]) / 2
    assert pair.high - pair.value == pytest.approx(half, rel=1e-3)


def test_models_without_labels_are_compared_by_their_logits() -> None:
    model, data = _classifier(0)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    report = llmq.compare(Logits(), copy.deepcopy(Logits()), [{"x": data[0][0]}])
    assert report.original is None
    assert report.kl == pytest.approx(0, abs=1e-7)
    assert report.intervals["kl"].rows == 200
