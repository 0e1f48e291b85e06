"""quantize: what it picks, what it leaves alone and says so; nothing is left half done."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.models.targets import matches
from llmq.nn import QuantEmbedding, QuantLinear, SparseLinear
from llmq.pruning.prune import prune
from llmq.quantization.quantize import quantize
from llmq.runtime import dispatch
from llmq.scheme import PRESETS, Scheme


class Tied(nn.Module):
    """Embedding → two layers → output layer that shares the embedding's tensor."""

    def __init__(self, K: int = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, K)
        self.position = nn.Embedding(16, K)
        self.narrow = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([nn.Linear(K, K), nn.Linear(K, K, bias=False)])
        self.norm = nn.LayerNorm(K)
        self.conv = nn.Conv1d(K, K, 3, padding=1)
        self.lm_head = nn.Linear(K, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[-1]))
        for block in self.blocks:
            x = x + block(x)
        x = x + self.conv(x.transpose(-1, -2)).transpose(-1, -2)
        return self.lm_head(self.norm(x))


IDS = torch.arange(10)[None]


def snapshot(model: nn.Module) -> tuple[str, dict[str, Tensor]]:
    return str(model), {name: t.clone() for name, t in model.state_dict().items()}


def check_unchanged(model: nn.Module, before: tuple[str, dict[str, Tensor]]) -> None:
    structure, state = snapshot(model)
    assert structure == before[0]
    assert state.keys() == before[1].keys()
    for name, tensor in state.items():
        same = tensor.view(torch.uint8) if tensor.dtype != torch.float32 else tensor
        other = before[1][name]
        other = other.view(torch.uint8) if other.dtype != torch.float32 else other
        assert torch.equal(torch.nan_to_num(same), torch.nan_to_num(other)), name
    assert not hasattr(model, "llmq_report")


@pytest.mark.parametrize("scheme", PRESETS)
def test_every_preset(scheme: str) -> None:
    model = Tied().eval()
    before = model(IDS)
    data = [IDS] if scheme.endswith("-static") else None
    assert quantize(model, scheme=scheme, data=data) is model
    after = model(IDS)
    assert torch.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.98
    assert {layer.scheme for layer in model.llmq_report.layers} == {scheme}


def test_default_leaves_the_output_embedding_and_says_so() -> None:
    model = quantize(Tied())
    assert isinstance(model.blocks[0], QuantLinear)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.embed.weight
    untouched = {weight.name: weight for weight in model.llmq_report.untouched}
    assert "output embedding" in untouched["embed.weight"].reason
    assert "skip=()" in untouched["position.weight"].reason
    assert untouched["conv.weight"].numel == 128 * 128 * 3
    assert "Conv1d is no linear layer" in untouched["conv.weight"].reason
    text = str(model.llmq_report)
    for part in ("blocks.0", "embed.weight: 6,400", "conv.weight: 49,152", "norms and biases"):
        assert part in text
    parsed = json.loads(model.llmq_report.to_json())
    assert parsed["layers"][0]["name"] == "blocks.0"
    assert parsed["bytes_after"] < 0.27 * parsed["bytes_before"]


def test_skip_nothing_ties_one_int8_table() -> None:
    model = Tied().eval()
    before = model(IDS)
    quantize(model, scheme="w4a16-g32", skip=())
    assert isinstance(model.embed, QuantEmbedding)
    assert isinstance(model.position, QuantEmbedding)
    assert type(model.narrow) is nn.Embedding
    assert isinstance(model.lm_head, QuantLinear)
    assert model.lm_head.weight is model.embed.weight
    assert model.embed.scheme.bits == 8
    assert torch.cosine_similarity(before.flatten(), model(IDS).flatten(), dim=0) > 0.98
    by_name = {layer.name: layer for layer in model.llmq_report.layers}
    assert by_name["lm_head"].bytes_after == 0
    assert "shares its tensors with embed" in by_name["lm_head"].reason


