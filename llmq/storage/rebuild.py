"""Makes the model again that a checkpoint describes, and gives it the checkpoint's tensors.

Whoever can write the files can also renew their checksums: shapes, counts and names are checked
before memory is taken for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmq.models.experts import split_for
from llmq.models.targets import set_attributes
from llmq.nn import (
    CompressedLayer,
    LowRankLinear,
    QuantEmbedding,
    SparseLinear,
    empty_layer,
    linear_weight,
)
from llmq.nn.serialize import check_layer
from llmq.storage import architecture
from llmq.storage.owned_tensors import owned_tensors

# A model in float32 is at most some 100 times as large as what is left of it after 4-bit coding
# and pruning nine weights in ten; a small one may need a causal mask that is larger than itself.
_MOST_NUMBERS_A_BYTE = 64
_SPARE_NUMBERS = 1 << 28
_SPARE_TENSORS = 10_000


def skeleton(description: dict[str, Any], shapes: dict[str, list[int]], size: int) -> nn.Module:
    """Make the model that tensors of `shapes` belong into, of `size` bytes or numbers in all."""
    numbers = _MOST_NUMBERS_A_BYTE * size + _SPARE_NUMBERS
    everything = dict(shapes)
    for alias, name in description["aliases"].items():
        if name not in shapes or alias in shapes:
            raise ValueError(f"alias {alias} names the missing tensor {name}")
        everything[alias] = shapes[name]
    layers = description["layers"]
    _check_layers(layers, everything, numbers)
    model = architecture.build(
        description, numbers=numbers, tensors=8 * len(everything) + _SPARE_TENSORS
    )
    for name, rank in description["low_rank"].items():
        split_for(model, name)
        _replace(model, name, _low_rank(model, name, rank))
    for name, config in layers.items():
        split_for(model, name)
        _replace(model, name, empty_layer(config))
    for name, attributes in description["module_attributes"].items():
        module = model.get_submodule(name)
        for attribute, value in attributes.items():
            if type(value) is not int or type(getattr(module, attribute, 0)) is not int:
                raise ValueError(f"attributes of module {name} are not all integers")
        set_attributes(model, name, attributes)
    wanted = {owned.name for owned in owned_tensors(model) if not owned.buffer}
    given = everything.keys() - description["buffers"].keys()
    if wanted != given:
        odd = sorted(wanted ^ given)
        raise ValueError(f"tensors and model do not belong together: {', '.join(odd[:3])}")
    return model


def _check_layers(layers: dict[str, Any], shapes: dict[str, list[int]], numbers: int) -> None:
    """Raise `ValueError` if layers do not fit their tensors, or are too large when decoded."""
    for name, config in layers.items():
        if not isinstance(config, dict) or not isinstance(config.get("shapes"), dict):
            raise ValueError(f"describes no model: layer {name} is {config!r:.60}")
        if any(shapes.get(f"{name}.{n}") != shape for n, shape in config["shapes"].items()):
            raise ValueError(f"layer {name} has tensors of other shapes than it describes")
        fields = ("out_features", "in_features")
        if config.get("type") == "QuantEmbedding":
            fields = ("num_embeddings", "embedding_dim")
        for field in fields:
            if type(config.get(field)) is not int or config[field] < 0:
                raise ValueError(f"layer {name} has {field}={config.get(field)!r:.60}")
        numbers -= config[fields[0]] * config[fields[1]]
    if numbers < 0:
        raise ValueError("describes far larger layers than the tensors can make")


def _low_rank(model: nn.Module, name: str, rank: Any) -> LowRankLinear:
    try:
        linear = model.get_submodule(name)
        N, K = linear_weight(linear)[0].shape
    except (AttributeError, TypeError) as error:
        raise ValueError(f"describes no model: {name} is no linear layer") from error
    if type(rank) is not int or not 0 < rank <= min(N, K):
        raise ValueError(f"describes no model: {name} has rank {rank!r:.60}")
    return LowRankLinear.empty(linear, rank)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` wherever the module called `name` stands."""
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"describes no model: it has no layer {name}") from error
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is old:
                parent._modules[attribute] = layer


def fill(model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Give the skeleton its values; shapes are those of the tensors (structured pruning).

    `tensors` is emptied, so that a model is not in memory twice.
    """
    aliases, hidden = description["aliases"], description["buffers"]
    rebuilt = {name: dtype for name, dtype in hidden.items() if name not in tensors}
    everything = tensors | {alias: tensors[name] for alias, name in aliases.items()}
    tensors.clear()
    for name, config in description["layers"].items():
        layer = model.get_submodule(name)
        assert isinstance(layer, CompressedLayer)
        own = {n: everything.pop(f"{name}.{n}") for n in config["shapes"]}
        check_layer(name, layer, own)
        layer.load_state_dict(own)
        if isinstance(layer, SparseLinear) and layer.weight.dim() != 2:
            layer.mask()  # kept as stored, so that nothing has checked its positions yet
    for name, tensor in everything.items():
        module, attribute = _owner(model, name)
        if isinstance(module, CompressedLayer):
            continue  # of a layer that stands in several places
        if module is not None and attribute in module._buffers:
            module._buffers[attribute] = tensor
        elif name not in hidden:  # else this version of transformers does without
            assert module is not None
            _set_parameter(module, attribute, tensor)
    for name, dtype in rebuilt.items():
        module, attribute = _owner(model, name)
        buffer = None if module is None else module._buffers.get(attribute)
        if module is not None and buffer is not None and buffer.is_floating_point():
            module._buffers[attribute] = buffer.to(_float_dtype(dtype))
    _tie(model, aliases)
    for owned in owned_tensors(model):
        if owned.tensor.is_meta:
            raise ValueError(f"describes no model: nothing gives {owned.name} its values")


def _owner(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """Return the module that holds the tensor called `name`, and what it calls it."""
    owner, _, attribute = name.rpartition(".")
    try:
        return model.get_submodule(owner), attribute
    except AttributeError:
        return None, attribute


def _float_dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"describes no model: {name!r} is no floating-point dtype")
    return dtype


def _set_parameter(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    old = module._parameters[attribute]
    assert old is not None
    if old.dim() != tensor.dim():
        raise ValueError(f"{attribute} has shape {list(tensor.shape)}, not {list(old.shape)}")
    module._parameters[attribute] = nn.Parameter(
        tensor, requires_grad=old.requires_grad and tensor.is_floating_point()
    )
    if isinstance(module, nn.Linear) and attribute == "weight":
        module.out_features, module.in_features = tensor.shape


def _tie(model: nn.Module, aliases: dict[str, str]) -> None:
    for alias, name in aliases.items():
        owner, _, attribute = name.rpartition(".")
        source = model.get_submodule(owner)
        owner, _, alias_attribute = alias.rpartition(".")
        target = model.get_submodule(owner)
        for kind in ("_parameters", "_buffers"):
            held = getattr(source, kind).get(attribute)
            if held is not None:
                getattr(target, kind)[alias_attribute] = held
        if isinstance(source, QuantEmbedding) and isinstance(target, CompressedLayer):
            target._pack()
