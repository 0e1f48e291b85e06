"""QuantLinear, SparseLinear, QuantEmbedding: they behave as torch layers do, bit for bit."""

from __future__ import annotations

import copy
import doctest
import io
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.nn import CompressedLayer, QuantEmbedding, QuantLinear, SparseLinear, empty_layer
from llmq.scheme import PRESETS, Scheme

N, K = 40, 128
SPARSE = [
    (pattern, scheme)
    for pattern in ("unstructured", "2:4", "block-8x8")
    for scheme in (None, "w8a8", "w8a8-g64", "w8a8-static", "w8a16")
]
INPUT_SCALE = 0.04  # of normal inputs: up to 5


def _linear(seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, N, bias=bias)


def _mask(pattern: str) -> Tensor:
    if pattern == "2:4":
        return torch.arange(K).remainder(4).lt(2).expand(N, K)
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(1)) < 0.5
    if pattern == "block-8x8":
        return mask[::8, ::8].repeat_interleave(8, 0).repeat_interleave(8, 1)
    return mask


def _input_scale(scheme: str | None) -> float | None:
    return INPUT_SCALE if scheme is not None and scheme.endswith("-static") else None


def _layers() -> dict[str, CompressedLayer]:
    layers: dict[str, CompressedLayer] = {
        name: QuantLinear.from_linear(_linear(), name, input_scale=_input_scale(name))
        for name in PRESETS
    }
    layers["w8a8-tensor"] = QuantLinear.from_linear(
        _linear(bias=False), Scheme(granularity="tensor", activations="dynamic")
    )
    layers["w4a16-g2"] = QuantLinear.from_linear(
        _linear(), Scheme(bits=4, granularity="group", group_size=2)
    )
    for pattern, scheme in SPARSE:
        layers[f"{pattern}-{scheme}"] = SparseLinear.from_linear(
            _linear(),
            pattern,
            scheme=scheme,
            mask=_mask(pattern),
            input_scale=_input_scale(scheme),
        )
    return layers


LAYERS = _layers()


