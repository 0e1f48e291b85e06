"""The verbs `save` and `load`: a compressed model as safetensors plus JSON, whole or not at all.

A directory holds `model.safetensors` (every tensor once, in canonical layout), `llmq.json` (what
the model is made of, with checksums) and whatever else its owner keeps there. Nothing in it is
ever unpickled or executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from llmq.integrations.directory import recover, replaced
from llmq.integrations.experts import split_for
from llmq.nn import CompressedLayer, QuantEmbedding, empty_layer
from llmq.report import LayerReport, ModelReport, Untouched
from llmq.walk import set_attributes

FORMAT_VERSION = 1
TENSORS = "model.safetensors"
DESCRIPTION = "llmq.json"
_MAX_DESCRIPTION = 64 << 20  # bytes; a description of 10,000 layers takes 5 MB
_HASH_CHUNK = 16 << 20


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write `model` to `directory`, replacing an earlier checkpoint in one step.

    A crash at any moment leaves the old directory or the new one, never a mixture. Files of
    others in the directory, a tokenizer's say, stay.

    Args:
        model: a transformers model, compressed or not.
        directory: made if missing.

    Raises:
        TypeError: if the model is no transformers model, which is what `load` can rebuild.
        ValueError: if the directory holds something that is no llmq checkpoint.
    """
    config, kind = _architecture(model)
    target = Path(directory)
    tensors, aliases = _tensors(model)
    layers = {
        name: module.config()  # type: ignore[operator]
        for name, module in model.named_modules()
        if isinstance(module, CompressedLayer)
    }
    generation = getattr(model, "generation_config", None)
    report = getattr(model, "llmq_report", None)
    with replaced(target, marker=DESCRIPTION, ours=(TENSORS, DESCRIPTION)) as folder:
        save_file(tensors, folder / TENSORS)
        description = {
            "format_version": FORMAT_VERSION,
            "architecture": kind,
            "config": config,
            "generation_config": None if generation is None else json.loads(_json_of(generation)),
            "layers": layers,
            "module_attributes": getattr(model, "llmq_module_attributes", {}),
            "aliases": aliases,
            "report": None if report is None else json.loads(report.to_json()),
            "tensors_sha256": _sha256(folder / TENSORS, "checksum"),
        }
        description["sha256"] = _digest(description)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def load(directory: str | os.PathLike[str], device: str | torch.device | None = None) -> nn.Module:
    """Return the model that `llmq.save` wrote to `directory`, in evaluation mode.

    Args:
        directory: a checkpoint of `llmq.save`.
        device: where the model goes; None leaves it on CPU.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: naming the file, if it is truncated, altered, from a newer version, or names a
            model class that transformers does not have.
    """
    folder = Path(directory)
    recover(folder)
    description = _read_description(folder / DESCRIPTION)
    file = folder / TENSORS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the checkpoint is incomplete")
    if _sha256(file, "check") != description["tensors_sha256"]:
        raise ValueError(f"{file} is not the file that was saved: truncated or altered")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from error
    try:
        model = _rebuild(description, tensors)
    except (KeyError, TypeError, AttributeError, RuntimeError, MemoryError, IndexError) as error:
        raise ValueError(f"{folder / DESCRIPTION} describes no model: {error!r}") from error
    model.eval()
    return model if device is None else model.to(device)


# -- saving --------------------------------------------------------------------------------------


def _architecture(model: nn.Module) -> tuple[dict[str, Any], str]:
    """Return the configuration and class name from which transformers makes `model` again."""
    kind = type(model).__name__
    if not type(model).__module__.startswith("transformers.") or not hasattr(model, "config"):
        raise TypeError(
            f"llmq.save writes transformers models, which llmq.load can rebuild by name, got "
            f"{kind}; torch.save(model.state_dict(), file) keeps the weights of any module, in "
            f"the same canonical layout"
        )
    config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    config.pop("quantization_config", None)
    return config, kind


def _json_of(generation_config: Any) -> str:
    text: str = generation_config.to_json_string(use_diff=True)
    return text


