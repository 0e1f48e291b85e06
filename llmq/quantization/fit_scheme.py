"""Which scheme a model gets, and each of its layers; whether a layer can take it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from llmq.models.targets import Target, check_weight
from llmq.nn import CompressedLayer, SparseLinear, linear_weight
from llmq.runtime import dispatch
from llmq.scheme import Scheme, resolve_scheme


def pick(model: nn.Module, bits: int, scheme: str | Scheme | None) -> tuple[Scheme, str]:
    """Return the scheme that is asked for, or that suits the device, and why that one."""
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


def fitted(scheme: Scheme, target: Target, asked: bool) -> Scheme:
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


def check(target: Target, scheme: Scheme) -> None:
    """Raise `ValueError` naming the layer if it cannot take the scheme."""
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
