"""Takes rows and columns out of a linear layer's weight [N, K], compressed or not."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from llmq.formats import bitmap, uniform
from llmq.nn import QuantLinear, SparseLinear, is_conv1d
from llmq.scheme import Pattern, Scheme


def is_linear(module: object) -> bool:
    """Whether `take` can slice `module`."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or isinstance(module, (QuantLinear, SparseLinear)) or is_conv1d(module)  # type: ignore[arg-type]


def take(
    name: str, layer: nn.Module, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> nn.Module:
    """Return a layer of some outputs and inputs of `layer`, which stays as it is.

    Args:
        name: of the layer, for errors.
        layer: `Linear`, `Conv1D`, `QuantLinear` or unstructured `SparseLinear`, weight [N, K].
        rows: int64 indices of outputs, ascending; None keeps all.
        columns: int64 indices of inputs, ascending; None keeps all.

    Raises:
        ValueError: if columns would tear apart inputs that share a scale, or the pattern is one
            of blocks or 2:4.
    """
    if isinstance(layer, SparseLinear):
        new: nn.Module = _take_sparse(name, layer, rows, columns)
    elif isinstance(layer, QuantLinear):
        new = _take_quantized(name, layer, rows, columns)
    elif isinstance(layer, nn.Linear):
        new = copy.copy(layer)
        new._parameters = {
            "weight": _parameter(layer._parameters["weight"], rows, columns),
            "bias": _parameter(layer._parameters["bias"], rows, None),
        }
        new.out_features, new.in_features = new._parameters["weight"].shape  # type: ignore[union-attr]
    else:  # Conv1D: weight [K, N]
        new = copy.copy(layer)
        new._parameters = {
            "weight": _parameter(layer._parameters["weight"], columns, rows),
            "bias": _parameter(layer._parameters["bias"], rows, None),
        }
        new.nx, new.nf = new._parameters["weight"].shape  # type: ignore[union-attr, assignment]
    return new.train(layer.training)


def select(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return a contiguous copy of some rows and columns of `tensor` [N, ...]."""
    if rows is not None:
        tensor = tensor.index_select(0, rows)
    if columns is not None:
        tensor = tensor.index_select(1, columns)
    return tensor.clone(memory_format=torch.contiguous_format)


def _parameter(
    parameter: nn.Parameter | None, rows: Tensor | None, columns: Tensor | None
) -> nn.Parameter | None:
    if parameter is None:
        return None
    taken = select(parameter.detach(), rows, columns)
    return nn.Parameter(taken, requires_grad=parameter.requires_grad)


def _groups(columns: Tensor, group: int) -> Tensor | None:
    """Return which groups of `group` inputs `columns` are, None if they are not whole groups."""
    if columns.numel() % group:
        return None
    starts = columns.reshape(-1, group)
    whole = torch.equal(starts, starts[:, :1] + torch.arange(group, device=columns.device))
    return starts[:, 0] // group if whole and bool((starts[:, 0] % group == 0).all()) else None


def _check_activations(name: str, scheme: Scheme | None, columns: Tensor | None) -> None:
    group = None if scheme is None else scheme.activation_group_size
    if columns is not None and group is not None and columns.numel() % group:
        raise ValueError(
            f"{name}: {columns.numel()} inputs would stay, not a multiple of the activation group "
            f"of {group}; prune before quantizing, or choose another pruning_rate"
        )


def _take_quantized(
    name: str, layer: QuantLinear, rows: Tensor | None, columns: Tensor | None
) -> QuantLinear:
    scheme = layer.scheme
    tensors = layer.canonical()
    _check_activations(name, scheme, columns)
    groups = columns
    group = scheme.group_size
    if columns is not None and group is not None:
        groups = _groups(columns, group)
        if groups is None:
            raise ValueError(
                f"{name} is {scheme.name}: the inputs that stay are no whole groups of {group}; "
                f"prune before quantizing, or name the layer in skip"
            )
    codes = tensors["weight"]
    if scheme.bits == 4:
        codes = uniform.unpack_int4(codes, layer.in_features)
    codes = select(codes, rows, columns)
    new = {"weight": uniform.pack_int4(codes) if scheme.bits == 4 else codes}
    for tensor in ("weight_scale", "weight_zero_point"):
        if tensor in tensors:
            new[tensor] = select(tensors[tensor], rows, None if group is None else groups)
    if "weight_codebook" in tensors:
        table = tensors["weight_codebook"]
        shared = table.shape[0] == 1
        new["weight_codebook"] = table.clone() if shared else select(table, rows, None)
    if "input_scale" in tensors:
        new["input_scale"] = tensors["input_scale"].clone()
    if "bias" in tensors:
        new["bias"] = select(tensors["bias"], rows, None)
    K = layer.in_features if columns is None else columns.numel()
    return QuantLinear(K, new["weight"].shape[0], scheme, new)


def _take_sparse(
    name: str, layer: SparseLinear, rows: Tensor | None, columns: Tensor | None
) -> SparseLinear:
    if layer.pattern != "unstructured":
        raise ValueError(
            f"{name} is pruned in pattern {layer.pattern}, which a structured pruning would tear "
            f"apart; prune structured first, or name the layer in skip"
        )
    _check_activations(name, layer.scheme, columns)
    tensors = layer.canonical()
    stored = (tensors["weight"], tensors["weight_bitmask"], tensors["row_offsets"])
    values = select(bitmap.decode(*stored, layer.in_features), rows, columns)
    mask = select(bitmap.decode_mask(tensors["weight_bitmask"], layer.in_features), rows, columns)
    new = bitmap.encode(values, mask)._asdict()
    for tensor in ("weight_scale", "bias"):
        if tensor in tensors:
            new[tensor] = select(tensors[tensor], rows, None)
    if "input_scale" in tensors:
        new["input_scale"] = tensors["input_scale"].clone()
    return SparseLinear(
        values.shape[1], values.shape[0], Pattern("unstructured"), layer.scheme, new
    )
