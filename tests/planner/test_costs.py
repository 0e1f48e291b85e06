"""What plan measures: layers that share an input, KL of each alone, and times."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import llmq
from llmq.evaluation.sensitivity import Sensitivity, distance
from llmq.models.targets import find
from llmq.planner import costs as planning
from llmq.planner.calibrated_layers import CalibratedLayers
from tests import families
from tests.planner.small_model import model, replaced, tokens


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
