"""Reconstruction without labels: least squares on what a mask or a grid leaves free."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.nn import QuantLinear, SparseLinear
from llmq.training import reconstruct
from llmq.training.reconstruct import Moments, masked_least_squares
from tests import families
from tests.helpers import assert_equal, assert_raises, generator, random_mask

tf = pytest.importorskip("transformers")


def _inputs(rows: int, K: int, seed: int = 0) -> Tensor:
    g = generator(seed)
    return torch.randn(rows, K, generator=g) @ torch.randn(K, K, generator=g) / K**0.5


def test_masked_least_squares_is_that_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "_DAMPING", 0.0)
    x, mask = _inputs(200, 16), random_mask(6, 16)
    y = torch.randn(200, 6, generator=generator(1))
    start = torch.zeros(6, 16)
    found = masked_least_squares(start, mask, x.T @ x, y.T @ x, steps=400)
    assert not found[~mask].any()
    for n in range(6):
        kept = mask[n]
        expected = torch.linalg.lstsq(x[:, kept].double(), y[:, n : n + 1].double()).solution[:, 0]
        # Conjugate gradients stop at 1e-5 of the first residual.
        torch.testing.assert_close(found[n, kept].double(), expected, rtol=2e-3, atol=2e-4)


def test_scales_are_those_of_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "_DAMPING", 0.0)
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(64, 5), "w4a16-g32")
    x = _inputs(300, 64)
    factor, bias = torch.rand(5, 2, generator=generator(2)) + 0.6, torch.randn(5)
    parts = layer.dequantize().unflatten(1, (2, 32))
    y = x @ (parts * factor[..., None]).flatten(1).T + bias
    ones = torch.cat([x, torch.ones(300, 1)], 1)
    found = reconstruct._rescaled(layer, Moments(ones, y))
    before, after = layer.canonical(), found.canonical()
    torch.testing.assert_close(
        after["weight_scale"], before["weight_scale"] * factor, rtol=1e-3, atol=0
    )
    torch.testing.assert_close(found.bias.data, bias, rtol=1e-3, atol=1e-3)
    for name in ("weight", "weight_zero_point"):
        assert_equal(after[name], before[name])


def test_the_error_is_that_of_the_outputs() -> None:
    x, y, weight = _inputs(50, 8), torch.randn(50, 3), torch.randn(3, 8)
    moments = Moments(x[:20], y[:20])
    moments.add(x[20:], y[20:])
    expected = float((y - x @ weight.T).square().sum() / y.square().sum())
    assert moments.error(weight) == pytest.approx(expected, rel=1e-4)


def model(family: str) -> nn.Module:
    torch.manual_seed(0)
    made = {**families.CAUSAL, **families.SEQ2SEQ, **families.ENCODERS}[family]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return made


STEPS = {
    "sparse": lambda m: llmq.prune(m, 0.5),
    "sparse-w8a8": lambda m: llmq.quantize(llmq.prune(m, 0.5), scheme="w8a8"),
    "2:4": lambda m: llmq.prune(m, pattern="2:4"),
    "w4a16-g32": lambda m: llmq.quantize(m, scheme="w4a16-g32"),
}
BATCHES = [torch.randint(3, 128, (4, 40), generator=generator(seed)) for seed in range(8)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert-mlm"])
def test_comes_closer_to_the_original_on_other_data(family: str, step: str) -> None:
    teacher = model(family)
    compressed = STEPS[step](copy.deepcopy(teacher))
    masks = {n: m.mask() for n, m in compressed.named_modules() if isinstance(m, SparseLinear)}
    keys = {n: (t.dtype, t.shape) for n, t in compressed.state_dict().items()}
    batches: list = BATCHES
    held = [torch.randint(3, 128, (4, 40), generator=generator(99))]
    if family == "t5":
        batches, held = ([{"input_ids": b, "labels": b} for b in part] for part in (BATCHES, held))
    before = llmq.compare(teacher, compressed, held).kl
    history = llmq.fine_tune(compressed, batches, teacher=teacher, method="reconstruct")
    after = llmq.compare(teacher, compressed, held).kl
    assert before is not None
    assert after is not None
    # Scales alone have little to give; weights have much.
    assert after < (0.98 if step == "w4a16-g32" else 0.8) * before
    layers = [m for m in compressed.modules() if isinstance(m, (QuantLinear, SparseLinear))]
    assert len(history.losses) == len(layers)
    assert all(0 <= error < 1 for error in history.losses)
    for name, mask in masks.items():
        assert_equal(compressed.get_submodule(name).mask(), mask)
        assert not compressed.get_submodule(name).dequantize()[~mask].any()
    assert {n: (t.dtype, t.shape) for n, t in compressed.state_dict().items()} == keys


def test_labels_are_not_used_and_nothing_is_drawn() -> None:
    teacher = model("llama")
    results = []
    for labels in (BATCHES[0], BATCHES[1]):
        compressed = STEPS["sparse-w8a8"](copy.deepcopy(teacher))
        data = [{"input_ids": BATCHES[0], "labels": labels}]
        llmq.fine_tune(compressed, data, teacher=teacher, method="reconstruct")
        results.append(compressed.state_dict())
    assert all(torch.equal(results[0][n], t) for n, t in results[1].items())


def test_leaves_the_model_as_it_was_when_it_cannot() -> None:
    teacher = model("llama")
    compressed = STEPS["sparse-w8a8"](copy.deepcopy(teacher))
    before = copy.deepcopy(compressed.state_dict())
    spoilt = copy.deepcopy(teacher)
    spoilt.model.layers[1].mlp.up_proj.weight.data.fill_(math.nan)
    run = {"method": "reconstruct"}
    for call, message in (
        (lambda: llmq.fine_tune(compressed, BATCHES[:1], **run), "needs the original"),
        (
            lambda: llmq.fine_tune(compressed, BATCHES[:1], teacher=model("gpt2"), **run),
            "own original",
        ),
        (lambda: llmq.fine_tune(compressed, BATCHES[:1], teacher=spoilt, **run), "NaN"),
        (lambda: llmq.fine_tune(teacher, BATCHES[:1], teacher=teacher, **run), "no compressed"),
    ):
        assert_raises(call, ValueError, message)
    assert all(torch.equal(before[n], t) for n, t in compressed.state_dict().items())
