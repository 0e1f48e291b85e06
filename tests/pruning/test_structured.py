"""Structured pruning: matrices really shrink, and what stays computes what it did."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llmq
from llmq.models.experts import SplitExperts
from llmq.nn import CompressedLayer, QuantLinear
from llmq.pruning.prune import prune
from llmq.pruning.structured import heads_and_channels, slicing
from llmq.quantization.quantize import quantize
from tests import families

FAMILIES = [
    *("gpt2", "opt", "llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "phi3"),
    *("mixtral", "qwen2-moe", "bert", "roberta", "distilbert", "albert", "t5", "t5-gated"),
    *("switch", "bart"),
]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def silence(model: Any) -> None:
    """Make a half of the heads and channels of `model` the smallest, and of no effect.

    Odd heads (key-value groups) and channels get rows of small weights in the layers before and
    columns of zeros in the layer after: a right pruning drops just these.
    """
    blocks, _ = heads_and_channels.find_blocks(model, set())
    for block in blocks:
        dead = torch.arange(block.units) % 2 == 1
        if block.fused is not None:
            silence_experts(block.fused)
            continue
        for part in block.slices:
            index = part.index(dead.nonzero()[:, 0])
            transposed = type(part.layer).__name__ == "Conv1D"
            weight = part.layer.weight.T if transposed else part.layer.weight
            if part.side == "columns":
                weight[:, index] = 0
            else:
                weight[index] *= 1e-3


def silence_experts(module: Any) -> None:
    channels = module.down_proj.shape[2]
    dead = torch.arange(channels) % 2 == 1
    module.down_proj[:, :, dead] = 0
    module.gate_up_proj[:, dead.repeat(2)] *= 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_what_stays_computes_what_it_did(name: str) -> None:
    model = families.make(name)
    silence(model)
    before, size = families.output(model, name), count(model)
    assert prune(model, 0.5, pattern="structured") is model
    after = families.output(model, name)
    # Dead heads and channels added zeros: what differs is the order of summation, in float32.
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert count(model) < 0.85 * size
    report = model.llmq_report
    assert "structured: " in report.choice
    assert "heads 4 -> 2" in report.choice
    for layer in report.layers:
        assert layer.bytes_after < layer.bytes_before
        assert layer.shape_before is not None


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_are_regular_and_counted(name: str) -> None:
    model = prune(families.make(name), 0.5, pattern="structured")
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
            kind = re.sub(r"\.\d+\.", ".*.", layer)
            shapes.setdefault(kind, set()).add(tuple(module.weight.shape))
    assert all(len(different) == 1 for different in shapes.values())
    for module_name, attributes in model.llmq_module_attributes.items():
        module = model.get_submodule(module_name)
        for attribute, value in attributes.items():
            assert getattr(module, attribute) == value
            assert type(value) is int


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in families.ENCODERS])
def test_generates_with_and_without_cache(name: str) -> None:
    model = prune(families.make(name), 0.5, pattern="structured")
    given = families.inputs(name)
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**given, **options, use_cache=True)
    plain = model.generate(**given, **options, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_what_shares_a_scale_goes_together(name: str) -> None:
    # 32 inputs a group: two heads of 16, or the two query heads of a key-value head.
    model = quantize(families.make(name), scheme="w4a16-g32")
    wide = copy.deepcopy(model)
    prune(model, 0.5, pattern="structured")
    assert "heads 4 -> 2" in model.llmq_report.choice
    assert torch.isfinite(families.output(model, name)).all()
    for layer, module in model.named_modules():
        if isinstance(module, QuantLinear):
            old = wide.get_submodule(layer).dequantize()
            assert torch.isin(module.dequantize(), old).all()


def test_heads_that_cannot_go_are_said_to_stay() -> None:
    # All four heads of 16 inputs share each scale of 64 inputs.
    model = quantize(families.make("bert"), scheme="w4a16-g64")
    prune(model, 0.5, pattern="structured")
    assert "heads 4 -> 4 in 2 attention layers" in model.llmq_report.choice


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(name, "w8a8") for name in ("llama", "gpt2", "bert", "t5", "mixtral")]
    + [("gpt2", "w8a16"), ("bert", "w4a16-quantile-g32"), ("llama", "w8a16-quantile")],
)
def test_of_a_quantized_model(name: str, scheme: str) -> None:
    model = quantize(families.make(name), scheme=scheme)
    wide = copy.deepcopy(model)
    prune(model, 0.5, pattern="structured")
    assert torch.isfinite(families.output(model, name)).all()
    assert count(model) < count(wide)
    for layer, module in model.named_modules():
        if isinstance(module, QuantLinear):
            old = wide.get_submodule(layer).dequantize()
            # Rows and columns are taken, none is changed.
            assert torch.isin(module.dequantize(), old).all()


def test_groups_go_together_in_a_4_bit_mlp() -> None:
    model = families.make("llama")
    attention = ("self_attn",)
    quantize(model, scheme="w4a16-g32")
    prune(model, 0.5, pattern="structured", skip=attention)
    mlp = model.model.layers[0].mlp
    assert (mlp.up_proj.out_features, mlp.down_proj.in_features) == (64, 64)
    assert mlp.down_proj.canonical()["weight_scale"].shape == (64, 2)
    assert torch.isfinite(families.output(model, "llama")).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "mixtral"])
@pytest.mark.parametrize("order", ["structured-sparse-int8", "int8-sparse-structured"])
def test_with_other_verbs_in_any_order(name: str, order: str) -> None:
    model = families.make(name)
    for verb in order.split("-"):
        if verb == "structured":
            prune(model, 0.5, pattern="structured")
        elif verb == "sparse":
            prune(model, 0.5)
        else:
            quantize(model, scheme="w8a8")
    assert torch.isfinite(families.output(model, name)).all()
    assert any(isinstance(m, CompressedLayer) for m in model.modules())


def test_t5_prunes_the_same_heads_as_its_position_bias() -> None:
    model = families.make("t5")
    kept = copy.deepcopy(model)
    with torch.no_grad():  # all layers of the encoder lose heads 0 and 2, those of the decoder 1, 3
        for stack, dead in ((model.encoder, (0, 2)), (model.decoder, (1, 3))):
            for block in stack.block:
                attention = block.layer[0].SelfAttention
                for head in dead:
                    rows = slice(16 * head, 16 * head + 16)
                    for linear in (attention.q, attention.k, attention.v):
                        linear.weight[rows] *= 1e-3
                    attention.o.weight[:, rows] *= 1e-3
    prune(model, 0.5, pattern="structured")
    for name, left in (("encoder", [1, 3]), ("decoder", [0, 2])):
        before = getattr(kept, name).block[0].layer[0].SelfAttention.relative_attention_bias
        after = getattr(model, name).block[0].layer[0].SelfAttention.relative_attention_bias
        assert torch.equal(after.weight, before.weight[:, left])


def test_configuration_tells_what_it_can() -> None:
    llama = prune(families.make("llama"), 0.5, pattern="structured").config
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim) == (2, 1, 16)
    assert llama.intermediate_size == 64
    bert = prune(families.make("bert"), 0.5, pattern="structured")
    # BERT's head size is hidden_size / heads: fewer heads would be larger ones, so modules tell.
    assert bert.config.num_attention_heads == 4
    assert bert.config.intermediate_size == 64
    tell = bert.llmq_module_attributes["encoder.layer.0.attention.self"]
    assert tell == {"num_attention_heads": 2, "all_head_size": 32}
    gpt2 = prune(families.make("gpt2"), 0.5, pattern="structured")
    assert gpt2.config.n_inner == 128
    assert gpt2.llmq_module_attributes["transformer.h.0.attn"] == {"num_heads": 2, "split_size": 32}
    t5 = prune(families.make("t5"), 0.5, pattern="structured").config
    assert (t5.num_heads, t5.d_ff, t5.d_kv) == (2, 64, 16)


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "phi3"])
def test_configuration_rebuilds_the_model(name: str) -> None:
    model = prune(families.make(name), 0.5, pattern="structured")
    again = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(families.output(model, name), families.output(again, name))


@pytest.mark.parametrize(("method", "tokens"), [("magnitude", 0), ("wanda", 24), ("wanda", 1)])
def test_split_experts_shrink_as_fused_ones(method: str, tokens: int) -> None:
    """With data too, which scores each expert that it reaches: one token, two of the four."""
    fused, split = families.make("mixtral"), families.make("mixtral")
    for module in list(split.modules()):
        if hasattr(module, "experts"):
            module.experts = SplitExperts.from_fused(module.experts)
    data = [{"input_ids": torch.arange(3, 3 + tokens)[None]}] if method == "wanda" else None
    for model in (fused, split):
        prune(model, 0.5, pattern="structured", method=method, data=data)
        unreached = "by magnitude, as no data reached them: model.layers.0.mlp.experts."
        assert (unreached in model.llmq_report.choice) == (data is not None and tokens == 1)
    assert torch.allclose(
        families.output(fused, "mixtral"), families.output(split, "mixtral"), rtol=1e-4, atol=1e-4
    )


def test_skip_keeps_an_attention_whole() -> None:
    model = prune(families.make("llama"), 0.5, pattern="structured", skip=("layers.0.self_attn",))
    assert model.model.layers[0].self_attn.q_proj.out_features == 64
    assert model.model.layers[1].self_attn.q_proj.out_features == 32
    assert model.config.num_attention_heads == 4
    reasons = {weight.name: weight.reason for weight in model.llmq_report.untouched}
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == "skip='layers.0.self_attn'"
    assert torch.isfinite(families.output(model, "llama")).all()


def test_heads_counted_in_the_configuration_go_together() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn counts its heads in the config"):
        prune(families.make("phi3"), pattern="structured", skip=("layers.0.self_attn",))


def test_attention_of_unknown_structure_is_named() -> None:
    model = prune(families.make("olmoe"), 0.5, pattern="structured")
    assert "heads" not in model.llmq_report.choice  # OLMoE norms all heads together
    reasons = {weight.name: weight.reason for weight in model.llmq_report.untouched}
    assert "known structure" in reasons["model.layers.0.self_attn.q_proj.weight"]


def test_block_sparse_layers_are_not_torn_apart() -> None:
    model = prune(families.make("llama"), pattern="block-8x8")
    with pytest.raises(ValueError, match=r"q_proj is pruned in pattern block-8x8"):
        prune(model, pattern="structured")
    assert model.config.num_attention_heads == 4


@pytest.mark.parametrize("compressed", [False, True], ids=["float", "sparse-int8"])
@pytest.mark.parametrize("name", [*FAMILIES, "olmoe"])
def test_saved_and_loaded(name: str, compressed: bool, tmp_path: Path) -> None:
    model = prune(families.make(name), 0.5, pattern="structured")
    if compressed:
        prune(quantize(model, scheme="w8a8", skip=()), 0.5)
    llmq.save(model, tmp_path / "model")
    again = llmq.load(tmp_path / "model")
    assert torch.equal(families.output(model, name), families.output(again, name))


@pytest.mark.parametrize("name", families.ALL)
def test_data_tells_better_what_matters(name: str) -> None:
    original = families.make(name)
    expected = families.output(original, name)
    errors = []
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = copy.deepcopy(original)
        data = None if method == "magnitude" else [families.inputs(name)]
        llmq.prune(model, 0.25, pattern="structured", method=method, data=data)
        errors.append(1 - families.cosine(families.output(model, name), expected))
    magnitude, wanda, refitted = errors
    if name not in ("mixtral", "olmoe"):  # whose fused experts are not refitted
        assert refitted < 0.8 * wanda
        assert wanda < 1.2 * magnitude
    else:
        assert refitted <= wanda <= magnitude


def test_data_alone_refits() -> None:
    data = [families.inputs("llama")]
    picked = prune(families.make("llama"), 0.5, pattern="structured", data=data)
    named = prune(families.make("llama"), 0.5, pattern="structured", method="sparsegpt", data=data)
    assert torch.equal(families.output(picked, "llama"), families.output(named, "llama"))
    assert picked.llmq_report.choice.endswith("refitted; sparsegpt (picked, as there is data)")


def test_refit_is_least_squares() -> None:
    """With one block, what stays of the layer after is what lstsq gives for the same channels."""
    torch.manual_seed(0)

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(torch.relu(self.fc1(x)))

    model = nn.Sequential(MLP()).eval()
    x = torch.randn(4000, 16)
    hidden, first = torch.relu(model[0].fc1(x)), model[0].fc1.weight.detach().clone()
    wanted = hidden @ model[0].fc2.weight.T
    llmq.prune(model, 0.5, pattern="structured", method="sparsegpt", data=[x])
    assert model[0].fc2.weight.shape == (8, 32)
    kept = [int((first == row).all(1).nonzero()) for row in model[0].fc1.weight]
    fitted = torch.linalg.lstsq(hidden[:, kept], wanted).solution.T
    error = (hidden[:, kept] @ model[0].fc2.weight.T - wanted).norm()
    # Damping of 1 % of the mean second moment keeps it a little away from the optimum.
    assert error < 1.02 * (hidden[:, kept] @ fitted.T - wanted).norm()
    layer = {entry.name: entry for entry in model.llmq_report.layers}["0.fc2"]
    assert layer.weight_error is not None and 0 < layer.weight_error < 2


def test_static_input_scales_stay_with_the_inputs_that_stay() -> None:
    dense = llmq.QuantLinear.from_linear(nn.Linear(16, 8), "w8a8-static", input_scale=0.1)
    rows, columns = torch.tensor([0, 3]), torch.arange(0, 16, 2)
    for layer in (dense, llmq.SparseLinear.from_linear(dense)):
        taken: Any = slicing.take("layer", layer, rows=rows, columns=columns)
        assert torch.equal(taken.input_scale, dense.input_scale)
        x = torch.randn(5, 8)
        wide = torch.zeros(5, 16)
        wide[:, columns] = x
        assert torch.equal(taken(x), layer(wide)[:, rows])