def _owned(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Give every tensor of a checkpoint as (name, tensor, identity of what holds it)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, CompressedLayer):
            for name, tensor in module.canonical().items():
                holder = module._parameters.get(name)
                # Names that only the canonical layout has are held by the module as a whole.
                yield (
                    dot + name,
                    tensor,
                    id(holder) if holder is not None else hash((id(module), name)),
                )
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + name, parameter.detach(), id(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield dot + name, buffer, id(buffer)


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to write, each once, and alias → name for those that share one."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor, identity in _owned(model):
        if identity in first:
            aliases[name] = first[identity]
            continue
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device; load the model's weights first")
        first[identity] = name
        tensors[name] = tensor.detach().to("cpu").contiguous()
    return _separate(tensors), aliases


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that are views of one storage, which safetensors refuses."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or (tensor.numel() and storage.data_ptr() in seen):
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _sha256(file: Path, what: str) -> str:
    digest = hashlib.sha256()
    size = file.stat().st_size
    with (
        file.open("rb") as stream,
        tqdm(total=size, desc=what, unit="B", unit_scale=True, delay=1, leave=False) as bar,
    ):
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _digest(description: dict[str, Any]) -> str:
    content = {name: value for name, value in description.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- loading -------------------------------------------------------------------------------------


def _read_description(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} holds no llmq checkpoint ({file.name} is missing); llmq.save writes one"
        )
    if file.stat().st_size > _MAX_DESCRIPTION:
        raise ValueError(f"{file} is larger than any description of a model")
    try:
        description = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: truncated or altered ({error})") from error
    if not isinstance(description, dict) or "format_version" not in description:
        raise ValueError(f"{file} was not written by llmq.save")
    version = description["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version!r}, this llmq reads {FORMAT_VERSION}; "
            f"another version of llmq wrote it"
        )
    if description.get("sha256") != _digest(description):
        raise ValueError(f"{file} does not match its checksum: altered since it was saved")
    return description


class _NoInitialization(TorchFunctionMode):
    """Leaves fresh weights unset: they are about to be loaded, and drawing them takes seconds."""

    _SKIPPED = frozenset({"uniform_", "normal_", "trunc_normal_", "erfinv_"})

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in self._SKIPPED and args and isinstance(args[0], Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


def _rebuild(description: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    model = _empty_model(description["architecture"], description["config"])
    generation = description["generation_config"]
    if generation is not None:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_dict(generation)  # type: ignore[assignment]
    aliases = description["aliases"]
    for alias, name in aliases.items():
        if name not in tensors:
            raise ValueError(f"alias {alias} names the missing tensor {name}")
    everything = tensors | {alias: tensors[name] for alias, name in aliases.items()}
    for name, config in description["layers"].items():
        shapes = {n: list(everything[f"{name}.{n}"].shape) for n in config["shapes"]}
        if shapes != config["shapes"]:
            raise ValueError(f"layer {name} has tensors of other shapes than it describes")
        split_for(model, name)
        layer = empty_layer(config)
        layer.load_state_dict({n: everything[f"{name}.{n}"] for n in shapes})
        _set_submodule(model, name, layer)
    for name, attributes in description["module_attributes"].items():
        if not all(type(value) is int for value in attributes.values()):
            raise ValueError(f"attributes of module {name} are not all integers")
        set_attributes(model, name, attributes)
    compressed = tuple(f"{name}." for name in description["layers"])
    _fill(model, {n: t for n, t in everything.items() if not n.startswith(compressed)})
    _tie(model, aliases)
    if description["report"] is not None:
        model.llmq_report = _report(description["report"])  # type: ignore[assignment]
    return model


def _empty_model(kind: str, config: dict[str, Any]) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"the checkpoint holds a transformers {kind}; pip install 'llmq-kernels[transformers]'"
        ) from error
    found = getattr(transformers, kind, None) if isinstance(kind, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(f"transformers {transformers.__version__} has no model class {kind!r}")
    with _NoInitialization():
        model = found(found.config_class.from_dict(config))
    assert isinstance(model, nn.Module)
    return model


def _set_submodule(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    modules = model.get_submodule(parent)._modules
    if attribute not in modules:
        raise ValueError(f"the model has no layer {name}")
    modules[attribute] = layer


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Set every parameter and persistent buffer outside compressed layers; shapes may differ."""
    wanted = {
        name
        for name, _, _ in _owned(model)
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), CompressedLayer)
    }
    if wanted != tensors.keys():
        odd = sorted(wanted ^ tensors.keys())
        raise ValueError(f"tensors and model do not belong together: {', '.join(odd[:3])}")
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
            continue
        old = module._parameters[attribute]
        assert old is not None
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


def _report(record: dict[str, Any]) -> ModelReport:
    return ModelReport(
        layers=[LayerReport(**layer) for layer in record["layers"]],
        untouched=[Untouched(**weight) for weight in record["untouched"]],
        choice=record["choice"],
    )
