"""The seed program's verbs on a model of each family, in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmq.nn import CompressedLayer, QuantEmbedding, QuantLinear, SparseLinear
from llmq.pruning.prune import prune
from llmq.quantization.quantize import quantize
from tests import families

NAMES = list(families.ALL)


def compressed(model: Any) -> list[CompressedLayer]:
    return [m for m in model.modules() if isinstance(m, CompressedLayer)]


def check_accounts(model: Any) -> None:
    """Every parameter is in a compressed layer of the report or named as untouched."""
    report = model.llmq_report
    layers = {layer.name for layer in report.layers}
    untouched = {weight.name: weight for weight in report.untouched}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in layers:
            assert untouched[name].numel == parameter.numel(), name
            assert untouched[name].reason


@pytest.mark.parametrize(("scheme", "least"), [("w8a8", 0.999), ("w4a16-g32", 0.96)])
@pytest.mark.parametrize("name", NAMES)
def test_quantize(name: str, scheme: str, least: float) -> None:
    # A 4-bit step of 2/15 of a group's range is an error of some 8 % a layer: 0.997 for one layer
    # alone, and these models put a dozen in a row; int8's steps are 17 times as fine.
    model = families.make(name)
    before = families.output(model, name)
    quantize(model, scheme=scheme)
    assert families.cosine(before, families.output(model, name)) > least
    assert compressed(model)
    check_accounts(model)
    for layer in model.llmq_report.layers:
        assert layer.scheme == scheme
        assert 0 < layer.weight_error < (0.02 if scheme == "w8a8" else 0.15)
        assert layer.bytes_after < layer.bytes_before


@pytest.mark.parametrize("order", ["quantize-prune", "prune-quantize"])
@pytest.mark.parametrize("name", NAMES)
def test_seed_program_in_any_order(name: str, order: str) -> None:
    model = families.make(name)
    for verb in order.split("-"):
        model = quantize(model, scheme="w8a8") if verb == "quantize" else prune(model, 0.5)
    layers = compressed(model)
    assert layers
    for layer in layers:
        assert isinstance(layer, SparseLinear)
        assert layer.scheme is not None
        N, K = layer.out_features, layer.in_features
        assert int(layer.mask().sum()) == N * K - round(N * K * 0.5)
    assert torch.isfinite(families.output(model, name)).all()
    check_accounts(model)
    assert all(layer.pattern == "unstructured" for layer in model.llmq_report.layers)


@pytest.mark.parametrize("name", [*families.CAUSAL, *families.SEQ2SEQ])
def test_generates(name: str) -> None:
    model = prune(quantize(families.make(name), scheme="w8a8"), 0.25)
    given = families.inputs(name)
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**given, **options, use_cache=True)
    plain = model.generate(**given, **options, use_cache=False)
    assert cached.shape == plain.shape
    assert cached.shape[1] >= 5


@pytest.mark.parametrize("name", NAMES)
def test_skip_nothing(name: str) -> None:
    model = families.make(name)
    before = families.output(model, name)
    quantize(model, scheme="w8a8", skip=())
    assert families.cosine(before, families.output(model, name)) > 0.999
    check_accounts(model)
    for weight in model.llmq_report.untouched:
        assert "skip=()" not in weight.reason


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert-mlm", "t5", "gemma2", "bart"])
def test_tied_embedding_stays_one_tensor(name: str) -> None:
    model = families.make(name)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight
    quantize(model, scheme="w8a8")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings() is head
    reasons = {weight.name: weight.reason for weight in model.llmq_report.untouched}
    assert any("output embedding" in reason for reason in reasons.values())
    quantize(model, scheme="w8a8", skip=())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert embedding.weight is head.weight
    assert embedding.weight_scale is head.weight_scale


def test_shared_layers_are_converted_once() -> None:
    model = families.make("albert")
    quantize(model, scheme="w8a8")
    names = [layer.name for layer in model.llmq_report.layers]
    assert len(names) == len(set(names)) == 6 + 1 + 1  # one layer, embedding projection, pooler


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "olmoe"])
def test_experts_compute_the_same_split(name: str) -> None:
    from llmq.models.experts import SplitExperts

    model = families.make(name)
    before = families.output(model, name)
    for module in list(model.modules()):
        if hasattr(module, "experts"):
            module.experts = SplitExperts.from_fused(module.experts)
    # Summation order: k experts of a token, in float32.
    assert torch.allclose(before, families.output(model, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "olmoe"])
def test_experts_of_unknown_layout_are_named(name: str) -> None:
    model = families.make(name)
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.register_parameter("extra", torch.nn.Parameter(torch.ones(4, 2, 2)))
    quantize(model, scheme="w8a8")
    reasons = {w.name: w.reason for w in model.llmq_report.untouched if "experts" in w.name}
    assert len(reasons) == 2 * 3
    assert set(reasons.values()) == {"3-D weight of an unknown layout"}


@pytest.mark.parametrize("skip", ["experts", "experts.gate_up_proj", "*.down_proj.2"])
def test_experts_are_skipped_by_name(skip: str) -> None:
    model = quantize(families.make("mixtral"), scheme="w8a8", skip=(skip, "lm_head"))
    named = [w for w in model.llmq_report.untouched if w.reason == f"skip={skip!r}"]
    converted = [layer for layer in model.llmq_report.layers if layer.kind == "expert"]
    whole = skip == "experts"
    assert len(named) == {"experts": 4, "experts.gate_up_proj": 8, "*.down_proj.2": 2}[skip]
    assert len(converted) == (0 if whole else 16 - len(named))
    check_accounts(model)
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(storages) == len(set(storages))  # a skipped expert is no view of a dropped tensor
    assert torch.isfinite(families.output(model, "mixtral")).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "mixtral"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = families.make(name).to(dtype)
    before = families.output(model, name)
    quantize(model, scheme="w8a8")
    after = families.output(model, name)
    assert after.dtype == dtype
    assert families.cosine(before, after) > 0.98
