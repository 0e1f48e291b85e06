"""Layers quantized with calibration data: as quantize makes them, kept, and applied by a plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq
from llmq.calibrate.data import calls_of
from llmq.evaluation.sensitivity import Sensitivity
from llmq.models.targets import find
from llmq.planner.calibrated_layers import CalibratedLayers
from tests.planner.small_model import CODED, FORMATS, model, pairs, replaced, state, tokens


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2"])
def test_layers_coded_with_data_are_applied_without(family: str, tmp_path: Path) -> None:
    made = model(family)
    original = copy.deepcopy(made)
    data = tokens(4096)
    settings: dict[str, Any] = {"max_kl": 0.05, "minimize": "bytes", "no_slower_than": None}
    plan = llmq.plan(made, data, formats=CODED, **settings)
    assert state(made) == state(original), "plan changes nothing"
    plan.apply(made)
    held = [window[None] for window in data.split(512)[4:]]
    assert plan.measured is not None
    assert 0 < plan.measured.intervals["kl"].high <= 0.05
    assert llmq.compare(original, made, held).kl == pytest.approx(plan.measured.kl, rel=1e-3)
    again = plan.apply(copy.deepcopy(original))
    assert all(torch.equal(a, b) for a, b in pairs(made, again))
    report = {layer.name: layer for layer in made.llmq_report.layers}
    chosen = {n for c in plan.choices if c.option.format != "float" for n in c.names}
    assert chosen
    assert all(report[name].weight_error < 0.3 for name in chosen)
    assert sum(made.get_submodule(n).bytes() for n in chosen) == sum(
        c.option.bytes for c in plan.choices if c.option.format != "float"
    )
    llmq.save(made, tmp_path)
    assert all(torch.equal(a, b) for a, b in pairs(made, llmq.load(tmp_path)))


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
                assert all(torch.equal(a, b) for a, b in pairs(layer, other)), target.name
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
    assert all(torch.equal(a, b) for a, b in pairs(*applied))
    with pytest.raises(ValueError, match="another model, data or options"):
        llmq.plan(model(), data, calibration=data.flip(0), **settings)
