"""Low rank: the factors that lose least, as a layer, in a checkpoint and among a plan's formats."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.formats import low_rank
from llmq.nn import LowRankLinear, QuantLinear
from llmq.planner.layer_format import fits, make_layer
from tests import families
from tests.helpers import assert_raises, generator

tf = pytest.importorskip("transformers")


def _inputs(K: int, rows: int = 400) -> Tensor:
    """Correlated inputs, some channels far larger than others."""
    g = generator(0)
    mix = torch.randn(K, K, generator=g) * 10 ** (torch.rand(K, generator=g) * 2 - 1)
    return torch.randn(rows, K, generator=g) @ mix / K**0.5


def _loss(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float((x @ (weight - other).T).double().square().sum())


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_loses_the_singular_values_left_out_and_no_less_is_possible(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_DAMPING", 1e-9)
    weight, x = torch.randn(24, 16, generator=generator(1)), _inputs(16)
    up, down = low_rank.factors(weight, rank, x.T @ x)
    assert up.shape == (24, rank)
    assert down.shape == (rank, 16)
    # Of the outputs themselves: the least that any matrix of that rank loses.
    singular = torch.linalg.svdvals((x @ weight.T).double())
    least = float(singular[rank:].square().sum())
    found = _loss(weight, up @ down, x)
    assert found == pytest.approx(least, rel=1e-3, abs=1e-6 * float(singular[0] ** 2))
    blind = low_rank.factors(weight, rank)
    if rank < 16:
        assert found < _loss(weight, blind[0] @ blind[1], x)
    tail = torch.linalg.svdvals(weight)[rank:].square().sum()
    assert float((weight - blind[0] @ blind[1]).square().sum()) == pytest.approx(
        float(tail), rel=1e-4, abs=1e-9
    )


def test_inputs_that_never_come_do_no_harm() -> None:
    weight, x = torch.randn(12, 16, generator=generator(1)), _inputs(16)
    x[:, 3:9] = 0
    up, down = low_rank.factors(weight, 10, x.T @ x)
    assert torch.isfinite(up @ down).all()
    assert _loss(weight, up @ down, x) < 1e-3 * _loss(weight, torch.zeros_like(weight), x)


@pytest.mark.parametrize(("N", "K"), [(576, 576), (1536, 576), (10, 6), (64, 4096)])
def test_rank_is_the_share_of_numbers(N: int, K: int) -> None:
    for share in (0.25, 0.5, 0.9):
        rank = low_rank.rank_of(N, K, share)
        assert rank >= 1
        assert rank * (N + K) <= share * N * K or rank == 1
        assert rank % 32 == 0 or rank <= 32


CONV1D = families.CAUSAL["gpt2"]


@pytest.mark.parametrize("scheme", ["float", "w8a8", "w8a16"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_its_factors(scheme: str, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 96, bias=bias)
    layer = make_layer(linear, f"low-rank 50 % {scheme}", torch.eye(128))
    assert isinstance(layer, LowRankLinear)
    assert layer.rank == 27
    x = torch.randn(3, 5, 128, generator=generator(0))
    expected = nn.functional.linear(x, layer.dequantize(), linear.bias)
    # Activations are coded to 8 bits twice, each time to half a step of 1/127 of the largest.
    loose = 0.05 if scheme == "w8a8" else 1e-4
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=loose)
    assert layer.weight.dtype == (torch.float32 if scheme == "float" else torch.int8)
    numbers = 27 * (96 + 128)
    assert layer.bytes() >= numbers * (4 if scheme == "float" else 1)
    assert layer.bytes() < linear.weight.nbytes * 0.55


def test_what_fits() -> None:
    assert fits("low-rank 50 % w8a8", 96, 128)
    assert fits("low-rank 50 % w4a16-g32", 576, 576)
    assert not fits("low-rank 50 % w4a16-g32", 96, 128), "27 is no multiple of 32"
    assert not fits("low-rank 99 % w8a8", 1, 1)
    for name in ("low-rank 0 % w8a8", "low-rank 50 % w3", "low-rank 50", "rank 50 % w8a8"):
        assert_raises(lambda name=name: fits(name, 8, 8), ValueError, "unknown")
    assert_raises(lambda: low_rank.factors(torch.ones(4, 4), 5), ValueError, "rank must be in 1")
    bad = torch.full((4, 4), torch.nan)
    assert_raises(lambda: low_rank.factors(torch.ones(4, 4), 2, bad), ValueError, "finite")


def _narrow(family: str) -> nn.Module:
    """A model whose weights are of rank 8, up to a little: what factors are for."""
    torch.manual_seed(0)
    model = families.CAUSAL[family]().eval()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and ("mlp" in name or "attn" in name):
            up, down = low_rank.factors(weight.detach(), 8)
            weight.data = 8 * (up @ down) + 1e-4 * torch.randn_like(weight)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_takes_factors_where_they_pay_and_a_checkpoint_keeps_them(
    family: str, tmp_path: Path
) -> None:
    original = _narrow(family)
    model = copy.deepcopy(original)
    tokens = torch.randint(3, 128, (1024,), generator=generator(0))
    formats = ("low-rank 40 % w8a16", "w8a16", "w4a16-g32")
    plan = llmq.plan(
        model, tokens, max_kl=0.01, minimize="bytes", formats=formats, no_slower_than=None
    )
    chosen = {c.option.format for c in plan.choices}
    assert "low-rank 40 % w8a16" in chosen
    plan.apply(model)
    held = [window[None] for window in tokens.split(512)[1:]]
    assert plan.measured is not None
    assert llmq.compare(original, model, held).kl == pytest.approx(plan.measured.kl, rel=1e-3)
    report = model.llmq_report
    assert report.bytes_before == plan.bytes_before
    assert report.bytes_after == plan.bytes_after
    assert any(layer.name.endswith(".up") for layer in report.layers)
    assert "low-rank" in plan.to_json()
    assert "moments" not in plan.to_json()
    llmq.save(model, tmp_path / "m")
    loaded = llmq.load(tmp_path / "m")
    assert sum(isinstance(m, LowRankLinear) for m in loaded.modules()) == sum(
        isinstance(m, LowRankLinear) for m in model.modules()
    )
    with torch.inference_mode():
        assert torch.equal(loaded(tokens[None, :40]).logits, model(tokens[None, :40]).logits)


def test_factors_are_layers_like_others() -> None:
    model = _narrow("llama")
    for block in model.model.layers:
        block.mlp.up_proj = make_layer(block.mlp.up_proj, "low-rank 50 % float")
    llmq.quantize(model, scheme="w8a8")
    down = model.model.layers[0].mlp.up_proj.down
    assert isinstance(down, QuantLinear)
    before = down.dequantize()
    ids = torch.randint(3, 128, (4, 16), generator=generator(0))
    history = llmq.fine_tune(model, [ids], steps=20, lr=3e-3)
    assert history.losses[-1] < history.losses[0]
    assert not torch.equal(down.dequantize(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.mlp.up_proj": 0}, "has rank 0"),
        ({"model.layers.0.mlp.up_proj": 10**9}, "has rank 1000000000"),
        ({"model.layers.0.mlp.up_proj": "8"}, "has rank '8'"),
        ({"model.norm": 8}, "is no linear layer"),
        ({"model.absent": 8}, "is no linear layer"),
        ({}, "do not belong together"),
    ],
    ids=str,
)
def test_a_checkpoint_that_lies_about_ranks_is_refused(
    change: dict, message: str, tmp_path: Path
) -> None:
    import json

    from llmq.storage.description import DESCRIPTION, digest

    model = _narrow("llama")
    block = model.model.layers[0]
    block.mlp.up_proj = make_layer(block.mlp.up_proj, "low-rank 50 % float")
    llmq.save(model, tmp_path / "m")
    file = tmp_path / "m" / DESCRIPTION
    description = json.loads(file.read_text())
    assert description["low_rank"] == {"model.layers.0.mlp.up_proj": 21}
    description["low_rank"] = change
    description["sha256"] = digest(description)
    file.write_text(json.dumps(description))
    assert_raises(lambda: llmq.load(tmp_path / "m"), ValueError, message)
