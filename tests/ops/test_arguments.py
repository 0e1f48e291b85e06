"""Misuse of every op: the same `ValueError`, word for word, from the reference and native code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import llmq
from llmq.formats import bitmap, block, codebook, semi_structured, uniform
from llmq.ops import decoder, dense, sparse
from llmq.runtime import extension
from llmq.scheme import PRESETS
from tests.cpu.isas import each_isa
from tests.helpers import generator

N, K = 20, 24
X = torch.randn(2, K, generator=generator(0))
WEIGHT = torch.randn(N, K, generator=generator(1))
CHANNEL = uniform.encode(WEIGHT, bits=8, granularity="channel")
GROUP = uniform.encode(WEIGHT, bits=4, granularity="group", group_size=8, symmetric=False)
TABLE = codebook.encode(WEIGHT, bits=4, granularity="channel")
KEPT = torch.rand(N, K, generator=generator(2)) < 0.5
PAIRS = torch.arange(K).remainder(4).lt(2).expand(N, K)
BITMAP = bitmap.encode(CHANNEL.weight, KEPT)._asdict()
FLOATS = bitmap.encode(WEIGHT, KEPT)._asdict()
CODES = CHANNEL.weight
SCALE = CHANNEL.weight_scale

# op → (its arguments in Python, a good call)
GOOD: dict[str, tuple[type | None, dict[str, Any]]] = {
    "quantize_activation": (None, {"x": X}),
    "int8_linear": (dense.Int8Linear, {"x": X, "weight": CODES, "weight_scale": SCALE}),
    "weight_only_linear": (dense.WeightOnlyLinear, {"x": X, **GROUP._asdict(), "bits": 4}),
    "codebook_linear": (dense.CodebookLinear, {"x": X, **TABLE._asdict(), "bits": 4}),
    "bitmap_sparse_linear": (
        sparse.BitmapSparseLinear,
        {"x": X, **BITMAP, "weight_scale": SCALE},
    ),
    "semi_structured_linear": (
        sparse.SemiStructuredLinear,
        {"x": X, **semi_structured.encode(CODES, PAIRS)._asdict(), "weight_scale": SCALE},
    ),
    "block_sparse_linear": (
        sparse.BlockSparseLinear,
        {"x": X, **block.encode(CODES, (4, 8))._asdict(), "weight_scale": SCALE},
    ),
}
OF_X = [
    ({"x": torch.tensor(1.0)}, "x must have at least one dimension, got a scalar"),
    ({"x": X.view(*[1] * 300, *X.shape)}, "x must have at most 64 dimensions, got 302"),
    ({"x": X.double()}, "x must be float32, bfloat16 or float16, got float64"),
    ({"x": X.int()}, "x must be float32, bfloat16 or float16, got int32"),
]
OF_BIAS = [
    ({"bias": torch.zeros(4)}, "bias must be [20], got [4]"),
    ({"bias": torch.zeros(N, 1)}, "bias must be [20], got [20, 1]"),
    ({"bias": torch.zeros(N).int()}, "bias must be float32, bfloat16 or float16, got int32"),
]
ONE = torch.ones(1)


def _of_activations(group: str) -> list[tuple[dict[str, Any], str]]:
    return [
        ({group: 5}, "activation group size 5 does not divide K=24"),
        ({group: -1}, "activation group size -1 does not divide K=24"),
        (
            {"activation_scale": torch.ones(2), group: 0},
            "activation_scale must be float32 [1], got float32 [2]",
        ),
        (
            {"activation_scale": ONE.half(), group: 0},
            "activation_scale must be float32 [1], got float16 [1]",
        ),
        (
            {"activation_scale": ONE, group: 8},
            "activation_scale goes with an activation group size of 0, got 8",
        ),
    ]


def _of_codes(width: int, narrow: int) -> list[tuple[dict[str, Any], str]]:
    """Rows of `width` bytes, of which x of 23 inputs leaves some."""
    features = "24" if narrow == 23 else "23 to 24"
    layout = "weight must be int8 [N, K] or [N, K / 2], or panels [N / 16, blocks, 16, 4], got"
    byte = torch.zeros(N, width, dtype=torch.int8)
    return [
        ({"x": torch.zeros(2, narrow)}, f"expected {features} input features, got {narrow}"),
        ({"x": torch.zeros(25)}, f"expected {features} input features, got 25"),
        ({"weight": byte.float()}, f"{layout} float32 [20, {width}]"),
        ({"weight": byte[0]}, f"{layout} int8 [{width}]"),
        ({"weight": byte[None, None]}, f"{layout} int8 [1, 1, 20, {width}]"),
        ({"weight": byte[:19]}, "weight must have 20 rows for 20 output features, got 19"),
    ]


CHANNELS = "weight_scale must be float32 [N, 1], got"
GROUPS = "weight_scale must be float32 [N, groups] or panels [N / 16, groups, 16], got"
OF_GROUPS = [
    ({"weight_scale": torch.ones(N)}, f"{GROUPS} float32 [20]"),
    ({"weight_scale": torch.ones(N, 1).half()}, f"{GROUPS} float16 [20, 1]"),
    ({"weight_scale": torch.ones(2, 3, 8)}, f"{GROUPS} float32 [2, 3, 8]"),
    ({"bits": 3}, "bits must be 8 or 4, got 3"),
]
OF_CHANNELS = [
    ({"weight_scale": torch.ones(N)}, f"{CHANNELS} float32 [20]"),
    ({"weight_scale": torch.ones(N, 2)}, f"{CHANNELS} float32 [20, 2]"),
    ({"weight_scale": torch.ones(N, 1).bfloat16()}, f"{CHANNELS} bfloat16 [20, 1]"),
]
VALUES = "int8 values need a weight_scale and floating-point values take none,"
OF_SPARSE = [
    *(OF_X + OF_CHANNELS + OF_BIAS + _of_activations("activation_group_size")),
    (
        {"weight_scale": None},
        f"{VALUES} got int8 without a scale",
    ),
    (
        {"activation_scale": ONE},
        "activation_scale goes with an activation group size of 0, got None",
    ),
]
BITMASK = "weight_bitmask must be uint8 [N, K / 8], panels or tiles, got"
WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "quantize_activation": OF_X + _of_activations("group_size"),
    "int8_linear": [
        *(OF_X + OF_CHANNELS + OF_BIAS + _of_codes(24, 23)),
        *_of_activations("activation_group_size"),
    ],
    "weight_only_linear": [
        *(OF_X + OF_GROUPS + OF_BIAS + _of_codes(12, 22)),
        ({"x": X[:, :23]}, "weight_scale has 3 groups, which do not divide K=23"),
        (
            {"weight_zero_point": torch.zeros(N, 1, dtype=torch.int8)},
            "weight_zero_point must be int8 [20, 3] as weight_scale, got int8 [20, 1]",
        ),
        (
            {"weight_zero_point": torch.zeros(N, 3)},
            "weight_zero_point must be int8 [20, 3] as weight_scale, got float32 [20, 3]",
        ),
        ({"activation_group_size": 5}, "activation group size 5 does not divide K=24"),
    ],
    "codebook_linear": [
        *(OF_X + OF_GROUPS + OF_BIAS + _of_codes(12, 22)),
        (
            {"weight_codebook": torch.zeros(1, 15)},
            "weight_codebook must be float32 [1 or 20, 16], got float32 [1, 15]",
        ),
        (
            {"weight_codebook": torch.zeros(1, 16).half()},
            "weight_codebook must be float32 [1 or 20, 16], got float16 [1, 16]",
        ),
    ],
    "bitmap_sparse_linear": [
        *OF_SPARSE,
        ({"x": torch.zeros(2, 16)}, "expected 17 to 24 input features, got 16"),
        ({"x": torch.zeros(2, 25)}, "expected 17 to 24 input features, got 25"),
        ({"weight_bitmask": BITMAP["weight_bitmask"].int()}, f"{BITMASK} int32 [20, 3]"),
        ({"weight_bitmask": BITMAP["weight_bitmask"][0]}, f"{BITMASK} uint8 [3]"),
        (
            {"weight_scale": SCALE[:19]},
            "weight_bitmask must have 19 rows for 19 output features, got 20",
        ),
        (
            {"row_offsets": BITMAP["row_offsets"].int()},
            "row_offsets must be int64 [21], got int32 [21]",
        ),
        (
            {"row_offsets": BITMAP["row_offsets"][:20]},
            "row_offsets must be int64 [21], got int64 [20]",
        ),
        (
            {"weight": BITMAP["weight"][None]},
            f"weight must be the kept values, one after another, got [1, {int(KEPT.sum())}]",
        ),
        (
            {**FLOATS, "weight_scale": None, "activation_group_size": 0},
            "int8 activations need int8 values",
        ),
        (
            {**FLOATS, "weight_scale": None, "weight": FLOATS["weight"].double()},
            "weight must be float32, bfloat16 or float16, got float64",
        ),
        (
            {**FLOATS, "weight_scale": None, "x": torch.zeros(2, 25)},
            "expected 17 to 24 input features, got 25",
        ),
    ],
    "semi_structured_linear": [
        *OF_SPARSE,
        ({"x": torch.zeros(2, 20)}, "expected 24 input features, got 20"),
        ({"weight": CODES[0]}, "weight must be [N, K / 2], got [24]"),
        (
            {"weight_meta": torch.zeros(N, 2, dtype=torch.uint8)},
            "weight_meta must be uint8 [20, 3], got uint8 [20, 2]",
        ),
        ({"weight_scale": SCALE[:19]}, "weight_scale must be float32 [20, 1], got float32 [19, 1]"),
    ],
    "block_sparse_linear": [
        *OF_SPARSE,
        ({"x": torch.zeros(2, 23)}, "expected a multiple of 8 input features, got 23"),
        ({"weight": CODES}, "weight must be blocks [B, R, C], got [20, 24]"),
        (
            {"block_index": torch.zeros(3, dtype=torch.int32)},
            "block_index must be int32 [15], got int32 [3]",
        ),
        ({"weight_scale": SCALE[:19]}, "weight_scale must be float32 [20, 1], got float32 [19, 1]"),
    ],
}
CASES = [(op, change, message) for op, cases in WRONG.items() for change, message in cases]


def _id(value: object) -> str:
    if isinstance(value, dict):
        return "+".join(
            f"{k}:{list(v.shape)}" if isinstance(v, Tensor) else f"{k}:{v}"
            for k, v in value.items()
        )
    return value if isinstance(value, str) and " " not in value else ""


def _raises(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match="llmq") as caught:
        call()
    assert str(caught.value).splitlines()[0] == message


@pytest.mark.parametrize("op", GOOD)
def test_what_the_faults_are_made_from_is_right(op: str) -> None:
    getattr(torch.ops.llmq, op)(**GOOD[op][1])


@pytest.mark.parametrize(("op", "change", "message"), CASES, ids=_id)
def test_native_code_and_the_reference_refuse_alike(
    op: str, change: dict[str, Any], message: str
) -> None:
    arguments = GOOD[op][1] | change
    expected = f"llmq.{op}: {message}"
    python = GOOD[op][0]
    check = dense._quantize_activation if python is None else lambda **a: python(**a).check()
    _raises(lambda: check(**arguments), expected)
    for isa in each_isa() if extension.load().loaded else ("reference",):
        _raises(lambda: getattr(torch.ops.llmq, op)(**arguments), expected)
        assert isa


@pytest.mark.parametrize("bits", [8, 4])
def test_panels_are_checked_as_rows_are(bits: int) -> None:
    """Panels of 16 rows and 4 or 8 inputs: what fits one more or less input is not told."""
    rows = torch.zeros(N, K * bits // 8, dtype=torch.int8)
    panels = torch.ops.llmq.pack_panels(rows, bits)
    least = K - 32 // bits + 1
    for x, weight, message in (
        (torch.zeros(1, K + 1), panels, f"expected {least} to {K} input features, got {K + 1}"),
        (torch.zeros(1, least - 1), panels, f"expected {least} to {K} input features, got"),
        (X, panels[:1], "weight must have 2 panels for 20 output features, got 1"),
        (X, panels[..., :2], "weight must be int8 [N, K] or [N, K / 2], or panels"),
    ):
        for call in (
            lambda x=x, w=weight: torch.ops.llmq.weight_only_linear(x, w, SCALE, bits=bits),
            lambda x=x, w=weight: dense.WeightOnlyLinear(x, w, SCALE, bits=bits).check(),
        ):
            with pytest.raises(ValueError, match="weight_only_linear") as caught:
                call()
            assert message in str(caught.value)


@pytest.mark.parametrize("training", [True, False], ids=["autograd", "inference"])
@pytest.mark.parametrize("kind", [*PRESETS, "2:4", "unstructured", "block-8x8", "floats"])
def test_layers_refuse_inputs_of_another_width(kind: str, training: bool) -> None:
    """Whole blocks of panels are filled up with zeros: only the layer knows its inputs."""
    linear = torch.nn.Linear(128, 32)
    if kind in PRESETS:
        if kind == "w8a8-static":
            layer = llmq.QuantLinear.from_linear(linear, kind, input_scale=0.1)
        else:
            layer = llmq.QuantLinear.from_linear(linear, kind)
        name = layer.scheme.op
    else:
        scheme, pattern = (None, "unstructured") if kind == "floats" else ("w8a8", kind)
        with torch.no_grad():
            linear.weight.mul_(torch.arange(128).remainder(4) < 2)
        layer = llmq.SparseLinear.from_linear(linear, pattern, scheme=scheme)
        name = layer.op
    with torch.set_grad_enabled(training):
        assert layer(torch.zeros(1, 128)).shape == (1, 32)
        for width in (0, 64, 124, 125, 127, 129, 256):
            expected = f"llmq.{name}: expected 128 input features, got {width}"
            _raises(lambda width=width: layer(torch.zeros(3, 2, width)), expected)
        expected = f"llmq.{name}: expected 128 input features, got a scalar"
        _raises(lambda: layer(torch.tensor(1.0)), expected)


def _decoder(**changes: Any) -> list[Any]:
    """Arguments of a decoder layer of 4 heads of 8, 2 of them of keys, and 48 inputs of its MLP."""
    B, T, width, kv, inner, D = 1, 3, 32, 16, 48, 8
    shapes = [(width, width), (kv, width), (kv, width), (width, width)]
    shapes += [(inner, width), (inner, width), (width, inner)]
    given = {
        "x": torch.zeros(B, T, width),
        "norms": [torch.ones(width)] * 2,
        "cos": torch.ones(1, T, D),
        "sin": torch.zeros(1, T, D),
        "keys": torch.zeros(B, 2, 5, D),
        "values": torch.zeros(B, 2, 5, D),
        "mask": None,
        "weights": [torch.zeros(shape, dtype=torch.int8) for shape in shapes],
        "weight_scales": [torch.ones(shape[0], 1) for shape in shapes],
        "weight_zero_points": [],
        "biases": [],
        "bits": [8] * 7,
        "activation_groups": [0] * 7,
        "start": 0,
        "eps": 1e-5,
        "scaling": 1.0,
    }
    return list((given | changes).values())


DECODER: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(3, 32)}, "x must be [batch, tokens, K], got [3, 32]"),
    ({"x": torch.zeros(1, 3, 29)}, "expected 32 input features, got 29"),
    ({"start": -1}, "start must not be negative, got -1"),
    ({"norms": [torch.ones(32)] * 3}, "norms must be 2 or 4, got 3"),
    ({"weights": []}, "a layer has 7 linear layers, got 0 tensors of a kind"),
    (
        {"cos": torch.ones(1, 3, 10), "sin": torch.ones(1, 3, 10)},
        "the linear layers do not fit each other, x [..., 32] and heads of 10",
    ),
    ({"sin": torch.ones(1, 2, 8)}, "cos and sin must be [1 or 1, 3, 8], got [1, 2, 8]"),
    (
        {"keys": torch.zeros(1, 2, 2, 8)},
        "keys must be [1, 2, at least 3, 8], got [1, 2, 2, 8]",
    ),
    (
        {"values": torch.zeros(1, 2, 4, 6)},
        "values must be [1, 2, at least 3, 8], got [1, 2, 4, 6]",
    ),
    ({"mask": torch.ones(1, 4, 3, 4)}, "mask must be [1 or 1, 1 or 4, 3, 3], got [1, 4, 3, 4]"),
]


@pytest.mark.parametrize(("changes", "message"), DECODER, ids=_id)
def test_decoder_layers_are_refused_alike(changes: dict[str, Any], message: str) -> None:
    for call in (decoder.decoder_layer, torch.ops.llmq.decoder_layer):
        _raises(lambda call=call: call(*_decoder(**changes)), f"llmq.decoder_layer: {message}")


def test_the_decoder_layer_of_the_faults_is_right() -> None:
    assert torch.ops.llmq.decoder_layer(*_decoder()).shape == (1, 3, 32)
