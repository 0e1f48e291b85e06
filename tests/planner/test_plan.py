"""plan: the cheapest choice within the bound, checked on other text, and applied as planned."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import llmq
from llmq.evaluation.sensitivity import Sensitivity
from llmq.nn import QuantLinear, SparseLinear
from llmq.planner import costs as planning
from tests.helpers import assert_raises
from tests.planner.small_model import FORMATS, model, state, tokens


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_a_plan_keeps_its_bound_and_is_applied_as_planned(family: str) -> None:
    made = model(family)
    original = copy.deepcopy(made)
    data = tokens(2048)
    plan = llmq.plan(made, data, max_kl=0.02, formats=FORMATS)
    assert state(made) == state(original), "plan changes nothing"
    assert plan.measured is not None
    assert 0 < plan.measured.kl <= 0.02
    assert plan.bytes_after < plan.bytes_before
    before_after = zip(plan.seconds_before, plan.seconds_after, strict=True)
    assert all(after < before for before, after in before_after)
    plan.apply(made)
    held = [window[None] for window in data.split(512)[2:]]
    assert llmq.compare(original, made, held).kl == pytest.approx(plan.measured.kl, rel=1e-3)
    for choice in plan.choices:
        for name in choice.names:
            module = made.get_submodule(name) if choice.option.format != "float" else None
            assert module is None or _format(module) == choice.option.format
    changed = {n for c in plan.choices if c.option.format != "float" for n in c.names}
    compressed = {n for n, m in made.named_modules() if isinstance(m, llmq.nn.CompressedLayer)}
    assert compressed == changed
    size = sum(made.get_submodule(name).bytes() for name in changed)
    assert size == sum(c.option.bytes for c in plan.choices if c.option.format != "float")


def _format(module: nn.Module) -> str:
    if isinstance(module, SparseLinear):
        return f"sparse 50 % {module.scheme.name}"
    assert isinstance(module, QuantLinear)
    return module.scheme.name


def test_a_wider_bound_costs_less() -> None:
    plans = [llmq.plan(model(), tokens(), max_kl=b, formats=FORMATS) for b in (1e-4, 1e-2, 1.0)]
    sizes = [plan.bytes_after for plan in plans]
    assert sizes[0] > sizes[1] > sizes[2]
    small, fast = (
        llmq.plan(model(), tokens(), max_kl=1.0, formats=FORMATS, minimize=what)
        for what in ("bytes", "time")
    )
    assert {c.option.format for c in small.choices} == {"w4a16-g32"}
    assert {c.option.format for c in fast.choices} == {"sparse 50 % w8a8"}
    assert "costs least" in str(small)
    assert "would lose" in str(plans[0])


def test_perplexity_bounds_the_rise_of_the_loss() -> None:
    made = model()
    plan = llmq.plan(made, tokens(), max_perplexity_increase=0.001, formats=FORMATS)
    assert plan.bound == ("perplexity", 0.001)
    assert plan.measured is not None
    assert plan.measured.nll is not None
    assert plan.measured.nll <= math.log1p(0.001)


def test_leaves_alone_what_cannot_keep_the_bound() -> None:
    plan = llmq.plan(model(), tokens(), max_kl=1e-12, formats=("w4a16-g32",))
    assert plan.measured is None
    assert plan.bytes_after == plan.bytes_before
    assert all(choice.option.format == "float" for choice in plan.choices)
    made = model()
    plan.apply(made)
    assert not any(isinstance(m, QuantLinear) for m in made.modules())


def test_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, calls = Sensitivity.kl, []

    def counting(self: Sensitivity, *args: Any) -> float:
        if len(calls) == 5:
            calls.append("interrupted")
            raise KeyboardInterrupt
        calls.append("measured")
        return genuine(self, *args)

    monkeypatch.setattr(Sensitivity, "kl", counting)
    settings = {"max_kl": 0.01, "formats": FORMATS, "resume": tmp_path / "plan"}
    made = model()
    with pytest.raises(KeyboardInterrupt):
        llmq.plan(made, tokens(), **settings)
    file = tmp_path / "plan" / "measurements.safetensors"
    with safe_open(file, "pt") as kept:
        assert len(json.loads(kept.metadata()["info"])["kl"]) == 5
    resumed = llmq.plan(made, tokens(), **settings)
    whole = llmq.plan(model(), tokens(), max_kl=0.01, formats=FORMATS)
    assert calls.count("measured") == 5 + 27 + 32  # 8 units of 4 formats, twice, and once more
    assert [c.option for c in resumed.choices] == [c.option for c in whole.choices]
    with pytest.raises(ValueError, match="another model, data or options"):
        llmq.plan(made, tokens().flip(0), **settings)
    file.write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        llmq.plan(made, tokens(), **settings)
    with pytest.raises(ValueError, match="is a file; name a directory"):
        llmq.plan(made, tokens(), **{**settings, "resume": file})


def test_apply_leaves_the_model_as_it_was_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["llmq.planner.result"]
    made = model()
    plan = llmq.plan(made, tokens(), max_kl=0.005, formats=FORMATS)
    assert len({choice.option.format for choice in plan.choices} - {"float"}) > 1
    kinds = {name: type(m) for name, m in made.named_modules()}
    genuine, calls = module.quantize, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        if calls:
            raise MemoryError
        calls.append(args)
        return genuine(*args, **kwargs)

    monkeypatch.setattr(module, "quantize", failing)
    with pytest.raises(MemoryError):
        plan.apply(made)
    assert {name: type(m) for name, m in made.named_modules()} == kinds


def test_is_the_same_each_time_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    first, second = (llmq.plan(model(), tokens(), formats=FORMATS).to_json() for _ in range(2))
    assert json.loads(first)["choices"] == json.loads(second)["choices"]
    torch.manual_seed(0)
    model()
    assert state.shape == torch.get_rng_state().shape


def test_refuses_what_it_cannot_do() -> None:
    made, data = model(), tokens()
    spoilt = model()
    spoilt.model.layers[0].mlp.up_proj.weight.data[1, 2] = math.nan
    cases: dict[str, tuple[Any, type[Exception], str]] = {
        "two bounds": (
            lambda: llmq.plan(made, data, max_kl=0.1, max_perplexity_increase=0.1),
            ValueError,
            "not both",
        ),
        "bound": (lambda: llmq.plan(made, data, max_kl=0), ValueError, "positive number"),
        "nan": (lambda: llmq.plan(made, data, max_kl=math.nan), ValueError, "positive number"),
        "format": (lambda: llmq.plan(made, data, formats=["w3"]), ValueError, "unknown scheme"),
        "sparse": (
            lambda: llmq.plan(made, data, formats=["sparse 5 w8a8"]),
            ValueError,
            "sparse N % SCHEME",
        ),
        "minimize": (lambda: llmq.plan(made, data, minimize="x"), ValueError, '"both"'),
        "tokens": (lambda: llmq.plan(made, data, tokens=0), ValueError, "positive integer"),
        "short": (lambda: llmq.plan(made, data[:500]), ValueError, "two at least"),
        "nan weight": (lambda: llmq.plan(spoilt, data), ValueError, "layers.0.mlp.up_proj"),
        "compressed": (
            lambda: llmq.plan(llmq.quantize(model(), scheme="w8a8"), data),
            ValueError,
            "compressed already",
        ),
        "encoder": (
            lambda: llmq.plan(made.model, [{"input_ids": data[None, :8]}] * 2),
            ValueError,
            "gives no logits",
        ),
        "unlabelled": (
            lambda: llmq.plan(
                made, [{"input_ids": data[None, :8]}] * 2, max_perplexity_increase=0.1
            ),
            ValueError,
            "needs labels",
        ),
    }
    for case in cases.values():
        assert_raises(*case)
    plan = llmq.plan(made, data, max_kl=0.05, formats=FORMATS)
    other = model("gpt2")
    before = state(other)
    assert_raises(lambda: plan.apply(other), ValueError, "another model")
    assert state(other) == before


def test_a_plan_is_no_slower_than_the_fastest_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(N: int, K: int, names: tuple, M: int, *rest: object) -> dict[str, float]:
        # Four bits decode fastest and read a prompt slowest, as on a CPU.
        decode = {"w8a8": 4, "w8a16": 5, "w4a16-g32": 8}
        prompt = {"w8a8": 4, "w8a16": 1.5, "w4a16-g32": 0.7}
        speed = decode if M == 1 else prompt
        return {n: N * K * M / speed.get(n, 1) * 1e-9 for n in ("float", *names)}

    monkeypatch.setattr(planning, "seconds_a_call", seconds)
    formats = ("w8a8", "w8a16", "w4a16-g32")
    made, data = model(), tokens()

    def planned(**settings: Any) -> Any:
        return llmq.plan(made, data, max_kl=1.0, formats=formats, minimize="bytes", **settings)

    free, held = planned(no_slower_than=None), planned()
    assert {choice.option.format for choice in free.choices} == {"w4a16-g32"}
    assert free.limits == ()
    numbers = sum(m.weight.numel() for m in _linears(made))
    assert held.limits == pytest.approx([1.03 * numbers * M / 4 * 1e-9 for M in (1, 512)])
    for after, limit in zip(held.seconds_after, held.limits, strict=True):
        assert after <= limit * (1 + 1e-9)
    assert ", take " in str(held)
    slow = planned(no_slower_than="w8a16")
    assert held.seconds_after[1] < slow.seconds_after[1] <= slow.limits[1] * (1 + 1e-9)
    assert slow.bytes_after < held.bytes_after
    decoding = planned(tokens=1)
    assert decoding.bytes_after == free.bytes_after
    assert decoding.tokens == (1,)
    # The bound comes first: no format that keeps it is as fast.
    kept = llmq.plan(made, data, max_kl=1e-12, formats=formats)
    assert kept.seconds_after[1] > kept.limits[1]


def _linears(made: nn.Module) -> list[nn.Linear]:
    return [m for n, m in made.named_modules() if type(m) is nn.Linear and n != "lm_head"]


def test_refuses_formats_and_texts_that_it_cannot_use() -> None:
    made, data = model(), tokens()
    cases: dict[str, tuple[Any, type[Exception], str]] = {
        "algorithm": (
            lambda: llmq.plan(made, data, formats=["w8a8 nearest"]),
            ValueError,
            "unknown algorithm 'nearest'",
        ),
        "limit": (
            lambda: llmq.plan(made, data, formats=["w8a16"], no_slower_than="w8a8"),
            ValueError,
            "no_slower_than must be",
        ),
        "tokens": (lambda: llmq.plan(made, data, tokens=(1, 0)), ValueError, "positive integer"),
        "text": (lambda: llmq.plan(made, data, validation={"": data}), ValueError, "needs names"),
        "single layer": (
            lambda: planning.make_layer(nn.Linear(64, 64), "w8a8 gptq"),
            ValueError,
            "needs the inputs",
        ),
    }
    for case in cases.values():
        assert_raises(*case)
