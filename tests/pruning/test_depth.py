"""prune(pattern="layers"): blocks that do least go first; what is left is a model of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.models.accelerate import accelerate
from llmq.nn import QuantLinear
from llmq.pruning import depth
from tests import families
from tests.helpers import assert_equal, assert_raises, generator

tf = pytest.importorskip("transformers")

LAYERS = 5
# How each family's configuration is told a number of layers, and where its blocks stand.
DEEP: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": (("num_hidden_layers",), ("model.layers",)),
    "gemma2": (("num_hidden_layers",), ("model.layers",)),
    "gpt2": (("n_layer",), ("transformer.h",)),
    "bert-mlm": (("num_hidden_layers",), ("bert.encoder.layer",)),
    "t5": (("num_layers", "num_decoder_layers"), ("encoder.block", "decoder.block")),
    "bart": (
        ("encoder_layers", "decoder_layers"),
        ("model.encoder.layers", "model.decoder.layers"),
    ),
}
# What writes a block's outputs into the residual stream.
WRITERS = ("o_proj", "down_proj", "c_proj", "o", "wo", "out_proj", "fc2")


def deep(name: str, sizes: tuple[int, ...] = (LAYERS, LAYERS - 1)) -> Any:
    """A model of that many layers, decoder and encoder apart; the same at each call."""
    shallow = families.make(name)
    config = copy.deepcopy(shallow.config)
    for attribute, size in zip(DEEP[name][0], sizes, strict=False):
        setattr(config, attribute, size)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [
            ("full_attention", "sliding_attention")[i % 3 == 1] for i in range(sizes[0])
        ]
    torch.manual_seed(0)
    model = type(shallow)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.03:
                parameter.mul_(4)
    return model


def idle(block: nn.Module) -> None:
    """Let `block`, of a model that norms before its layers, give what it gets."""
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in WRITERS:
            for parameter in module.parameters():
                parameter.data.zero_()


@pytest.mark.parametrize("name", DEEP)
def test_a_model_without_some_blocks(name: str, tmp_path: Path) -> None:
    original = deep(name)
    data: Any = [families.inputs(name)]
    model = llmq.prune(copy.deepcopy(original), 0.4, pattern="layers", data=data)
    attributes, lists = DEEP[name]
    for attribute, path, size in zip(attributes, lists, (LAYERS, LAYERS - 1), strict=False):
        left, before = model.get_submodule(path), original.get_submodule(path)
        assert len(left) == getattr(model.config, attribute) == round(size * 0.6)
        kept = [
            next(i for i, o in enumerate(before) if _same(block, o)) for block in left.children()
        ]
        assert kept == sorted(kept) and kept[0] == 0
        if getattr(model.config, "layer_types", None) is not None:
            assert model.config.layer_types == [original.config.layer_types[i] for i in kept]
            assert len({*model.config.layer_types}) == 2
        for i, block in enumerate(left.children()):
            found = [m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")]
            assert all(index == i for index in found if index is not None)
        # The rest computes what the original does without the others.
        for i, block in enumerate(before.children()):
            if i not in kept:
                block.forward = _through(original.config)
    expected = families.output(original, name)
    assert_equal(families.output(model, name), expected, "output")
    assert f"{lists[0]} 5 -> 3, without" in model.llmq_report.choice
    llmq.save(model, tmp_path / "m")
    assert_equal(families.output(llmq.load(tmp_path / "m"), name), expected, "output when loaded")
    if model.can_generate():
        ids = families.inputs(name)["input_ids"]
        texts = [
            m.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=use_cache)
            for m in (model, llmq.load(tmp_path / "m"))
            for use_cache in (True, False)
        ]
        for other in texts[1:]:
            assert_equal(other, texts[0], "what is written")


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def _through(config: Any) -> Any:
    if config.model_type == "t5":  # (hidden states, then the biases that it was given)
        return lambda h, m, bias, _e=None, _em=None, cross=None, **k: (h, bias, cross)
    return lambda h, *args, **kwargs: h


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_block_that_does_nothing_goes_first(name: str) -> None:
    original = deep(name)
    path = DEEP[name][1][0]
    idle(original.get_submodule(f"{path}.2"))
    expected = families.output(original, name)
    data: Any = [families.inputs(name)]
    decoder: tuple[str, ...] = ("decoder",) if name == "t5" else ()
    if decoder:  # whose blocks have all something to do
        assert_raises(
            lambda: llmq.prune(original, 0.2, pattern="layers", data=data, skip=decoder),
            ValueError, "rate 0.2 leaves 3 of 4 blocks, but the first and those in skip are 4",
        )  # fmt: skip
        idle(original.get_submodule("decoder.block.3"))
        expected = families.output(original, name)
    model = llmq.prune(original, 0.2, pattern="layers", data=data)
    assert f"{path} 5 -> 4, without 2 (" in model.llmq_report.choice
    # Zeros are added in another order: exact but for the sign of zeros.
    assert_equal(families.output(model, name), expected, "output")


def test_influence_by_hand() -> None:
    class Turn(nn.Module):
        """Turns each pair of channels by an angle."""

        def __init__(self, angle: float) -> None:
            super().__init__()
            self.angle = nn.Parameter(torch.tensor(angle))

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            cos, sin = self.angle.cos(), self.angle.sin()
            return torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)

    class Turns(nn.Module):
        def __init__(self, angles: list[float]) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Turn(angle) for angle in angles)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    angles = [0.3, 1.2, 0.1, 0.0, 0.9]
    calls: Any = [((torch.randn(2, 7, 8, generator=generator(0)),), {})]
    found = depth.influences(Turns(angles), calls)
    for i, angle in enumerate(angles):
        wanted = 1 - float(torch.tensor(angle).cos())
        assert found[f"layers.{i}"] == pytest.approx(wanted, abs=1e-6)
    assert depth.chosen("layers", 5, 3, found) == [0, 1, 4]


def test_compressed_before_and_after(tmp_path: Path) -> None:
    """Names of layers move; reports, attributes and checkpoints go on telling the right ones."""
    model = deep("llama")
    idle(model.model.layers[1])
    data: Any = [families.inputs("llama")]
    llmq.prune(model, 0.5, pattern="structured")
    llmq.quantize(model, scheme="w8a8")
    errors = {layer.name: layer.weight_error for layer in model.llmq_report.layers}
    expected = families.output(model, "llama")
    llmq.prune(model, 0.2, pattern="layers", data=data)
    assert_equal(families.output(model, "llama"), expected, "output")
    left = {layer.name: layer.weight_error for layer in model.llmq_report.layers}
    assert len(left) == len(errors) * 4 // 5
    for name, error in left.items():
        layer = int(name.split(".")[2])
        assert error == errors[name.replace(f".{layer}.", f".{layer + (layer > 0)}.")]
    llmq.save(model, tmp_path / "m")
    loaded = llmq.load(tmp_path / "m")
    assert_equal(families.output(loaded, "llama"), expected, "output when loaded")
    llmq.prune(loaded, 0.5)
    assert isinstance(loaded.model.layers[3].mlp.up_proj, llmq.SparseLinear)
    again = llmq.prune(deep("llama"), 0.2, pattern="layers", data=data)
    llmq.quantize(again, scheme="w8a8")
    assert isinstance(again.model.layers[3].mlp.up_proj, QuantLinear)
    reasons = {w.name: w.reason for w in llmq.prune(
        deep("llama"), 0.2, pattern="layers", data=data
    ).llmq_report.untouched}  # fmt: skip
    assert reasons["model.layers.3.mlp.up_proj.weight"] == "in a layer that stays"


def test_accelerated_layers_know_no_old_place() -> None:
    ids = families.inputs("llama")["input_ids"]
    texts = []
    for fast in (False, True):
        model = llmq.quantize(deep("llama"), scheme="w8a8")
        if fast:
            accelerate(model)
            assert len(model.llmq_acceleration.fused) == LAYERS
        llmq.prune(model, 0.4, pattern="layers", data=ids)
        assert not hasattr(model, "llmq_acceleration")
        texts.append(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))
    assert_equal(texts[1], texts[0], "what is written")


def test_lists_of_layers_in_configurations() -> None:
    made = families.make("qwen2-moe")
    config = copy.deepcopy(made.config)
    config.num_hidden_layers, config.layer_types = 5, ["full_attention"] * 5
    config.mlp_only_layers = [1, 3]
    torch.manual_seed(0)
    model = type(made)(config).eval()
    depth.keep(model, {"model.layers": [0, 2, 3]})
    assert model.config.mlp_only_layers == [2]
    again = type(made)(model.config)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_skipped_blocks_stay_and_small_rates_change_nothing() -> None:
    model = deep("llama")
    for i in (1, 3):
        idle(model.model.layers[i])
    data: Any = [families.inputs("llama")]
    stays = model.model.layers[1]
    llmq.prune(model, 0.2, pattern="layers", data=data, skip=("layers.1",))
    assert "without 3 (" in model.llmq_report.choice and model.model.layers[1] is stays
    for rate in (0, 0.1):
        llmq.prune(model, rate, pattern="layers", data=data)
        assert model.llmq_report.choice == "layers: model.layers 4 -> 4"
    llmq.prune(model, 0.99, pattern="layers", data=data)
    assert len(model.model.layers) == model.config.num_hidden_layers == 1


def test_refuses_what_it_cannot_do() -> None:
    model = deep("llama")
    ids = families.inputs("llama")["input_ids"]
    before = str(model), copy.deepcopy(model.config.to_dict())

    def run(**options: Any) -> None:
        llmq.prune(model, 0.4, **{"pattern": "layers", "data": ids, **options})

    assert_raises(lambda: run(data=None), ValueError, "'influence' needs calibration data")
    assert_raises(lambda: run(method="wanda"), ValueError, "choose 'influence' for pattern layers")
    assert_raises(
        lambda: run(pattern="block", method="influence"),
        ValueError,
        "choose 'magnitude' or 'wanda'",
    )
    assert_raises(lambda: run(resume="kept"), ValueError, "resume needs data, and a pattern other")
    skip = ("layers.1", "layers.2", "layers.3")
    assert_raises(lambda: run(skip=skip), ValueError, "leaves 3 of 5 blocks, but the first and")
    assert (str(model), model.config.to_dict()) == before
    assert not hasattr(model, "llmq_report")
    gpt2 = deep("gpt2")
    gpt2.config.scale_attn_by_inverse_layer_idx = True
    assert_raises(
        lambda: llmq.prune(gpt2, 0.4, pattern="layers", data=ids),
        ValueError, "GPT2LMHeadModel divides attention by a layer's place",
    )  # fmt: skip
    plain = nn.Sequential(nn.Linear(4, 4))
    assert_raises(
        lambda: llmq.prune(plain, 0.5, pattern="layers", data=[torch.ones(1, 4)]),
        ValueError, "Sequential has no list of layers that its configuration counts",
    )  # fmt: skip
    assert_raises(
        lambda: depth.chosen("layers", 2, 1, {"layers.0": 1.0}),
        ValueError, "the data must run layers.1 once a batch",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r'use llmq\.prune\(model, pattern="layers"\)'):
        llmq.SparseLinear.from_linear(nn.Linear(4, 4), "layers")