def test_linear_layers_that_share_a_weight_share_the_codes() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 16), "b": nn.Linear(32, 16)})
    model["b"].weight = model["a"].weight
    x = torch.randn(3, 32)
    expected = [model[name](x) for name in "ab"]
    quantize(model, scheme="w8a16")
    assert model["a"].weight is model["b"].weight
    for name, y in zip("ab", expected, strict=True):
        assert torch.allclose(model[name](x), y, atol=0.02)
    prune(model, 0.5)
    assert model["a"].weight is model["b"].weight


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.lm_head_norm", False),
        ("layers.1", "model.layers.1.mlp.up", True),
        ("layers.1", "model.layers.11.mlp.up", False),
        ("*.mlp.*", "model.layers.1.mlp.up", True),
        ("mlp.*", "model.layers.1.mlp.up", False),
        ("model.layers.[01].*", "model.layers.1.mlp.up", True),
    ],
)
def test_skip_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(name, pattern) is expected


def test_skip_is_named_in_the_report() -> None:
    model = quantize(Tied(), skip=("blocks.1", "lm_head"))
    assert isinstance(model.blocks[0], QuantLinear)
    assert type(model.blocks[1]) is nn.Linear
    reasons = {weight.name: weight.reason for weight in model.llmq_report.untouched}
    assert reasons["blocks.1.weight"] == "skip='blocks.1'"
    assert "lm_head" in reasons["embed.weight"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("haed", "did you mean 'head'"),
        ("blocks.7", "matches no layer of the model; did you mean 'blocks"),
        ("*.mlp", "or a shell pattern for the whole name"),
        ("", "'' matches no layer"),
    ],
)
def test_skip_that_matches_nothing(pattern: str, message: str) -> None:
    model = Tied()
    model.head = nn.Linear(64, 8)
    data = [torch.zeros(1, 4, dtype=torch.int64)]
    for verb, given in ((quantize, {}), (llmq.prune, {}), (llmq.plan, {"data": data})):
        with pytest.raises(ValueError, match=re.escape(message)):
            verb(model, **given, skip=("lm_head", pattern))
    assert type(model.head) is nn.Linear and not hasattr(model, "llmq_report")


@pytest.mark.parametrize(("isa", "scheme"), [("avx2", "w8a8"), (None, "w8a16")])
def test_bits_8_picks_for_the_device(
    monkeypatch: pytest.MonkeyPatch, isa: str | None, scheme: str
) -> None:
    monkeypatch.setattr(dispatch, "cpu_isa", lambda: isa)
    model = quantize(Tied())
    assert {layer.scheme for layer in model.llmq_report.layers} == {scheme}
    assert scheme in model.llmq_report.choice
    assert scheme in str(model.llmq_report)


def test_bits_4_fits_groups_to_the_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(24, 8), nn.Linear(7, 8))
    quantize(model, bits=4)
    assert [layer.scheme.group_size for layer in model] == [32, 8, None]
    quantize(model, bits=4)  # again: nothing to do
    assert [layer.scheme.group_size for layer in model] == [32, 8, None]


def test_quantize_again() -> None:
    model = quantize(Tied(), scheme="w8a8")
    layer, report = model.blocks[0], str(model.llmq_report)
    assert quantize(model, scheme="w8a8").blocks[0] is layer
    assert str(model.llmq_report) == report
    with pytest.raises(ValueError, match=r"blocks\.0 is already w8a8 and cannot become w4a16-g32"):
        quantize(model, scheme="w4a16-g32")


def test_sparse_layers_keep_their_mask() -> None:
    model = prune(Tied(), 0.5)
    masks = [block.mask() for block in model.blocks]
    quantize(model, scheme="w8a8")
    for block, mask in zip(model.blocks, masks, strict=True):
        assert isinstance(block, SparseLinear)
        assert torch.equal(block.mask(), mask)
        assert block.scheme == PRESETS["w8a8"]
    quantize(model, scheme="w8a8")


def test_transformer_encoder_layer_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():  # where torch would take its fused path
        before = model(x)
        quantize(model, scheme="w8a8")
        after = model(x)
    assert torch.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.999
    assert isinstance(model.layers[0].linear1, QuantLinear)
    reasons = {weight.name: weight.reason for weight in model.llmq_report.untouched}
    assert "MultiheadAttention" in reasons["layers.0.self_attn.out_proj.weight"]
    assert "MultiheadAttention" in reasons["layers.0.self_attn.in_proj_weight"]
    assert model.llmq_module_attributes["layers.0"] == {"activation_relu_or_gelu": 0}


