"""The verbs `save` and `load`: a compressed model as safetensors plus JSON, whole or not at all.

A directory holds `model.safetensors` (every tensor once, in canonical layout), `llmq.json` (what
the model is made of, with checksums) and whatever else its owner keeps there. Nothing in it is
ever unpickled or executed. The checksums find damage; whoever can write both files can also renew
them, so what they say is checked besides.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from llmq.nn.check import check_layer
from llmq.report import LayerReport, ModelReport, Untouched
from llmq.storage import architecture, tensor_file
from llmq.storage.directory import recover, replaced

FORMAT_VERSION = 1
TENSORS = "model.safetensors"
DESCRIPTION = "llmq.json"
_MAX_DESCRIPTION = 64 << 20  # bytes; a description of 10,000 layers takes 5 MB

# Buffers that a class leaves out of its state dict are made again by the class, but small ones are
# kept too: `.half().float()` and the like leave them with other values than the class gives them.
_SMALL_BUFFER = 1 << 16  # bytes

# A model in float32 is at most some 100 times as large as what is left of it after 4-bit coding
# and pruning nine weights in ten; a small one may need a causal mask that is larger than itself.
_MOST_NUMBERS_A_BYTE = 64
_SPARE_NUMBERS = 1 << 28
_SPARE_TENSORS = 10_000


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write `model` to `directory`, replacing an earlier checkpoint in one step.

    A crash at any moment leaves the old directory or the new one, never a mixture. Files of
    others in the directory, a tokenizer's say, stay.

    Args:
        model: a transformers model, compressed or not.
        directory: made if missing.

    Raises:
        TypeError: if the model is none of transformers' own, which is what `load` can make again.
        ValueError: if the directory holds something that is no llmq checkpoint, or the model has
            layers that its configuration does not tell, or scales that are not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    described = architecture.describe(model)
    entries, aliases, buffers = _entries(model)
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):
            check_layer(name, module, module.canonical())
            layers[name] = module.config()  # type: ignore[operator]
    report = getattr(model, "llmq_report", None)
    description = {
        "format_version": FORMAT_VERSION,
        "versions": {name: _version(name) for name in ("llmq-kernels", "torch", "transformers")},
        **described,
        "layers": layers,
        "low_rank": {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)},
        "module_attributes": getattr(model, "llmq_module_attributes", {}),
        "aliases": aliases,
        "buffers": buffers,
        "report": None if report is None else json.loads(report.to_json()),
    }
    try:
        shapes = {name: list(entry.shape) for name, entry in entries.items()}
        _skeleton(description, shapes, sum(math.prod(shape) for shape in shapes.values()))
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} could not be loaded again: {error}") from error
    with replaced(Path(directory), marker=DESCRIPTION, ours=(TENSORS, DESCRIPTION)) as folder:
        description["tensors_sha256"] = tensor_file.write(folder / TENSORS, entries)
        description["tensors_bytes"] = (folder / TENSORS).stat().st_size
        description["sha256"] = _digest(description)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def load(directory: str | os.PathLike[str], device: str | torch.device | None = None) -> nn.Module:
    """Return the model that `llmq.save` wrote to `directory`, in evaluation mode.

    Args:
        directory: a checkpoint of `llmq.save`.
        device: where the model goes; None leaves it on CPU.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: naming the file, if it is truncated, altered, from a newer version, or names a
            model class that transformers does not have; or if the device cannot be used.
    """
    _check_device(device)
    folder = Path(directory)
    recover(folder)
    file = folder / DESCRIPTION
    description = _read_description(file)
    try:
        size, sha256 = description["tensors_bytes"], description["tensors_sha256"]
        tensors = tensor_file.read(folder / TENSORS, size, sha256)
    except ValueError:
        # Another process may have replaced the directory between the two files.
        if _read_description(file)["sha256"] == description["sha256"]:
            raise
        return load(directory, device)
    try:
        model = _skeleton(description, {n: list(t.shape) for n, t in tensors.items()}, size)
        _fill(model, description, tensors)
        if description["report"] is not None:
            model.llmq_report = _report(model, description["report"])  # type: ignore[assignment]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
    ) as error:
        raise ValueError(f"{file} describes no model: {error!r}") from error
    model.eval()
    return model if device is None else model.to(device)


# -- saving --------------------------------------------------------------------------------------


class _Owned(NamedTuple):
    """A tensor of a checkpoint: its name, its value now, and what tells it from all others."""

    name: str
    tensor: Tensor
    identity: object
    get: Any
    buffer: bool = False


def _owned(model: nn.Module) -> Iterator[_Owned]:
    """Give every tensor of a checkpoint, those that several modules share once for each."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, CompressedLayer):
            for name, tensor in module.canonical().items():
                holder = module._parameters.get(name)
                # Names that only the canonical layout has are held by the module as a whole.
                identity = (id(module), name) if holder is None else id(holder)
                held = holder is not None and holder.data_ptr() == tensor.data_ptr()
                get = tensor.detach if held else _Canonical(module, name)
                yield _Owned(dot + name, tensor, identity, get)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = parameter.detach()
                yield _Owned(dot + name, value, id(parameter), value.detach)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                hidden = name in module._non_persistent_buffers_set
                yield _Owned(dot + name, buffer, id(buffer), buffer.detach, hidden)


