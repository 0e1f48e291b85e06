"""Calibration: every family block by block; what is gathered; nothing kept, nothing half done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.calibrate.blockwise import still
from llmq.calibrate.data import WINDOWS, calls_of
from llmq.calibrate.folding import Journal, find_folds
from llmq.calibrate.stages import stages
from llmq.calibrate.statistics import ROWS, gather
from llmq.models.targets import find as find_layers
from tests import families
from tests.helpers import assert_equal, generator
from tests.quantization.test_quantize import snapshot

EVERY = pytest.mark.parametrize("name", families.ALL)


def batches(name: str) -> list[dict[str, Tensor]]:
    """Two batches of other sentences than `families.inputs`, one of them shorter."""
    given = families.inputs(name)
    first = {k: v.roll(1, 0) if k != "attention_mask" else v for k, v in given.items()}
    return [first, {k: v[:, :5] for k, v in given.items()}]


@EVERY
def test_stages_see_what_the_whole_model_sees(name: str) -> None:
    """Second moments of each layer, block by block, are those of one run of the whole model."""
    model = families.make(name)
    calls = calls_of(model, batches(name))
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
    calls = calls_of(model, batches("llama"))
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


@EVERY
def test_every_family_gains_from_calibration(name: str) -> None:
    original = families.make(name)
    expected = families.output(original, name)
    given: Any = [families.inputs(name)]

    def error(**options: Any) -> float:
        model = llmq.quantize(copy.deepcopy(original), **options)
        return 1 - families.cosine(families.output(model, name), expected)

    assert error(scheme="w4a16-g32", algorithm="gptq", data=given) < 0.3 * error(scheme="w4a16-g32")
    plain = error(scheme="w8a8")
    assert error(scheme="w8a8", algorithm="smoothquant+gptq", data=given) < 0.8 * plain


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "mixtral", "gpt2"])
def test_every_kind_of_pruning_gains_from_calibration(name: str) -> None:
    original = families.make(name)
    expected = families.output(original, name)
    given: Any = [families.inputs(name)]

    def error(**options: Any) -> float:
        model = llmq.prune(copy.deepcopy(original), 0.5, **options)
        return 1 - families.cosine(families.output(model, name), expected)

    magnitude = error()
    wanda = error(method="wanda", data=given)
    assert error(method="sparsegpt", data=given) < 0.7 * wanda < 0.7 * magnitude
    assert error(method="sparsegpt", pattern="2:4", data=given) < 0.8 * error(pattern="2:4")


def test_prune_then_quantize_jointly() -> None:
    given: Any = [families.inputs("llama")]
    expected = families.output(families.make("llama"), "llama")
    errors = {}
    for method, algorithm in (("magnitude", "rtn"), ("sparsegpt", "gptq")):
        data = None if method == "magnitude" else given
        for order in ("prune, quantize", "quantize, prune"):
            model = families.make("llama")
            for verb in order.split(", "):
                if verb == "prune":
                    llmq.prune(model, 0.5, method=method, data=data)
                else:
                    llmq.quantize(model, scheme="w8a8", algorithm=algorithm, data=data)
            layer = model.model.layers[0].mlp.up_proj
            assert isinstance(layer, llmq.SparseLinear) and layer.scheme is not None
            assert int(layer.mask().sum()) == layer.mask().numel() // 2
            errors[method, order] = 1 - families.cosine(families.output(model, "llama"), expected)
    for order in ("prune, quantize", "quantize, prune"):
        assert errors["sparsegpt", order] < 0.5 * errors["magnitude", order]


STATIC = ("rtn", "clip", "smoothquant", "gptq", "smoothquant+gptq")


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "mixtral", "gpt2"])
def test_static_scales_are_measured_on_what_arrives(name: str) -> None:
    """With "rtn" no input of the data saturates, and at least one has the last code."""
    original = families.make(name)
    given: Any = [families.inputs(name)]
    expected = families.output(original, name)
    errors = {}
    for algorithm in STATIC:
        model = llmq.quantize(
            copy.deepcopy(original), scheme="w8a8-static", algorithm=algorithm, data=given
        )
        errors[algorithm] = 1 - families.cosine(families.output(model, name), expected)
    assert errors["rtn"] < 2e-3 and errors["clip"] < 1.2 * errors["rtn"]
    assert errors["smoothquant+gptq"] < errors["smoothquant"] < errors["rtn"]
    model = llmq.quantize(original, scheme="w8a8-static", data=given)
    seen: dict[str, float] = {}

    def note(layer: str, args: Any) -> None:
        seen[layer] = max(seen.get(layer, 0.0), float(args[0].abs().max()))

    static = {
        layer: module
        for layer, module in model.named_modules()
        if isinstance(module, llmq.QuantLinear) and module.input_scale is not None
    }
    for layer, module in static.items():
        module.register_forward_pre_hook(lambda _m, args, layer=layer: note(layer, args))
    families.output(model, name)
    assert len(static) >= 8
    for layer, module in static.items():
        # Layers of the same block were not rounded yet when it was measured: a percent or two.
        assert 0.95 < seen[layer] / (127 * float(module.input_scale)) < 1.05, layer


def test_a_static_scale_gives_up_an_outlier_that_costs_little() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 32)
    x[7, 3] = 40.0
    linear = nn.Linear(32, 16)
    with torch.no_grad():
        linear.weight[:, 3] *= 1e-3  # an input that hardly matters

    def scale(algorithm: str) -> float:
        model: Any = nn.Sequential(copy.deepcopy(linear))
        llmq.quantize(model, scheme="w8a8-static", algorithm=algorithm, data=[x])
        assert "w8a8-static" in str(model.llmq_report)
        return 127 * float(model[0].input_scale)

    assert scale("rtn") == pytest.approx(40.0)
    assert 2.5 < scale("clip") < 6
    with torch.no_grad():
        linear.weight[:, 3] *= 1e5  # one that matters more than all others
    assert scale("clip") > 35


def test_smoothquant_repairs_static_scales_of_massive_channels() -> None:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(64), nn.Linear(64, 32)
    with torch.no_grad():
        norm.weight[[3, 40]] = 60.0

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = copy.deepcopy(norm), copy.deepcopy(linear)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(self.norm(x))
            return y

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers[0](x) + self.layers[1](x)
            return y

    x = torch.randn(256, 64)
    original = Model().eval()
    y = original(x)

    def error(algorithm: str) -> float:
        model = llmq.quantize(
            copy.deepcopy(original), scheme="w8a8-static", algorithm=algorithm, data=[x]
        )
        return float(((model(x) - y).norm() / y.norm()).detach())

    assert error("smoothquant") < 0.7 * error("rtn")


def test_static_scales_where_no_data_comes_are_dynamic() -> None:
    model = families.make("mixtral")
    data: Any = [{"input_ids": torch.tensor([[5]])}]  # one token: two experts of four
    llmq.quantize(model, scheme="w8a8-static", data=data)
    assert "dynamic, and rounded to nearest, as no data reached them" in model.llmq_report.choice
    schemes = {layer.scheme for layer in model.llmq_report.layers}
    assert schemes == {"w8a8", "w8a8-static"}
    assert torch.isfinite(families.output(model, "mixtral")).all()
    zeros: Any = nn.Sequential(nn.Linear(8, 8))
    llmq.quantize(zeros, scheme="w8a8-static", algorithm="clip", data=[torch.zeros(3, 8)])
    assert zeros[0].scheme.name == "w8a8"


def test_static_embeddings_are_dynamic() -> None:
    model = families.make("llama-tied")
    data: Any = batches("llama-tied")
    llmq.quantize(model, scheme="w8a8-static", data=data, skip=())
    assert model.lm_head.scheme.name == "w8a8" and model.lm_head.input_scale is None
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_same_data_same_codes() -> None:
    states = []
    for _ in range(2):
        model = families.make("llama")
        data: Any = batches("llama")
        llmq.quantize(model, scheme="w8a8-static", algorithm="smoothquant+gptq", data=data)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert_equal(tensor, states[1][name], name)


def test_any_module_without_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8), nn.Linear(8, 8)).eval()
    x = torch.randn(256, 32) * torch.logspace(-1, 1, 32)
    y = model(x)
    plain = llmq.quantize(copy.deepcopy(model), bits=4)
    calibrated = llmq.quantize(copy.deepcopy(model), bits=4, algorithm="gptq", data=[x])
    assert (calibrated(x) - y).norm() < 0.8 * (plain(x) - y).norm()
    assert "gptq, calibrated on 1 batches" in str(calibrated.llmq_report)


def test_layers_without_data_are_named() -> None:
    model = families.make("mixtral")
    data: Any = [{"input_ids": torch.tensor([[5]])}]  # one token: two experts of four
    llmq.quantize(model, scheme="w4a16-g32", algorithm="gptq", data=data)
    assert "no data reached them: model.layers.0.mlp.experts." in model.llmq_report.choice
    assert torch.isfinite(families.output(model, "mixtral")).all()


def test_forms_of_data() -> None:
    model = families.make("llama")
    assert len(calls_of(model, torch.arange(3, 103))) == 1
    assert len(calls_of(model, torch.ones(512 * (WINDOWS + 9), dtype=torch.int64))) == WINDOWS
    assert len(calls_of(model, torch.ones(3, 20, dtype=torch.int64))) == 3

    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(c) % 100 for c in text]}

    (_, kwargs), *_ = calls_of(model, (["some text", "and more"], Tokenizer()))
    assert kwargs["input_ids"].shape == (1, 18)
    plain = nn.Sequential(nn.Linear(4, 4))
    assert [
        len(args)
        for args, _ in calls_of(plain, [torch.ones(2, 4), (torch.ones(1, 4), torch.ones(1))])
    ] == [1, 1]


class Overflows(nn.Module):
    """Its second block gives NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) * (torch.nan if i == 1 else 1)
        return x


