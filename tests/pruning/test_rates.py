"""Rates by sensitivity: exact in all, least loss by brute force, and nothing else of pruning."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.evaluation.sensitivity import Sensitivity, Unit
from llmq.models.targets import Target
from llmq.nn import SparseLinear
from llmq.pruning import magnitude
from llmq.pruning import rates as module
from llmq.scheme import parse_pattern
from tests import families
from tests.helpers import assert_equal, generator


class Sum(nn.Module):
    """Adds up layers of one input, each times a weight: what it matters."""

    def __init__(self, matters: list[float], N: int = 48, K: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(K, K), nn.Tanh()) for _ in matters)
        self.heads = nn.ModuleList(nn.Linear(K, N, bias=False) for _ in matters)
        self.matters = matters

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.parts, self.heads, self.matters, strict=True)
        return sum((m * head(part(x)) for part, head, m in pairs), torch.zeros(()))


def data() -> Any:
    return [torch.randn(200, 64, generator=generator(0))]


def pruned(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Weights that are gone and all weights, by layer."""
    return {
        name: (magnitude.pruned(layer.mask()), layer.mask().numel())
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLinear)
    }


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_what_matters_less_loses_more(method: str) -> None:
    model = Sum([1.0, 1e-3])
    llmq.prune(model, 0.5, method=method, data=data(), allocation="sensitivity")
    found = pruned(model)
    for name, (gone, n) in found.items():
        share = 0.3 if name.split(".")[1] == "0" else 0.7
        assert gone == pytest.approx(share * n, abs=1), name
    assert sum(gone for gone, _ in found.values()) == sum(n for _, n in found.values()) // 2
    rates = {layer.name: layer.pruned for layer in model.llmq_report.layers}
    assert rates == {name: pytest.approx(gone / n) for name, (gone, n) in found.items()}
    assert "0.5 shared out by sensitivity: 0.300 … 0.700 a layer" in model.llmq_report.choice
    assert f"unstructured {100 * found['heads.1'][0] / found['heads.1'][1]:.1f} %" in str(
        model.llmq_report
    )