class _Canonical(NamedTuple):
    """Makes a canonical tensor again when it is written, so that one is in memory at a time."""

    layer: CompressedLayer
    name: str

    def __call__(self) -> Tensor:
        return self.layer.canonical()[self.name]


def _entries(
    model: nn.Module,
) -> tuple[dict[str, tensor_file.Entry], dict[str, str], dict[str, str]]:
    """Return the tensors to write, alias → name for those that share one, and hidden buffers.

    Hidden buffers, those that a class keeps out of its state dict, are given with their dtype;
    large ones are not written.
    """
    first: dict[object, str] = {}
    entries: dict[str, tensor_file.Entry] = {}
    aliases: dict[str, str] = {}
    buffers: dict[str, str] = {}
    for owned in _owned(model):
        tensor = owned.tensor
        if owned.buffer:
            buffers[owned.name] = str(tensor.dtype).removeprefix("torch.")
            if tensor.numel() * tensor.element_size() > _SMALL_BUFFER:
                continue
        elif owned.identity in first:
            aliases[owned.name] = first[owned.identity]
            continue
        if tensor.is_meta:
            raise ValueError(f"{owned.name} is on the meta device; load the model's weights first")
        first[owned.identity] = owned.name
        entries[owned.name] = tensor_file.Entry(tensor.dtype, tuple(tensor.shape), owned.get)
    return entries, aliases, buffers


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(description: dict[str, Any]) -> str:
    content = {name: value for name, value in description.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- loading -------------------------------------------------------------------------------------

_FIELDS = {
    "config": dict,
    "implementations": dict,
    "generation_config": (dict, type(None)),
    "layers": dict,
    "low_rank": dict,
    "module_attributes": dict,
    "aliases": dict,
    "buffers": dict,
    "report": (dict, type(None)),
    "tensors_sha256": str,
    "tensors_bytes": int,
}


def _check_device(device: str | torch.device | None) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise ValueError(f"device {device!r} cannot be used here: {error}") from error


def _read_description(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} holds no llmq checkpoint ({file.name} is missing); llmq.save writes one"
        )
    if file.stat().st_size > _MAX_DESCRIPTION:
        raise ValueError(f"{file} is larger than any description of a model")
    try:
        description = json.loads(file.read_bytes(), object_pairs_hook=tensor_file.unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: truncated or altered ({error})") from error
    if not isinstance(description, dict) or "format_version" not in description:
        raise ValueError(f"{file} was not written by llmq.save")
    version = description["format_version"]
    if version != FORMAT_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise ValueError(
            f"{file} has format version {version!r}, this llmq reads {FORMAT_VERSION}; "
            + ("pip install -U llmq-kernels" if newer else "save the model again")
        )
    if description.get("sha256") != _digest(description):
        raise ValueError(f"{file} does not match its checksum: altered since it was saved")
    description.setdefault("low_rank", {})  # written before there were any
    for name, kind in _FIELDS.items():
        if not isinstance(description.get(name, ...), kind):  # type: ignore[arg-type]
            raise ValueError(
                f"{file} describes no model: {name} is {description.get(name, 'missing')!r:.60}"
            )
    return description


def _skeleton(description: dict[str, Any], shapes: dict[str, list[int]], size: int) -> nn.Module:
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
    wanted = {owned.name for owned in _owned(model) if not owned.buffer}
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


def _fill(model: nn.Module, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
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
    for owned in _owned(model):
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


def _report(model: nn.Module, record: dict[str, Any]) -> ModelReport:
    """Read a report back; kernels are told anew, as this may be another machine."""
    report = ModelReport(
        layers=[LayerReport(**layer) for layer in record["layers"]],
        untouched=[Untouched(**weight) for weight in record["untouched"]],
        choice=record["choice"],
    )
    for layer in report.layers:
        module: Any = model.get_submodule(layer.name)
        if isinstance(module, CompressedLayer) and not isinstance(module, QuantEmbedding):
            kernel = module.kernel(1)  # type: ignore[operator]
            if kernel.name != layer.kernel:
                layer.kernel, layer.reason = kernel
    str(report)  # raises where a field is of another type than it should be
    return report
