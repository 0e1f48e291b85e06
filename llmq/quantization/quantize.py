"""The verb `quantize`: codes the weights of a model's linear layers, in place."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.calibrate import blockwise
from llmq.calibrate.data import calls_of
from llmq.calibrate.stages import Statistics
from llmq.models.targets import Target, check_weight, find, swap
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
from llmq.quantization.algorithm import parse_algorithm
from llmq.quantization.smoothquant_awq import Scaling
from llmq.report import Change, attach, few, relative_error
from llmq.runtime import dispatch
from llmq.scheme import Scheme, resolve_scheme
from llmq.storage.resume import Kept, run_of

_log = logging.getLogger("llmq")


def quantize(
    model: nn.Module,
    bits: int = 8,
    *,
    scheme: str | Scheme | None = None,
    data: Any = None,
    algorithm: str = "rtn",
    skip: tuple[str, ...] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Quantize the linear layers of `model` in place and return it; the report is attached.

    Converts `Linear`, GPT-2's `Conv1D`, experts kept as 3-D parameters, and sparse layers, whose
    masks stay. `print(model.llmq_report)` tells what became of each layer and why others stay.

    Args:
        model: any module with float32, bfloat16 or float16 weights.
        bits: 8 picks int8 weights with int8 activations where the device is fast at that, else
            with floating-point activations; 4 picks groups of 32 inputs, or fewer where 32 does
            not divide.
        scheme: a `Scheme` or a preset's name, instead of what `bits` would pick. One with static
            activations needs data; layers that no data reaches get dynamic ones.
        data: to calibrate with: token ids, a pair (text or texts, tokenizer), or any iterable of
            what the model takes (`calibrate/data.py`). A block at a time is in memory beside the
            model. `"rtn"` takes none but for static activations, `"clip"` either way, the
            others need it.
        algorithm: how codes are chosen: `"rtn"`, to the nearest; `"clip"`, to the nearest in the
            range that loses least; `"gptq"`, one input after the other, the rest making up for
            it. A static scale spans all inputs with `"rtn"`, the range that loses least with the
            others. Or `"smoothquant"` or `"awq"`, which first scale inputs where the model takes it
            exactly, alone or before one of those, as in `"smoothquant+gptq"`.
        skip: patterns of layers to leave alone: dotted parts of a name (`"lm_head"`,
            `"layers.0"`) or a shell pattern for the whole of it. None skips the output embedding,
            what shares its tensor, and routers of experts; `()` skips nothing and compresses
            embeddings too, as int8 by row.
        resume: a directory that keeps each block once it is done, from which the same call goes on
            if it was interrupted; only with data.

    Raises:
        ValueError: naming the layer, if a weight is not finite or of another dtype, a group size
            does not divide its inputs, or it is compressed already in another way. The model is
            then as it was.
        TypeError: if an argument is of the wrong type.

    Example:
        >>> model = llmq.quantize(model, scheme="w8a8-g64")
        >>> print(model.llmq_report)
    """
    picked, choice = _pick(model, bits, scheme)
    static = picked.activations == "static"
    scaling, how = parse_algorithm(algorithm, static=static, has_data=data is not None)
    if resume is not None and data is None:
        raise ValueError("resume goes with data: without it there is next to nothing to resume")
    found = find(model, skip, embeddings=True)
    for group in found.groups:
        for target in group:
            _check(target, _fitted(picked, target, scheme is not None))

    def convert(group: list[Target], statistics: Statistics | None) -> list[nn.Module]:
        fitted = _fitted(picked, group[0], scheme is not None)
        return _convert(group, fitted, how, statistics)

    errors: dict[str, float] = {}
    if data is None:
        replacements = []
        with tqdm(found.groups, desc="quantize", unit="layer", delay=1, leave=False) as progress:
            for group in progress:
                layers = convert(group, None)
                replacements += [
                    (target, layer)
                    for target, layer in zip(group, layers, strict=True)
                    if layer is not target.module
                ]
    else:
        calls = calls_of(model, data)
        schemes = {
            t.name: _fitted(picked, group[0], scheme is not None)
            for group in found.groups
            for t in group
        }
        scaled = None if scaling is None else Scaling(scaling, schemes)
        kept = None
        if resume is not None:
            kept = Kept(resume, run_of(f"quantize {schemes} {algorithm}", found.groups, calls))
        done = blockwise.compress(
            model,
            found,
            calls,
            convert,
            what="quantize",
            full=how == "gptq",
            sample=static and how != "rtn",
            scaling=scaled,
            kept=kept,
        )
        replacements, errors = done.layers, done.errors
        choice = _said(choice, algorithm, len(calls), scaled, done.unreached, static)
    changes = {target.name: _change(target, layer) for target, layer in replacements}
    changes.update({n: changes[n]._replace(weight_error=e) for n, e in errors.items()})
    swap(model, found, replacements)
    if choice:
        _log.info(choice)
    attach(model, changes, found.reasons, choice)
    return model


