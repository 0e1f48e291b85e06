"""What `quantize` makes of layers that share one weight, and what each of them lost."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from llmq.calibrate.statistics import Statistics
from llmq.models.targets import Target
from llmq.nn import (
    CompressedLayer,
    QuantEmbedding,
    QuantLinear,
    SparseLinear,
    dense_weight,
    embedding_factor,
    linear_weight,
)
from llmq.quantization import rounding, static_scale
from llmq.report import Change, relative_error
from llmq.scheme import Scheme


def convert(
    group: list[Target], scheme: Scheme, how: str, statistics: Statistics | None
) -> list[nn.Module]:
    """Return the new layers of targets that share one weight; they share the new tensors too."""
    moments = None if statistics is None or not statistics.rows else statistics.moments
    input_scale = None
    if scheme.activations == "static":
        input_scale = _input_scale(group[0].module, how, statistics)
        if input_scale is None:
            scheme = replace(scheme, activations="dynamic")
    if all(isinstance(target.module, CompressedLayer) for target in group):
        return [
            _convert_sparse(t.module, scheme, how, moments, input_scale)
            if isinstance(t.module, SparseLinear) and t.module.scheme is None
            else t.module
            for t in group
        ]
    first: nn.Module
    if isinstance(group[0].module, nn.Embedding):
        first = QuantEmbedding.from_embedding(group[0].module, scheme)
        first.train(group[0].module.training)
    else:
        first = _coded(group[0].module, scheme, how, moments, input_scale)
    return [first] + [_twin(first, target.module) for target in group[1:]]


def _input_scale(module: nn.Module, how: str, statistics: Statistics | None) -> Tensor | None:
    """Return the static scale of a layer's inputs; None where none came but zeros.

    The inputs are those that the blocks before give, compressed as they are by then, with scales
    folded in; layers of the same block that run before are not rounded yet, which moves a largest
    input by little more than they round.
    """
    if statistics is None or not statistics.rows:
        return None
    if how == "rtn":
        return static_scale.whole_range(statistics.largest)
    return static_scale.least_loss(statistics, dense_weight(module))


def _coded(
    linear: nn.Module,
    scheme: Scheme,
    how: str,
    moments: Tensor | None,
    input_scale: Tensor | None,
) -> QuantLinear:
    weight, bias = linear_weight(linear)
    encoded = rounding.encode(weight, scheme, how, moments)
    layer = QuantLinear.from_encoded(
        encoded, bias, scheme, in_features=weight.shape[1], input_scale=input_scale
    )
    return layer.train(linear.training)


def _convert_sparse(
    layer: SparseLinear,
    scheme: Scheme,
    how: str,
    moments: Tensor | None,
    input_scale: Tensor | None,
) -> SparseLinear:
    if how == "rtn" or moments is None:
        return SparseLinear.from_linear(
            layer, layer.pattern, scheme=scheme, input_scale=input_scale
        )
    values, mask = layer.values_and_mask()
    encoded = rounding.encode(values, scheme, how, moments, kept=mask)
    bias = None if layer.bias is None else layer.bias.data
    dense = QuantLinear.from_encoded(
        encoded, bias, scheme, in_features=layer.in_features, input_scale=input_scale
    )
    return SparseLinear.from_linear(dense, layer.pattern, mask=mask).train(layer.training)


def _twin(first: nn.Module, module: nn.Module) -> nn.Module:
    """Return what `module` becomes as it shares its weight with what became `first`."""
    twin: nn.Module
    if isinstance(module, nn.Embedding):
        assert isinstance(first, QuantEmbedding)
        twin = QuantEmbedding(
            first.num_embeddings,
            first.embedding_dim,
            first.scheme,
            {"weight": first.weight.data, "weight_scale": first.weight_scale.data},
            dtype=first.dtype,
            padding_idx=module.padding_idx,
            factor=embedding_factor(module) or 1.0,
        )
        twin.weight, twin.weight_scale = first.weight, first.weight_scale
    elif isinstance(first, QuantEmbedding):
        twin = first.tied_linear(linear_weight(module)[1])
    else:
        assert isinstance(first, QuantLinear)
        shared = {n: p.data for n, p in first._parameters.items() if p is not None and n != "bias"}
        bias = linear_weight(module)[1]
        own = {} if bias is None else {"bias": bias}
        twin = QuantLinear(first.in_features, first.out_features, first.scheme, shared | own)
        for name in shared:
            setattr(twin, name, first._parameters[name])
    return twin.train(module.training)


def change(target: Target, layer: nn.Module) -> Change:
    """Return what became of `target` as `layer` takes its place."""
    assert isinstance(layer, (QuantLinear, SparseLinear, QuantEmbedding))
    module = target.module
    if isinstance(module, SparseLinear):
        error = relative_error(module.dequantize(), layer.dequantize())
        return Change(target.kind, error, module.bytes())
    if isinstance(module, nn.Embedding):
        weight, bias = module.weight.detach(), None
    else:
        weight, bias = linear_weight(module)
    size = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)
    return Change(target.kind, relative_error(weight, layer.dequantize()), size)
