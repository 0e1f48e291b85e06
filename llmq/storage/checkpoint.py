"""The verbs `save` and `load`: a compressed model as safetensors and JSON.

A directory holds `model.safetensors` (every tensor once, in canonical layout) and `llmq.json` (what
the model is made of, with checksums). Other files in it are left alone. Nothing is ever unpickled
or executed. The checksums find damage. They do not stop an attacker, who can renew them, so `load`
also checks what the files say.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmq.nn import CompressedLayer, LowRankLinear, QuantEmbedding
from llmq.nn.serialize import check_layer
from llmq.report import LayerReport, ModelReport, Untouched
from llmq.storage import architecture, tensor_file
from llmq.storage.description import DESCRIPTION, FORMAT_VERSION, digest, read_description
from llmq.storage.directory import recover, replaced
from llmq.storage.owned_tensors import entries_of
from llmq.storage.rebuild import fill, skeleton

TENSORS = "model.safetensors"


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Save a compressed model to a directory.

    An earlier checkpoint in the directory is replaced in one step: a crash leaves the old
    checkpoint or the new one. Other files in the directory, such as a tokenizer, are kept.

    Args:
        model: a transformers model, compressed or not.
        directory: created if it is missing.

    Raises:
        TypeError: if the model is not one of transformers' own classes. `load` creates the model
            from its class name and configuration.
        ValueError: if the directory holds other files but no llmq checkpoint, if the configuration
            does not describe the model's layers, or if a scale is not finite.

    Example:
        >>> llmq.save(model, "small")
        >>> tokenizer.save_pretrained("small")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    described = architecture.describe(model)
    entries, aliases, buffers = entries_of(model)
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
        skeleton(description, shapes, sum(math.prod(shape) for shape in shapes.values()))
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} could not be loaded again: {error}") from error
    with replaced(Path(directory), marker=DESCRIPTION, ours=(TENSORS, DESCRIPTION)) as folder:
        description["tensors_sha256"] = tensor_file.write(folder / TENSORS, entries)
        description["tensors_bytes"] = (folder / TENSORS).stat().st_size
        description["sha256"] = digest(description)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def load(directory: str | os.PathLike[str], device: str | torch.device | None = None) -> nn.Module:
    """Load a model that `llmq.save` wrote, in evaluation mode.

    Args:
        directory: where `llmq.save` wrote the model.
        device: the device to load the model to. None loads it to the CPU.

    Returns:
        The model, with the layers, weights and report that it was saved with.

    Raises:
        FileNotFoundError: if the directory holds no checkpoint.
        ValueError: if a file is truncated or altered, if a newer version of llmq wrote it, if
            transformers has no such model class, or if the device cannot be used. The message
            names the file.

    Example:
        >>> model = llmq.load("small")
    """
    _check_device(device)
    folder = Path(directory)
    recover(folder)
    file = folder / DESCRIPTION
    description = read_description(file)
    try:
        size, sha256 = description["tensors_bytes"], description["tensors_sha256"]
        tensors = tensor_file.read(folder / TENSORS, size, sha256)
    except ValueError:
        # Another process may have replaced the directory between the two files.
        if read_description(file)["sha256"] == description["sha256"]:
            raise
        return load(directory, device)
    try:
        model = skeleton(description, {n: list(t.shape) for n, t in tensors.items()}, size)
        fill(model, description, tensors)
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


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_device(device: str | torch.device | None) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise ValueError(f"device {device!r} cannot be used here: {error}") from error


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
