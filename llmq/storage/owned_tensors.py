"""Which tensors a checkpoint holds: each once, and compressed layers in their canonical layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from llmq.nn import CompressedLayer
from llmq.storage import tensor_file

# Buffers that a class leaves out of its state dict are made again by the class, but small ones are
# kept too: `.half().float()` and the like leave them with other values than the class gives them.
_SMALL_BUFFER = 1 << 16  # bytes


class OwnedTensor(NamedTuple):
    """A tensor of a checkpoint: its name, its value now, and what tells it from all others."""

    name: str
    tensor: Tensor
    identity: object
    get: Any
    buffer: bool = False


def owned_tensors(model: nn.Module) -> Iterator[OwnedTensor]:
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
                yield OwnedTensor(dot + name, tensor, identity, get)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = parameter.detach()
                yield OwnedTensor(dot + name, value, id(parameter), value.detach)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                hidden = name in module._non_persistent_buffers_set
                yield OwnedTensor(dot + name, buffer, id(buffer), buffer.detach, hidden)


class _Canonical(NamedTuple):
    """Makes a canonical tensor again when it is written, so that one is in memory at a time."""

    layer: CompressedLayer
    name: str

    def __call__(self) -> Tensor:
        return self.layer.canonical()[self.name]


def entries_of(
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
    for owned in owned_tensors(model):
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