ERRORS = {
    "no data": ({"algorithm": "gptq"}, ValueError, "'gptq' needs calibration data"),
    "static": ({"scheme": "w8a8-static"}, ValueError, "static activations need data to measure"),
    "unknown": ({"algorithm": "gptq+awq"}, ValueError, "unknown algorithm 'gptq\\+awq'; choose"),
    "empty": ({"algorithm": "gptq", "data": []}, ValueError, "data is empty"),
    "short": ({"algorithm": "awq", "data": torch.ones(1).long()}, ValueError, "data is empty"),
    "form": ({"algorithm": "awq", "data": 3}, TypeError, "data must be token ids"),
    "text": ({"algorithm": "awq", "data": "text"}, TypeError, "pair \\(text, tokenizer\\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_would_do(case: str) -> None:
    options, kind, message = ERRORS[case]
    model = families.make("llama")
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        llmq.quantize(model, **{"scheme": "w4a16-g32", **options})
    assert snapshot(model)[0] == before[0]


def test_nan_activations_name_the_place() -> None:
    model = Overflows()
    with pytest.raises(ValueError, match=r"layers\.2 gets NaN or infinite inputs"):
        llmq.quantize(model, scheme="w8a8", algorithm="gptq", data=[torch.ones(2, 8)])
    assert type(model.layers[0]) is nn.Linear


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_an_interrupted_verb_leaves_the_model_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmq.quantization import gptq

    model = families.make(name)
    before, state = str(model), {n: t.clone() for n, t in model.state_dict().items()}
    encode, count = gptq.encode, [0]

    def fails(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] > 9:
            raise KeyboardInterrupt
        return encode(*args, **kwargs)

    monkeypatch.setattr(gptq, "encode", fails)
    data: Any = [families.inputs(name)]
    with pytest.raises(KeyboardInterrupt):
        llmq.quantize(model, scheme="w4a16-g32", algorithm="awq+gptq", data=data)
    assert str(model) == before
    for key, tensor in model.state_dict().items():
        assert_equal(tensor, state[key], key)
    assert model.config.use_cache


@pytest.mark.parametrize("verb", ["quantize", "prune"])
def test_an_interrupted_verb_goes_on(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption in the second block, the same call redoes no layer of the first."""
    from llmq.pruning import obs

    data: Any = [families.inputs("gemma2")]
    options: dict[str, Any] = {"algorithm": "smoothquant+gptq", "data": data}
    options["scheme"] = "w8a8-static"
    if verb == "prune":
        options = {"method": "sparsegpt", "data": data}
    run = getattr(llmq, verb)
    expected = run(families.make("gemma2"), **options)
    solve, count, limit = obs.solve, [0], [9]

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] > limit[0]:
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    monkeypatch.setattr(obs, "solve", counted)
    with pytest.raises(KeyboardInterrupt):
        run(families.make("gemma2"), **options, resume=tmp_path / "kept")
    count[0], limit[0] = 0, 99
    model = run(families.make("gemma2"), **options, resume=tmp_path / "kept")
    assert count[0] == 7  # of 14 layers
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert_equal(state[name], tensor, name)
    assert str(model.llmq_report) == str(expected.llmq_report)
    other: Any = [{"input_ids": torch.arange(3, 20)[None]}]
    with pytest.raises(ValueError, match="another model, data or options"):
        run(families.make("gemma2"), **{**options, "data": other}, resume=tmp_path / "kept")
