"""plan: the cheapest choice within the bound, checked on other text, and applied as planned."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from torch import Tensor, nn

import llmq
from llmq.calibrate.data import calls_of
from llmq.evaluation.sensitivity import Distance, Sensitivity, distance
from llmq.models.targets import find
from llmq.nn import QuantLinear, SparseLinear
from llmq.planner import costs as planning
from llmq.planner import knapsack as choosing
from llmq.planner.calibrated_layers import CalibratedLayers
from llmq.planner.costs import Option
from llmq.planner.knapsack import solve
from tests import families
from tests.helpers import assert_raises, generator, seeds

tf = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times by a formula: tests of choices must not depend on the machine, nor wait for it."""

    def seconds(N: int, K: int, names: tuple, M: int, *rest: object) -> dict[str, float]:
        speed = {"w8a8": 4, "w8a16": 3, "w4a16-g32": 5, "sparse 50 % w8a8": 6}
        return {n: N * K * M / speed.get(n, 1) * 1e-9 for n in ("float", *names)}

    monkeypatch.setattr(planning, "seconds_a_call", seconds)


FORMATS = ("w8a8", "w8a16", "w4a16-g32", "sparse 50 % w8a8")


def tokens(count: int = 1024, vocabulary: int = 128) -> Tensor:
    return torch.randint(3, vocabulary, (count,), generator=generator(0))


def replaced(calibrated: CalibratedLayers, taken: list[Any]) -> Any:
    return planning.parted(planning.replacement(taken, {}, calibrated))