def _same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("name", LAYERS)
def test_is_close_to_what_it_replaces(name: str) -> None:
    layer = LAYERS[name]
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(4))
    linear = _linear(bias=layer.bias is not None)
    weight = linear.weight.detach()
    if isinstance(layer, SparseLinear):
        weight = torch.where(layer.mask(), weight, 0.0)
    y = nn.functional.linear(x, weight, linear.bias)
    error = (layer(x) - y).norm() / y.norm()
    assert error < (0.15 if "w4" in name else 0.02), float(error)
    weight_error = (layer.dequantize() - weight).norm() / weight.norm()
    assert weight_error < (0.12 if "w4" in name else 0.01), float(weight_error)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_are_bit_identical(name: str, tmp_path) -> None:
    layer = LAYERS[name]
    x = torch.randn(3, K)
    pickled = pickle.loads(pickle.dumps(layer))
    torch.save(layer, tmp_path / "layer.pt")
    saved = torch.load(tmp_path / "layer.pt", weights_only=False)
    for twin in (copy.deepcopy(layer), pickled, saved):
        _same_state(layer, twin)
        assert torch.equal(layer(x), twin(x))
        assert all(not p.requires_grad for p in twin.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_is_canonical_and_loads(name: str) -> None:
    layer = LAYERS[name]
    state = layer.state_dict()
    assert state["weight"].dim() <= 3 and "weight" in state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        if parameter.is_floating_point():
            parameter.data.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    _same_state(layer, other)


@pytest.mark.parametrize("name", LAYERS)
def test_is_rebuilt_from_its_description(name: str) -> None:
    layer = LAYERS[name]
    empty = empty_layer(layer.config())
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(layer.state_dict())
    _same_state(layer, empty)
    x = torch.randn(3, K)
    assert torch.equal(layer(x), empty(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_cast_keeps_codes_and_scales(name: str, dtype: torch.dtype) -> None:
    layer = copy.deepcopy(LAYERS[name]).to(dtype)
    before = LAYERS[name].state_dict()
    for key, tensor in layer.state_dict().items():
        if key == "bias" or (key == "weight" and tensor.is_floating_point()):
            assert torch.equal(tensor, before[key].to(dtype)), key
        else:
            assert torch.equal(tensor, before[key]), key
    x = torch.randn(3, K)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - LAYERS[name](x)).abs().max() < 0.15


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_and_trains_through(name: str) -> None:
    torch.compiler.reset()
    layer = LAYERS[name]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, K, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad[0, 0], layer.dequantize().sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_follows_autocast(name: str) -> None:
    x = torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = LAYERS[name](x)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("name", LAYERS)
def test_weight_is_int8_where_values_are_codes(name: str) -> None:
    layer = LAYERS[name]
    floats = isinstance(layer, SparseLinear) and layer.scheme is None
    assert layer.weight.dtype == (torch.float32 if floats else torch.int8)
    assert layer.weight.device.type == "cpu"
    assert layer.kernel(M=1).name and layer.kernel(M=1).reason


@pytest.mark.parametrize(("pattern", "scheme"), SPARSE, ids=str)
def test_explicit_zeros_stay_in_the_mask(pattern: str, scheme: str | None) -> None:
    linear = _linear()
    linear.weight.data[:, 0] = 0.0
    mask = _mask(pattern)
    layer = SparseLinear.from_linear(
        linear, pattern, scheme=scheme, mask=mask, input_scale=_input_scale(scheme)
    )
    assert torch.equal(layer.mask(), mask)
    assert torch.equal(copy.deepcopy(layer).mask(), mask)
    assert (layer.dequantize()[~mask] == 0).all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block-8x8"])
def test_pruning_a_quantized_layer_keeps_its_codes(pattern: str) -> None:
    dense = QuantLinear.from_linear(_linear(), "w8a8-static", input_scale=INPUT_SCALE)
    mask = _mask(pattern)
    sparse = SparseLinear.from_linear(dense, pattern, mask=mask)
    assert sparse.input_scale is not None
    assert torch.equal(sparse.input_scale, dense.input_scale)
    assert sparse.scheme == dense.scheme
    assert torch.equal(sparse.dequantize(), torch.where(mask, dense.dequantize(), 0.0))
    again = SparseLinear.from_linear(sparse, pattern)
    _same_state(sparse, again)


def test_loads_another_mask() -> None:
    half = SparseLinear.from_linear(_linear(), scheme="w8a8", mask=_mask("unstructured"))
    full = SparseLinear.from_linear(_linear(), scheme="w8a8")
    half.load_state_dict(full.state_dict())
    _same_state(half, full)


def test_sparse_int8_bytes() -> None:
    linear = nn.Linear(576, 1536, bias=False)
    mask = torch.rand(1536, 576) < 0.5
    layer = SparseLinear.from_linear(linear, scheme="w8a8", mask=mask)
    assert layer.bytes() <= 0.165 * linear.weight.numel() * 4
    dense = QuantLinear.from_linear(linear, "w8a8")
    assert dense.bytes() <= 0.26 * linear.weight.numel() * 4


@pytest.mark.parametrize(
    ("scheme", "pattern"),
    list(itertools.product(["w4a16-g32", "w8a16-quantile"], ["unstructured", "2:4"])),
)
def test_sparse_values_refuse_other_schemes(scheme: str, pattern: str) -> None:
    with pytest.raises(ValueError, match="symmetric 8-bit"):
        SparseLinear.from_linear(_linear(), pattern, scheme=scheme, mask=_mask(pattern))


def test_refuses_what_is_no_linear_layer() -> None:
    with pytest.raises(TypeError, match="Conv2d"):
        QuantLinear.from_linear(nn.Conv2d(1, 1, 1), "w8a8")
    with pytest.raises(ValueError, match="structured"):
        SparseLinear.from_linear(_linear(), "structured")
    with pytest.raises(ValueError, match="does not divide"):
        QuantLinear.from_linear(nn.Linear(33, 8), "w4a16-g32")


@pytest.mark.parametrize("pattern", [None, "unstructured"])
def test_a_static_layer_codes_its_inputs_on_its_scale(pattern: str | None) -> None:
    linear = _linear()
    if pattern is None:
        layer = QuantLinear.from_linear(linear, "w8a8-static", input_scale=0.01)
    else:
        layer = SparseLinear.from_linear(linear, pattern, scheme="w8a8-static", input_scale=0.01)
    x = torch.randn(5, K)
    coded = (x / 0.01).round().clamp(-127, 127) * 0.01  # beyond 1.27 they saturate
    y = nn.functional.linear(coded, layer.dequantize(), linear.bias)
    # A step where x / 0.01 is all but a tie and rounds the other way; sums of K products.
    assert (layer(x) - y).abs().max() < 2 * 0.01 * layer.dequantize().abs().max()
    assert layer.to(torch.bfloat16).input_scale.dtype == torch.float32


def test_input_scales_that_make_no_sense_are_refused() -> None:
    for given in (0.0, -1.0, float("nan"), float("inf"), 1e-31, torch.ones(2)):
        with pytest.raises(ValueError, match="one finite number above"):
            QuantLinear.from_linear(_linear(), "w8a8-static", input_scale=given)
    with pytest.raises(ValueError, match=r"w8a8-static needs input_scale.*data=\.\.\.\) measures"):
        QuantLinear.from_linear(_linear(), "w8a8-static")
    with pytest.raises(ValueError, match="not with w8a8"):
        QuantLinear.from_linear(_linear(), "w8a8", input_scale=1.0)
    with pytest.raises(ValueError, match="not with a layer without a scheme"):
        SparseLinear.from_linear(_linear(), input_scale=1.0)


class Pair(nn.Module):
    """An embedding and its tied output layer."""

    def __init__(self, table: QuantEmbedding) -> None:
        super().__init__()
        self.table = table
        self.head = table.tied_linear()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


class TestQuantEmbedding:
    def make(self) -> tuple[nn.Embedding, QuantEmbedding]:
        torch.manual_seed(0)
        embedding = nn.Embedding(50, K, padding_idx=3)
        return embedding, QuantEmbedding.from_embedding(embedding, "w8a8")

    def test_rows_are_close(self) -> None:
        embedding, layer = self.make()
        ids = torch.randint(50, (2, 7))
        error = (layer(ids) - embedding(ids)).abs().max()
        assert error <= layer.weight_scale.max() / 2 * 1.001
        assert torch.equal(layer(ids), layer.dequantize()[ids])

    def test_tied_pair_is_one_tensor_through_everything(self) -> None:
        pair, ids = Pair(self.make()[1]), torch.randint(50, (2, 7))
        expected = pair(ids)
        for twin in (
            pair,
            copy.deepcopy(pair),
            pickle.loads(pickle.dumps(pair)),
            copy.deepcopy(pair).to(torch.float32),
        ):
            assert twin.table.weight is twin.head.weight
            assert twin.table.weight_scale is twin.head.weight_scale
            assert torch.equal(twin(ids), expected)
            _same_state(pair, twin)
        assert len({id(p) for p in pair.parameters()}) == 2
        assert torch.equal(pair.table(ids), pair.table.dequantize()[ids])

    def test_cast_changes_what_comes_out(self) -> None:
        _, layer = self.make()
        assert layer.to(torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("ids", [[50], [-1]], ids=str)
    def test_refuses_ids_out_of_range(self, ids: list[int], tied: bool) -> None:
        _, layer = self.make()
        if tied:
            layer.tied_linear()
        with pytest.raises(IndexError):
            layer(torch.tensor(ids))

    def test_refuses_other_schemes_and_classes(self) -> None:
        embedding, _ = self.make()
        for scheme in ("w4a16-g32", "w8a8-static"):
            with pytest.raises(ValueError, match="8-bit schemes by channel"):
                QuantEmbedding.from_embedding(embedding, scheme)
        with pytest.raises(TypeError, match="EmbeddingBag"):
            QuantEmbedding.from_embedding(nn.EmbeddingBag(3, 4), "w8a8")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYERS)
def test_bytes_are_those_of_the_state_dict(name: str) -> None:
    state = LAYERS[name].state_dict()
    assert LAYERS[name].bytes() == sum(t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("kind", [QuantLinear, SparseLinear, QuantEmbedding, Scheme])
def test_examples_in_docstrings_run(kind: type) -> None:
    names = {"llmq": llmq, "torch": torch}
    example = doctest.DocTestParser().get_doctest(kind.__doc__ or "", names, kind.__name__, None, 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
