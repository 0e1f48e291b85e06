"""Calibration: every family block by block; what is gathered; nothing kept, nothing half done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.calibrate.data import WINDOWS, calls_of
from tests import families
from tests.helpers import assert_equal
from tests.quantization.test_quantize import snapshot

EVERY = pytest.mark.parametrize("name", families.ALL)


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


def test_same_data_same_codes() -> None:
    states = []
    for _ in range(2):
        model = families.make("llama")
        data: Any = families.batches("llama")
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
