"""prune: exact rates, masks that hold what is largest, in any order with quantize."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmq.nn import QuantLinear, SparseLinear
from llmq.pruning import magnitude
from llmq.pruning.prune import prune
from llmq.quantization.quantize import quantize
from llmq.scheme import Pattern, parse_pattern


def make(N: int = 64, K: int = 96) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K, bias=False))


@given(
    N=st.integers(1, 40), K=st.integers(1, 40), rate=st.floats(0, 0.999), seed=st.integers(0, 99)
)
@settings(max_examples=100, deadline=None)
def test_unstructured_rate_is_exact_and_even(N: int, K: int, rate: float, seed: int) -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    mask = magnitude.mask(weight, Pattern("unstructured"), rate)
    assert magnitude.pruned(mask) == round(N * K * rate)
    pruned = (~mask).sum(1)
    assert int(pruned.max() - pruned.min()) <= 1
    for row, keep in zip(weight.abs(), mask, strict=True):
        if keep.any() and not keep.all():
            assert row[keep].min() >= row[~keep].max()


def test_rows_lose_less_than_one_threshold_a_matrix() -> None:
    weight = torch.randn(64, 64) * torch.logspace(-1, 1, 64)[:, None]
    mask = magnitude.mask(weight, Pattern("unstructured"), 0.5)
    threshold = weight.abs() >= weight.abs().median()
    # Of each row, whose scale is its own, the same share of energy stays; per matrix some lose all.
    assert (weight * mask).square().sum(1).min() > 0
    assert (weight * threshold).square().sum(1).min() == 0


def test_two_of_four() -> None:
    weight = torch.tensor([[4.0, -3, 2, 1, 0, 0, 0, 0, -1, 1, -1, 5]])
    mask = magnitude.mask(weight, Pattern("2:4"), 0.5)
    assert mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1]]


def test_blocks() -> None:
    weight = torch.ones(4, 6)
    weight[:2, 2:4] = 0.1
    weight[2:, :2] = 0.2
    mask = magnitude.mask(weight, Pattern("block", (2, 2)), 1 / 3)
    expected = torch.ones(4, 6, dtype=torch.bool)
    expected[:2, 2:4] = False
    expected[2:, :2] = False
    assert torch.equal(mask, expected)


PATTERNS = ["unstructured", "2:4", "block", "block-8x16"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("order", ["prune", "prune-quantize", "quantize-prune"])
def test_patterns_in_any_order(pattern: str, order: str) -> None:
    model = make()
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    for verb in order.split("-"):
        if verb == "prune":
            assert prune(model, 0.5, pattern=pattern) is model
        else:
            quantize(model, scheme="w8a8")
    for i, weight in zip((0, 2), weights, strict=True):
        layer = model[i]
        assert isinstance(layer, SparseLinear)
        assert layer.pattern == parse_pattern(pattern).name
        mask, dense = layer.mask(), layer.dequantize()
        assert magnitude.pruned(mask) == weight.numel() // 2
        assert (dense[~mask] == 0).all()
        # An int8 step of a row is max/127; half of it is the rounding error.
        step = weight.abs().amax(1, keepdim=True) / 127
        bound = 0 if order == "prune" else 0.5001 * step.expand_as(weight)[mask]
        assert ((dense - weight)[mask].abs() <= bound).all()
    x = torch.randn(3, 96)
    expected = torch.relu(x @ model[0].dequantize().T + model[0].bias) @ model[2].dequantize().T
    assert torch.cosine_similarity(model(x).flatten(), expected.flatten(), dim=0) > 0.999
    report = model.llmq_report
    assert [layer.pattern for layer in report.layers] == [parse_pattern(pattern).name] * 2
    assert all(layer.bytes_after < layer.bytes_before for layer in report.layers)


def test_quantized_values_are_kept_exactly() -> None:
    model = quantize(make(), scheme="w8a8")
    before = [copy.deepcopy(model[i]) for i in (0, 2)]
    prune(model, 0.5)
    for layer, old in zip((model[0], model[2]), before, strict=True):
        assert isinstance(old, QuantLinear)
        mask = layer.mask()
        assert torch.equal(layer.canonical()["weight"], old.canonical()["weight"][mask])
        assert torch.equal(layer.weight_scale, old.weight_scale)


def test_bytes_of_half_sparse_int8() -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    prune(quantize(model, scheme="w8a8"), 0.5)
    report = model.llmq_report
    assert report.bytes_before == 512 * 512 * 4
    assert report.bytes_after <= 0.165 * report.bytes_before


@pytest.mark.parametrize("pattern", ["unstructured", "block-8x8"])
@pytest.mark.parametrize("quantized", [False, True])
def test_prune_again(pattern: str, quantized: bool) -> None:
    model = quantize(make(), scheme="w8a8") if quantized else make()
    prune(model, 0.3, pattern=pattern)
    first = model[0].mask()
    prune(model, 0.3, pattern=pattern)
    assert torch.equal(model[0].mask(), first)
    prune(model, 0.6, pattern=pattern)
    grown = model[0].mask()
    assert not (grown & ~first).any()
    expected = magnitude.goal(torch.empty(64, 96), parse_pattern(pattern), 0.6)
    assert magnitude.pruned(grown) == expected
    with pytest.raises(ValueError, match=r"0 is already pruned to 0\.\d+; pruning_rate=0\.3 would"):
        prune(model, 0.3, pattern=pattern)
    with pytest.raises(ValueError, match=r"0 is already pruned in pattern .* cannot become 2:4"):
        prune(model, 0.5, pattern="2:4")
    assert torch.equal(model[0].mask(), grown)


def test_rate_zero_changes_nothing() -> None:
    model = make()
    layer = model[0]
    prune(model, 0)
    assert model[0] is layer
    assert {w.reason for w in model.llmq_report.untouched if "weight" in w.name} == {
        "pruning_rate=0"
    }


def test_embeddings_and_what_is_tied_to_them_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 32)
            self.layer = nn.Linear(32, 32)
            self.lm_head = nn.Linear(32, 20, bias=False)
            self.lm_head.weight = self.embed.weight

    for quantized in (False, True):
        model = Tied()
        if quantized:
            quantize(model, scheme="w8a8", skip=())
        prune(model, 0.5, skip=())
        assert isinstance(model.layer, SparseLinear)
        assert not isinstance(model.lm_head, SparseLinear)
        assert model.lm_head.weight is model.embed.weight
    untouched = {w.name: w.reason for w in prune(Tied(), skip=()).llmq_report.untouched}
    assert "tied to an embedding" in untouched["embed.weight"]


@pytest.mark.parametrize("rate", [0.25, 0.3, 0.5, 0.9])
def test_rows_that_lost_more_get_nothing_back(rate: float) -> None:
    """SparseGPT prunes some rows more than others; a higher rate by magnitude stays within it."""
    weight = torch.randn(5, 24)
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept[0, :20], kept[2, ::3] = False, False  # 28 of 120
    found = magnitude.mask(weight * kept, parse_pattern("unstructured"), rate, kept)
    assert not (found & ~kept).any()
    assert magnitude.pruned(found) == round(120 * rate)


BAD = [
    ({"pruning_rate": 1.0}, ValueError, r"pruning_rate must be in \[0, 1\), got 1\.0"),
    ({"pruning_rate": -0.1}, ValueError, r"pruning_rate must be in \[0, 1\), got -0\.1"),
    ({"pruning_rate": math.nan}, ValueError, r"pruning_rate must be in \[0, 1\), got nan"),
    ({"pruning_rate": True}, TypeError, r"must be a number in \[0, 1\), got True"),
    ({"pruning_rate": "half"}, TypeError, r"must be a number in \[0, 1\), got 'half'"),
    ({"pattern": "3:7"}, ValueError, r"unknown pattern '3:7'; use 'unstructured'"),
    ({"method": "wish"}, ValueError, r"unknown method 'wish'; choose 'magnitude' or 'wanda'"),
    ({"method": "magnitude", "data": [1]}, ValueError, r"'magnitude' uses no data"),
    ({"pattern": "2:4", "pruning_rate": 0.6}, ValueError, r"its rate is 0\.5, got 0\.6"),
    (
        {"pattern": "block-5x8"},
        ValueError,
        r"0: pattern block-5x8 does not divide its weight \[64, 96\]; name the layer in skip",
    ),
    ({"pattern": "structured"}, ValueError, r"Sequential has no attention or MLP whose layers"),
]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block-8x8"])
def test_a_method_is_picked_where_none_is_named(pattern: str) -> None:
    x = torch.randn(32, 96)
    picked = prune(make(), pattern=pattern, data=[x])
    named = prune(make(), pattern=pattern, data=[x], method="sparsegpt")
    assert picked.llmq_report.choice == (
        "sparsegpt (picked, as there is data), calibrated on 1 batches"
    )
    assert torch.equal(picked(x), named(x))
    by_magnitude = prune(make(), pattern=pattern, method="magnitude")
    assert torch.equal(prune(make(), pattern=pattern)(x), by_magnitude(x))


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_errors_leave_the_model_as_it_was(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    model = make()
    state: dict[str, Tensor] = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        prune(model, **options)  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear
    assert not hasattr(model, "llmq_report")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_bad_layer_is_found_before_any_changes() -> None:
    model = make()
    model.append(nn.Linear(96, 7))
    with pytest.raises(ValueError, match=r"^3: pattern block-8x8 does not divide .*\[7, 96\]"):
        prune(model, pattern="block-8x8")
    assert type(model[0]) is nn.Linear
    prune(model, pattern="block-8x8", skip=("3",))
    assert isinstance(model[0], SparseLinear)
    assert {w.name: w.reason for w in model.llmq_report.untouched}["3.weight"] == "skip='3'"


def test_weights_that_are_not_finite() -> None:
    model = make()
    with torch.no_grad():
        model[2].weight[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"2: weight has NaN or infinite values.*\[1, 2\]"):
        prune(model)
    assert type(model[0]) is nn.Linear


def test_scheme_without_sparse_form() -> None:
    model = quantize(make(), scheme="w4a16-g32")
    with pytest.raises(
        ValueError, match=r"0 is w4a16-g32, which has no sparse form; prune a model"
    ):
        prune(model)
    assert isinstance(model[0], QuantLinear)
