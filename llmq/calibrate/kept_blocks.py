"""What a store keeps of each block that is compressed, so that an interrupted run can go on.

An entry holds the canonical tensors of the block's new layers, and the parameters of other modules
that scales were folded into; its JSON says what the layers are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from llmq.calibrate.folding import Journal
from llmq.calibrate.stages import Call
from llmq.models.targets import Target
from llmq.nn import CompressedLayer, empty_layer
from llmq.storage.fingerprint import fingerprint
from llmq.storage.resume import Store

_FOLDED = "folded:"


class KeptBlock(NamedTuple):
    """What became of one block: its layers, and what `blockwise.Compressed` says of them."""

    layers: list[nn.Module]
    unreached: list[str]
    errors: dict[str, float]
    folded: list[str]  # names of layers whose inputs were scaled


def open_store(
    directory: str | os.PathLike[str] | None,
    options: str,
    groups: list[list[Target]],
    calls: list[Call],
) -> Store | None:
    """Return the store of a run with these options, layers and data; None without a directory."""
    if directory is None:
        return None
    weights = ((group[0].name, _weight(group[0].module)) for group in groups)
    return Store(directory, fingerprint(weights, options, calls))


def load(
    store: Store, stage: int, model: nn.Module, targets: list[Target], journal: Journal
) -> KeptBlock | None:
    """Return what `targets` became in an earlier run, None if that is not there."""
    entry = store.get(_key(stage))
    if entry is None:
        return None
    tensors, info = entry
    layers: list[nn.Module] = []
    for target in targets:
        prefix = f"{target.name}."
        own = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        layer = empty_layer(info["layers"][target.name])
        device = next(target.module.parameters()).device
        layer.load_state_dict({n: t.to(device) for n, t in own.items()})
        layers.append(layer.train(target.module.training))
    for name, tensor in tensors.items():
        if name.startswith(_FOLDED):
            owner, _, parameter = name.removeprefix(_FOLDED).rpartition(".")
            module = model.get_submodule(owner)
            value = tensor.to(module.get_parameter(parameter).device)
            journal.scale(module, parameter, _constant(value))
    return KeptBlock(layers, info["unreached"], info["errors"], info["folded"])


def save(
    store: Store,
    stage: int,
    model: nn.Module,
    layers: dict[str, Any],  # CompressedLayer
    changed: list[tuple[nn.Module, str]],
    block: KeptBlock,
) -> None:
    """Keep a block's new layers, and what else of it changed."""
    tensors: dict[str, Tensor] = {
        f"{name}.{part}": tensor
        for name, layer in layers.items()
        for part, tensor in layer.canonical().items()
    }
    names = {id(module): name for name, module in model.named_modules()}
    for module, parameter in changed:
        if id(module) in names:  # others were replaced by their layers
            value = module.get_parameter(parameter)
            tensors[f"{_FOLDED}{names[id(module)]}.{parameter}"] = value
    info = {name: value for name, value in block._asdict().items() if name != "layers"}
    info["layers"] = {name: layer.config() for name, layer in layers.items()}
    store.put(_key(stage), tensors, info)


def _weight(module: Any) -> Tensor:
    compressed = isinstance(module, CompressedLayer)
    weight: Tensor = module.dequantize() if compressed else module.weight.detach()
    return weight


def _key(stage: int) -> str:
    return f"{stage:04}"


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value