def model(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    made = families.CAUSAL[family]().eval()
    with torch.no_grad():  # so that outputs depend on the layers
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return made


def test_times_are_of_this_machine_and_rotate_among_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    asked = []
    genuine = planning.seconds_a_call

    def noted(*args: Any) -> dict[str, float]:
        asked.append(args)
        return genuine(*args)

    monkeypatch.setattr(planning, "seconds_a_call", noted)
    plan = llmq.plan(model(), tokens(), max_kl=0.05, formats=("w8a8",), tokens=3)
    assert all(len(c.before.seconds) == 1 and c.before.seconds[0] > 0 for c in plan.choices)
    counts = {(N, K): layers for N, K, _, M, _, _, layers in asked if M == 3}
    assert counts == {(64, 64): 4, (32, 64): 4, (128, 64): 4, (64, 128): 2}


# -- the choice ------------------------------------------------------------------------------------


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
    within = budget * (1 - len(rows) / choosing._STEPS)  # each KL is rounded up to a step
    every = [outcome(choice) for choice in itertools.product(*(range(len(r)) for r in rows))]
    assert cost <= min(c for kl, c in every if kl <= within) + 1e-12
    assert cost >= min(c for kl, c in every if kl <= budget) - 1e-12


def test_solve_without_a_bound_or_without_a_budget() -> None:
    rows, costs = _problem(3)
    free = solve(rows, costs, math.inf)
    assert [c[i] for c, i in zip(costs, free, strict=True)] == [min(c) for c in costs]
    assert not any(solve(rows, costs, 0.0))
    assert solve([], [], 1.0) == []


# -- what is measured ------------------------------------------------------------------------------

UNITS = {
    "llama": [
        "model.layers.0.self_attn.{q_proj,k_proj,v_proj}",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.{gate_proj,up_proj}",
        "model.layers.0.mlp.down_proj",
    ],
    "gpt2": [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    ],
    "gpt-neox": [
        "gpt_neox.layers.0.attention.query_key_value",
        "gpt_neox.layers.0.attention.dense",
        "gpt_neox.layers.0.mlp.dense_h_to_4h",
        "gpt_neox.layers.0.mlp.dense_4h_to_h",
    ],
}


@pytest.mark.parametrize("family", UNITS)
def test_layers_that_share_an_input_are_one_unit(family: str) -> None:
    made = model(family)
    sensitivity = Sensitivity(made, tokens(32)[None])
    units = sensitivity.units(find(made, None, embeddings=False).groups)
    first = [unit.name for unit in units if ".0." in unit.name]
    assert first == UNITS[family]
    assert all(unit.calls == 1 for unit in units)


def test_cross_attention_reads_one_input_in_many_blocks() -> None:
    torch.manual_seed(0)
    made = families.SEQ2SEQ["t5"]().eval()
    ids = tokens(24).reshape(2, 12)
    batch = {"input_ids": ids, "labels": ids}
    units = Sensitivity(made, batch).units(find(made, None, embeddings=False).groups)
    names = [unit.name for unit in units]
    assert "decoder.block.0.layer.1.EncDecAttention.{k,v}" in names
    assert "decoder.block.1.layer.1.EncDecAttention.{k,v}" in names


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bloom"])
def test_kl_with_blocks_replayed_is_that_of_the_whole_model(family: str) -> None:
    made = model(family)
    batch = tokens(48)[None]
    sensitivity = Sensitivity(made, batch)
    for unit in sensitivity.units(find(made, None, embeddings=False).groups):
        layers, targets = replaced(CalibratedLayers(made), [(unit, "w4a16-g32")])
        found = sensitivity.kl(layers, targets)
        changed = copy.deepcopy(made)
        for name, layer in layers.items():
            parent, _, attribute = name.rpartition(".")
            setattr(changed.get_submodule(parent), attribute, layer)
        report = llmq.compare(made, changed, batch)
        # A mean over 47 positions that have a label, as `aligned` leaves the last one out.
        assert found == pytest.approx(report.kl, rel=1e-3, abs=1e-7), unit.name
        assert found > 0


def test_distance_is_what_compare_says() -> None:
    made = model()
    targets = [group[0] for group in find(made, None, embeddings=False).groups]
    layers = {t.name: planning.make_layer(t.module, "w4a16-g32") for t in targets}
    windows = list(tokens(300).reshape(3, 1, 100))
    found = distance(made, windows, layers, targets)
    changed = llmq.quantize(copy.deepcopy(made), scheme="w4a16-g32")
    report = llmq.compare(made, changed, windows)
    assert found.kl == pytest.approx(report.kl, rel=1e-4)
    assert found.nll == pytest.approx(report.intervals["nll"].value, abs=1e-5)
    assert found.intervals["kl"].low == pytest.approx(report.intervals["kl"].low, abs=1e-5)
    assert found.tokens == 297


# -- plans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_a_plan_keeps_its_bound_and_is_applied_as_planned(family: str) -> None:
    made = model(family)
    original = copy.deepcopy(made)
    data = tokens(2048)
    plan = llmq.plan(made, data, max_kl=0.02, formats=FORMATS)
    assert _state(made) == _state(original), "plan changes nothing"
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


def _state(module: nn.Module) -> dict[str, list]:
    return {name: tensor.flatten()[:50].tolist() for name, tensor in module.state_dict().items()}


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


def test_backs_off_where_held_out_text_is_harder(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, asked = choosing.distance, []

    def harder(*args: Any) -> Any:
        found = genuine(*args)
        asked.append(found.tokens)
        # The second half of the data loses four times as much as the first.
        factor = 4 if found.tokens == 511 else 1
        return type(found)(factor * found.kl, found.nll, found.tokens, found.intervals)

    easy = llmq.plan(model(), tokens(1536), max_kl=0.01, formats=FORMATS)
    monkeypatch.setattr(choosing, "distance", harder)
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

    monkeypatch.setattr(choosing, "distance", loss)
    checked = choosing.choose(
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

    module = sys.modules["llmq.planner.plan"]
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
    before = _state(other)
    assert_raises(lambda: plan.apply(other), ValueError, "another model")
    assert _state(other) == before


# -- time limits -----------------------------------------------------------------------------------


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

    choice = choosing.solve_within(rows, costs, budget, limits)
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
    shrunk = budget * (1 - len(rows) / choosing._STEPS)
    every = [used(each) for each in itertools.product(*(range(len(row)) for row in rows))]
    for m in range(2):
        alone = [limits[m] if k == m else math.inf for k in range(2)]
        taken = used(choosing.solve_within(rows, costs, budget, alone))[1 + m]
        least = min(found[1 + m] for found in every if found[0] <= shrunk)
        assert taken <= max(limits[m], least + 1e-3)


def test_single_units_change_where_pairs_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_SINGLY", 0)
    rows = [[Option("float", 0.0, (2.0,), 2), Option("w8a8", 1e-3, (1.0,), 1)] for _ in range(5)]
    costs = [[2.0, 1.0]] * 5
    assert choosing._exchanged(rows, costs, 1.0, [10.0], [0] * 5) == [1] * 5
    assert sum(choosing._exchanged(rows, costs, 2.5e-3, [10.0], [0] * 5)) == 2


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
    choice = choosing.solve_within(rows, costs, 1.0, [8.0, 16.0 + 3 * 3.0 + 1.0])
    assert sorted(choice) == [1] * 5 + [2] * 3
    choice = choosing.solve_within(rows, costs, 1.0, [0.9 * 8.0, 16.0 + 3 * 3.0])
    assert choice.count(2) == 3, "each limit is kept, the first by what the second leaves"


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


# -- what data makes of layers ---------------------------------------------------------------------

CODED = ("w8a8 smoothquant", "w8a8 smoothquant+gptq", "w4a8-g32 gptq", "w4a16-g32 gptq")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2"])
def test_layers_coded_with_data_are_applied_without(family: str, tmp_path: Path) -> None:
    made = model(family)
    original = copy.deepcopy(made)
    data = tokens(4096)
    settings: dict[str, Any] = {"max_kl": 0.05, "minimize": "bytes", "no_slower_than": None}
    plan = llmq.plan(made, data, formats=CODED, **settings)
    assert _state(made) == _state(original), "plan changes nothing"
    plan.apply(made)
    held = [window[None] for window in data.split(512)[4:]]
    assert plan.measured is not None
    assert 0 < plan.measured.intervals["kl"].high <= 0.05
    assert llmq.compare(original, made, held).kl == pytest.approx(plan.measured.kl, rel=1e-3)
    again = plan.apply(copy.deepcopy(original))
    assert all(torch.equal(a, b) for a, b in _pairs(made, again))
    report = {layer.name: layer for layer in made.llmq_report.layers}
    chosen = {n for c in plan.choices if c.option.format != "float" for n in c.names}
    assert chosen
    assert all(report[name].weight_error < 0.3 for name in chosen)
    assert sum(made.get_submodule(n).bytes() for n in chosen) == sum(
        c.option.bytes for c in plan.choices if c.option.format != "float"
    )
    llmq.save(made, tmp_path)
    assert all(torch.equal(a, b) for a, b in _pairs(made, llmq.load(tmp_path)))


def _pairs(a: nn.Module, b: nn.Module) -> Any:
    return zip(a.state_dict().values(), b.state_dict().values(), strict=True)


def test_codes_are_those_of_quantize_where_nothing_comes_before() -> None:
    made, data = model(), tokens(1024)
    windows = [window[None] for window in data.split(512)]
    units = Sensitivity(made, windows[0]).units(find(made, None, embeddings=False).groups)
    calibrated = CalibratedLayers(made)
    calibrated.calibrate(units, CODED, calls_of(made, windows))
    for name, scheme, algorithm in (
        ("w8a8 smoothquant", "w8a8", "smoothquant"),
        ("w4a8-g32 gptq", "w4a8-g32", "gptq"),
        ("w4a16-g32 gptq", "w4a16-g32", "gptq"),
    ):
        whole = copy.deepcopy(made)
        llmq.quantize(whole, scheme=scheme, data=windows, algorithm=algorithm)
        layers, targets = replaced(calibrated, [(units[0], name)])
        assert len(layers) == 3 + ("smoothquant" in name)
        for target in targets:
            layer, other = layers[target.name], whole.get_submodule(target.name)
            assert type(layer) is type(other)
            # v_proj's rows take the scales of o_proj there, which were not asked for here.
            if not (algorithm == "smoothquant" and target.name.endswith("v_proj")):
                assert all(torch.equal(a, b) for a, b in _pairs(layer, other)), target.name
    assert calibrated.get(units[1], "w4a8-g32 gptq") is not None


def test_scales_divide_the_layer_before_whatever_its_format() -> None:
    made, data = model(), tokens(1024)
    with torch.no_grad():
        for layer in made.model.layers:  # outliers in the inputs of down_proj
            layer.mlp.up_proj.weight[:3] *= 60
            layer.mlp.down_proj.weight[:, :3] /= 60
    windows = [window[None] for window in data.split(512)]
    sensitivity = Sensitivity(made, windows[0])
    units = sensitivity.units(find(made, None, embeddings=False).groups)
    gate_up, down = units[2], units[3]
    assert [len(unit.targets) for unit in (gate_up, down)] == [2, 1]
    calibrated = CalibratedLayers(made)
    calibrated.calibrate(units, CODED, calls_of(made, windows))
    scaled = (down, "w8a8 smoothquant")
    from_data = calibrated.get(*scaled)
    assert from_data is not None
    division = from_data.division
    assert division is not None
    up = next(t for t in gate_up.targets if t.name == division.writer)
    assert sensitivity.kl(*replaced(calibrated, [scaled])) < sensitivity.kl(
        *replaced(calibrated, [(down, "w8a8")])
    )
    for name in (*FORMATS, *CODED, "low-rank 50 % w8a8"):
        alone = replaced(calibrated, [(gate_up, name)])[0][up.name].dequantize()
        layers, targets = replaced(calibrated, [scaled, (gate_up, name)])
        assert len(targets) == len({target.name for target in targets})
        if "sparse" not in name and "low-rank" not in name:  # what is cut depends on sizes
            torch.testing.assert_close(
                layers[up.name].dequantize() * division.by[:, None], alone, rtol=1e-5, atol=1e-6
            )
        both = sensitivity.kl(layers, targets)
        parts = sensitivity.kl(*replaced(calibrated, [scaled])) + sensitivity.kl(
            *replaced(calibrated, [(gate_up, name)])
        )
        assert both < 3 * parts


def test_scales_keep_what_large_channels_would_cost() -> None:
    made = model()
    with torch.no_grad():
        for layer in made.model.layers:
            layer.input_layernorm.weight[:3] *= 60
            layer.self_attn.q_proj.weight[:, :3] /= 60
            layer.self_attn.k_proj.weight[:, :3] /= 60
            layer.self_attn.v_proj.weight[:, :3] /= 60
    batch = tokens(512)[None]
    sensitivity = Sensitivity(made, batch)
    units = sensitivity.units(find(made, None, embeddings=False).groups)
    calibrated = CalibratedLayers(made)
    calibrated.calibrate(units, CODED[:1], calls_of(made, [batch]))
    before = copy.deepcopy(made.state_dict())
    for unit in (units[0], units[4]):
        plain = sensitivity.kl(*replaced(calibrated, [(unit, "w8a8")]))
        assert sensitivity.kl(*replaced(calibrated, [(unit, "w8a8 smoothquant")])) < plain / 4
    after = made.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the norm is put back"


def test_coded_layers_are_kept_and_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmq.planner.calibrated_layers

    data, settings = tokens(2048), {"formats": CODED, "resume": tmp_path / "plan"}
    first = llmq.plan(model(), data, **settings)
    in_memory = llmq.plan(model(), data, formats=CODED)
    assert [c.option for c in first.choices] == [c.option for c in in_memory.choices]
    assert len(list((tmp_path / "plan" / "calibrated").iterdir())) == 8 * 3  # units, weight formats

    def never(*args: Any) -> Any:
        raise AssertionError("calibrated again")

    with monkeypatch.context() as patched:
        patched.setattr(llmq.planner.calibrated_layers, "stages", never)
        again = llmq.plan(model(), data, **settings)
    applied = [plan.apply(model()) for plan in (first, again)]
    assert all(torch.equal(a, b) for a, b in _pairs(*applied))
    with pytest.raises(ValueError, match="another model, data or options"):
        llmq.plan(model(), data, calibration=data.flip(0), **settings)


# -- the bound -------------------------------------------------------------------------------------


def test_the_bound_holds_on_every_text_and_at_the_upper_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genuine = choosing.distance
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

    monkeypatch.setattr(choosing, "distance", unsure)
    sure = llmq.plan(model(), data, validation=other, **settings)
    assert sure.validated["validation"].intervals["kl"].high <= 0.01
    assert sure.bytes_after > easy.bytes_after


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