@pytest.mark.parametrize("pattern", ["unstructured", "block-8x8", "block-16x32"])
@pytest.mark.parametrize("rate", [0.013, 0.37, 0.5, 0.7777, 0.99])
def test_rates_are_exact_and_within_limits(pattern: str, rate: float) -> None:
    model = Sum([1.0, 0.3, 0.1])
    llmq.prune(model, rate, pattern=pattern, method="wanda", data=data(), allocation="sensitivity")
    block = parse_pattern(pattern).block or (1, 1)
    size = block[0] * block[1]
    found = {name: (gone // size, n // size) for name, (gone, n) in pruned(model).items()}
    total = sum(n for _, n in found.values())
    assert sum(gone for gone, _ in found.values()) == round(rate * total)
    for gone, n in found.values():
        assert n * max(rate - 0.2, 0) - 1 <= gone <= n * min(rate + 0.2, (1 + rate) / 2) + 1


def test_least_loss_is_that_of_brute_force() -> None:
    """Of every way to share 12 pieces among three layers of 8, as the scaled losses tell it."""
    layers = [Target(f"{i}", nn.Linear(8, 1, bias=False), "Linear", []) for i in range(3)]
    tasks = []
    for i, target in enumerate(layers):
        scores = torch.rand(8, generator=generator(i), dtype=torch.float64).square().sort().values
        rows = torch.cat([torch.zeros(1, dtype=torch.float64), scores.cumsum(0)])
        task = module._Task(
            Unit((target,), 1), [8], [0], [rows], 0.5, (2, 7), loss=[0.1, 0.5, 0.2][i]
        )
        tasks.append(task)

    def loss(counts: tuple[int, ...]) -> float:
        return sum(
            t.loss * float(t.errors[0][c] / t.errors[0][4])
            for t, c in zip(tasks, counts, strict=True)
        )

    ways = [c for c in itertools.product(range(2, 8), repeat=3) if sum(c) == 12]
    found = module._solve(tasks, 0.5)
    assert tuple(found) in ways
    assert loss(tuple(found)) == pytest.approx(min(loss(c) for c in ways), rel=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_families(name: str, tmp_path: Path) -> None:
    """Decoders, encoders without a head and both; fused experts keep the rate; saved as ever."""
    original = families.make(name)
    given: Any = [families.inputs(name)]
    options: dict[str, Any] = {"method": "wanda", "data": given, "allocation": "sensitivity"}
    model = llmq.prune(copy.deepcopy(original), 0.5, **options)
    found = pruned(model)
    assert sum(gone for gone, _ in found.values()) == sum(n for _, n in found.values()) // 2
    rates = {name: gone / n for name, (gone, n) in found.items()}
    assert max(rates.values()) > 0.55 and min(rates.values()) < 0.45
    assert all(rate == 0.5 for name, rate in rates.items() if ".experts." in name)
    same = llmq.prune(original, 0.5, **options)
    for key, tensor in model.state_dict().items():
        assert_equal(same.state_dict()[key], tensor, key)
    llmq.save(model, tmp_path / "m")
    loaded = llmq.load(tmp_path / "m")
    assert_equal(families.output(loaded, name), families.output(model, name), "output")
    assert str(loaded.llmq_report) == str(model.llmq_report)


def test_quantized_and_pruned_again() -> None:
    options: dict[str, Any] = {"data": data(), "allocation": "sensitivity"}
    model = Sum([1.0, 1e-3])
    llmq.quantize(model, scheme="w8a8")
    llmq.prune(model, 0.5, method="magnitude", **options)
    first = {n: m.mask() for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    llmq.prune(model, 0.6, method="wanda", **options)
    found = pruned(model)
    assert sum(g for g, _ in found.values()) == round(0.6 * sum(n for _, n in found.values()))
    for name, mask in first.items():
        layer: Any = model.get_submodule(name)
        assert layer.scheme is not None
        assert not (layer.mask() & ~mask).any()
    state = copy.deepcopy(model.state_dict())
    llmq.prune(model, 0.6, method="wanda", **options)  # nothing is left to do
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, state[name], name)
    with pytest.raises(
        ValueError, match=r"more weights are pruned already than pruning_rate=0\.55 allows"
    ):
        llmq.prune(model, 0.55, **options)
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, state[name], name)


def test_a_unit_shares_its_count_out_exactly() -> None:
    """Whatever is gone of its layers stays gone, and none gets more than it has."""
    layers = [Target(f"{i}", nn.Linear(n, 1), "Linear", []) for i, n in enumerate((7, 11, 3))]
    for gone in ([0, 0, 0], [7, 0, 0], [1, 9, 2]):
        task = module._Task(Unit(tuple(layers), 1), [7, 11, 3], gone, [], 0.5, (0, 21))
        for count in range(sum(gone), 22):
            shares = task.shares(count)
            counts = [round(shares[f"{i}"] * n) for i, n in enumerate((7, 11, 3))]
            assert sum(counts) == count
            assert all(g <= c <= n for g, c, n in zip(gone, counts, (7, 11, 3), strict=True))
            if not any(gone):
                assert all(
                    abs(c - count * n / 21) < 3 for c, n in zip(counts, (7, 11, 3), strict=True)
                )


def test_layers_of_one_weight_share_their_rate() -> None:
    model = Sum([1.0, 1e-3, 0.5])
    model.heads[2].weight = model.heads[0].weight
    llmq.prune(model, 0.5, data=data(), allocation="sensitivity")
    assert model.heads[2].weight is model.heads[0].weight
    found = pruned(model)
    assert found["heads.0"] == found["heads.2"]
    del found["heads.2"]
    assert sum(gone for gone, _ in found.values()) == sum(n for _, n in found.values()) // 2


def test_measurements_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"method": "wanda", "data": data(), "allocation": "sensitivity"}
    expected = llmq.prune(Sum([1.0, 0.1]), 0.5, **options, resume=tmp_path / "kept")
    monkeypatch.setattr(Sensitivity, "kl", None)
    model = llmq.prune(Sum([1.0, 0.1]), 0.5, **options, resume=tmp_path / "kept")
    for name, tensor in expected.state_dict().items():
        assert_equal(model.state_dict()[name], tensor, name)
    with pytest.raises(ValueError, match="another model, data or options"):
        llmq.prune(Sum([1.0, 0.1]), 0.5, method="wanda", data=data(), resume=tmp_path / "kept")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"allocation": "owl"}, "unknown allocation 'owl'; choose 'uniform'"),
    "2:4": ({"pattern": "2:4"}, "pattern 2:4 takes one rate for all layers"),
    "structured": ({"pattern": "structured"}, "pattern structured takes one rate for all layers"),
    "layers": ({"pattern": "layers"}, "pattern layers takes one rate for all layers"),
    "no data": ({"data": None}, "allocation 'sensitivity' needs calibration data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_share_out(case: str) -> None:
    options, message = REFUSED[case]
    model = Sum([1.0])
    with pytest.raises(ValueError, match=message):
        llmq.prune(model, **{"data": data(), "allocation": "sensitivity", **options})
    assert type(model.heads[0]) is nn.Linear
