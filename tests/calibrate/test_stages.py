"""Running a model block by block: what stages see, what is gathered there, where scales fold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.calibrate.blockwise import still
from llmq.calibrate.data import calls_of
from llmq.calibrate.folding import Journal, find_folds
from llmq.calibrate.stages import stages
from llmq.calibrate.statistics import ROWS, gather
from llmq.models.targets import find as find_layers
from tests import families
from tests.helpers import assert_equal, generator

EVERY = pytest.mark.parametrize("name", families.ALL)


@EVERY
def test_stages_see_what_the_whole_model_sees(name: str) -> None:
    """Second moments of each layer, block by block, are those of one run of the whole model."""
    model = families.make(name)
    calls = calls_of(model, families.batches(name))
    found = find_layers(model, None, embeddings=False)
    groups = [g for g in found.groups if g[0].kind != "expert"]
    expected: dict[str, Tensor] = {}

    def note(name: str, args: Any) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        expected[name] = expected.get(name, 0) + x.T @ x

    handles = [
        target.module.register_forward_pre_hook(lambda _m, args, name=g[0].name: note(name, args))
        for g in groups
        for target in g
    ]
    with still(model):
        for args, kwargs in calls:
            model(*args, **kwargs)
        for handle in handles:
            handle.remove()
        seen = 0
        for stage in stages(model, calls):
            own = [
                g
                for g in groups
                if (g[0].name.startswith(f"{stage.name}.") if stage.name else g[0].name in expected)
            ]
            for group, statistics in zip(own, gather(stage, own, full=True), strict=True):
                H = expected.pop(group[0].name)
                # float32 sums of as many products, in another order
                assert torch.allclose(statistics.moments, H, rtol=1e-4, atol=1e-5 * float(H.max()))
                assert torch.allclose(statistics.squares, H.diagonal(), rtol=1e-4)
                seen += 1
    assert seen == len(groups) and not expected


def test_only_one_block_is_kept() -> None:
    """What the stages keep of earlier blocks takes no memory but for the last one."""
    model = families.make("llama")
    model.model.layers.extend(copy.deepcopy(model.model.layers[0]) for _ in range(4))
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = 6
    model.config.layer_types = None
    calls = calls_of(model, torch.arange(3, 67).reshape(2, 32))
    with still(model):
        for stage in stages(model, calls):
            if not stage.name:
                kept = stage.replayed[0]
    stored = {name: t.untyped_storage().nbytes() for name, t in kept.items()}
    assert list(stored.values()) == [4] * 5 + [32 * 64 * 4]


def test_statistics_and_shared_inputs() -> None:
    model = families.make("llama")
    calls = calls_of(model, families.batches("llama"))
    layer = "model.layers.0."
    groups = [g for g in find_layers(model, None, embeddings=False).groups if layer in g[0].name]
    inputs: list[Tensor] = []
    with still(model):
        stage = next(iter(stages(model, calls)))
        q = stage.module.self_attn.q_proj
        handle = q.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
        found = gather(stage, groups, full=False, sample=True)
        handle.remove()
    x = torch.cat([i.reshape(-1, 64) for i in inputs])
    assert found[0] is found[1] is found[2] and found[0] is not found[3]
    assert found[0].rows == len(x) == 36
    assert torch.equal(found[0].largest, x.abs().amax(0))
    assert torch.allclose(found[0].absolute, x.abs().sum(0), rtol=1e-5)
    assert torch.allclose(found[0].squares, x.square().sum(0), rtol=1e-5)
    assert len(found[0].inputs()) == min(36, ROWS)
    found[0].scale(torch.full((64,), 2.0))
    assert torch.equal(found[1].largest, x.abs().amax(0) / 2)


FOLDS = {  # of the linear layers of one block, how many can have their inputs scaled
    "gpt2": 3,  # not what follows GELU
    "llama": 7,
    "gemma2": 7,  # norms that multiply by 1 + weight
    "phi3": 4,  # fused q, k, v and gate, up
    "opt": 6,  # ReLU lets a scale through
    "bert": 1,  # its norms are added to the residual too
    "mixtral": 4,  # its router reads what experts read
    "t5": 6,
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds_change_nothing(name: str) -> None:
    model = families.make(name)
    expected = families.output(model, name)
    calls = calls_of(model, [families.inputs(name)])
    found = find_layers(model, None, embeddings=False)
    g = generator(0)
    journal = Journal()
    with still(model):
        stage = next(iter(stages(model, calls)))
        groups = [t for t in found.groups if t[0].name.startswith(f"{stage.name}.")]
        folds = find_folds(stage.module, stage.calls[0], groups)
        assert sum(len(fold.readers) for fold in folds) == FOLDS[name]
        for fold in folds:
            K = fold.readers[0].module.weight.shape[0 if name == "gpt2" else 1]
            fold.apply(fold.shared(torch.rand(K, generator=g) * 3 + 0.2), journal)
    scaled = families.output(model, name)
    # Each value is multiplied and divided once: some roundings of 2^-24, grown by two blocks.
    assert torch.allclose(scaled, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    journal.undo()
    assert_equal(families.output(model, name), expected, "output after undo")