def test_linear_with_a_forward_of_its_own_is_named() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = quantize(nn.Sequential(Scaled(8, 8), nn.Linear(8, 8)))
    assert type(model[0]) is Scaled
    assert "forward of its own" in model.llmq_report.untouched[0].reason


def test_report_survives_copies() -> None:
    model = copy.deepcopy(quantize(Tied()))
    assert model.llmq_report.layers[0].name == "blocks.0"


def _broken(value: float) -> Tied:
    model = Tied()
    with torch.no_grad():
        model.blocks[1].weight[3, 5] = value
    return model


BAD = [
    pytest.param(_broken, (float("nan"),), {}, r"blocks\.1: weight has NaN.*\[3, 5\]", id="nan"),
    pytest.param(_broken, (float("inf"),), {}, r"blocks\.1: weight has NaN", id="inf"),
    pytest.param(
        lambda: Tied(144),
        (),
        {"scheme": "w4a16-g64"},
        r"blocks\.0: group_size=64 does not divide its 144 inputs.*use one of \[16, 8, 4, 2\]",
        id="group",
    ),
    pytest.param(lambda: Tied().double(), (), {}, r"blocks\.0: weight is torch\.float64", id="f64"),
    pytest.param(lambda: Tied().to("meta"), (), {}, r"meta device", id="meta"),
    pytest.param(Tied, (), {"bits": 3}, r"bits must be 8 or 4, got 3", id="bits"),
    pytest.param(Tied, (), {"bits": True}, r"bits must be 8 or 4, got True", id="bool"),
    pytest.param(Tied, (), {"scheme": "w2a2"}, r"unknown scheme 'w2a2'; presets are", id="scheme"),
    pytest.param(
        Tied, (), {"bits": 4, "scheme": "w8a8"}, r"bits=4 contradicts scheme w8a8", id="both"
    ),
    pytest.param(
        Tied, (), {"algorithm": "magic"}, r"unknown algorithm 'magic'; choose rtn", id="algorithm"
    ),
    pytest.param(Tied, (), {"data": [1]}, r"'rtn' uses no data", id="data"),
]


@pytest.mark.parametrize(("make", "args", "options", "message"), BAD)
def test_errors_leave_the_model_as_it_was(make, args, options, message) -> None:  # type: ignore[no-untyped-def]
    model = make(*args)
    if model.embed.weight.is_meta:
        with pytest.raises(ValueError, match=message):
            quantize(model, **options)
        return
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        quantize(model, **options)
    check_unchanged(model, before)


def test_sparse_cannot_become_4_bits() -> None:
    model = prune(Tied(), 0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.0 is sparse \(unstructured\) and cannot become"):
        quantize(model, bits=4)
    assert snapshot(model)[0] == before[0]


@pytest.mark.parametrize("skip", ["lm_head", (1,), 3])
def test_skip_must_be_a_tuple_of_names(skip: object) -> None:
    with pytest.raises(TypeError, match="skip must be a tuple of name patterns"):
        quantize(Tied(), skip=skip)  # type: ignore[arg-type]


def test_model_must_be_a_module_with_layers() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        quantize("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"itself one Linear.*QuantLinear\.from_linear"):
        quantize(nn.Linear(4, 4))


def test_custom_scheme_and_shapes() -> None:
    model = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 1), nn.Linear(1, 5))
    x = torch.randn(2, 3, 33)
    before = model(x)
    quantize(model, scheme=Scheme(bits=8, granularity="tensor"))
    assert torch.allclose(before, model(x), atol=0.05)


def test_whole_bert_checkpoint_is_a_quarter() -> None:
    tf = pytest.importorskip("transformers")
    config = tf.BertConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=6,
        vocab_size=2000,
    )
    model = tf.BertModel(config)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    quantize(model, scheme="w8a8", skip=())
    after = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert after <= 0.26 * size