def _said(
    choice: str,
    algorithm: str,
    batches: int,
    scaled: Scaling | None,
    unreached: list[str],
    static: bool,
) -> str:
    """Return the report's lines on what calibration did."""
    lines = [choice] if choice else []
    lines.append(f"{algorithm}, calibrated on {batches} batches")
    if scaled is not None:
        left = [name for name in scaled.schemes if name not in scaled.folded]
        of = f"{len(scaled.folded)} of {len(scaled.schemes)} layers"
        lines.append(f"{scaled.kind}: folded exactly for the inputs of {of}")
        if left:
            lines.append(f"  not, as nothing before them takes the scales: {few(left)}")
    if unreached:
        became = "dynamic, and " if static else ""
        lines.append(f"{became}rounded to nearest, as no data reached them: {few(unreached)}")
    return "\n".join(lines)


def _pick(model: nn.Module, bits: int, scheme: str | Scheme | None) -> tuple[Scheme, str]:
    if isinstance(bits, bool) or bits not in (4, 8):
        raise ValueError(f"bits must be 8 or 4, got {bits!r}")
    if scheme is not None:
        resolved = resolve_scheme(scheme)
        if bits not in (8, resolved.bits):
            raise ValueError(f"bits={bits} contradicts scheme {resolved.name}; give one of them")
        return resolved, ""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if bits == 4:
        return resolve_scheme("w4a16-g32"), "bits=4: w4a16-g32, or the largest group that divides"
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if dispatch.has_fast_int8(device):
        isa = f" ({dispatch.cpu_isa()})" if device.type == "cpu" else ""
        why = f"int8 dot products are fast on this {device.type}{isa}"
        return resolve_scheme("w8a8"), f"bits=8: w8a8, as {why}"
    why = f"no fast int8 dot product for {device.type} here"
    return resolve_scheme("w8a16"), f"bits=8: w8a16, as there is {why}"


def _fitted(scheme: Scheme, target: Target, asked: bool) -> Scheme:
    """Return the scheme that `target` gets: by row for embeddings, other groups if free to pick."""
    if target.is_embedding:
        if scheme.activations == "static":
            scheme = replace(scheme, activations="dynamic")
        return replace(
            scheme, bits=8, method="uniform", granularity="channel", group_size=None, symmetric=True
        )
    if asked or scheme.group_size is None or isinstance(target.module, CompressedLayer):
        return scheme
    K = linear_weight(target.module)[0].shape[1]
    for group in (32, 16, 8, 4, 2):
        if K % group == 0:
            return replace(scheme, group_size=group)
    return replace(scheme, granularity="channel", group_size=None)


def _check(target: Target, scheme: Scheme) -> None:
    module, name = target.module, target.name
    if isinstance(module, CompressedLayer):
        _check_compressed(name, module, scheme)
        return
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise ValueError(f"{name}: an embedding with max_norm changes its weight; skip it")
        weight = module.weight.detach()
    else:
        weight = linear_weight(module)[0]
    check_weight(name, weight)
    scheme.check_fits(weight.shape[0], weight.shape[1], name)


def _check_compressed(name: str, layer: CompressedLayer, scheme: Scheme) -> None:
    if isinstance(layer, SparseLinear) and layer.scheme is None:
        if scheme.bits != 8 or scheme.method != "uniform" or scheme.granularity == "group":
            raise ValueError(
                f"{name} is sparse ({layer.pattern}) and cannot become {scheme.name}; sparse "
                f"values take 8-bit uniform schemes by channel: w8a8, w8a8-g64 or w8a16"
            )
        if not scheme.symmetric:
            raise ValueError(f"{name} is sparse: its values take symmetric schemes only")
        check_weight(name, layer.dequantize())
        scheme.check_fits(layer.out_features, layer.in_features, name)
        return
    has = layer.scheme
    assert isinstance(has, Scheme)
    if has != scheme and not _same_by_default(has, scheme):
        raise ValueError(
            f"{name} is already {has.name} and cannot become {scheme.name}; quantize the original "
            f"model, or name the layer in skip"
        )


def _same_by_default(has: Scheme, scheme: Scheme) -> bool:
    """Whether two schemes differ only by the group that `quantize(bits=4)` fitted to a layer."""
    fits = replace(scheme, granularity=has.granularity, group_size=has.group_size)
    return scheme.name == "w4a16-g32" and has == fits and (has.group_size or 1) < 32


def _convert(
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


def _change(target: Target, layer: nn.Module) -> Change:
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
