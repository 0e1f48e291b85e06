"""What transformers' models say of themselves: output embeddings, routers, layer types."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

# A router picks experts: a small error changes which ones run, and it is tiny.
_ROUTER = re.compile(r"(^|\.)(router\.classifier|block_sparse_moe\.gate|mlp\.gate|router)$")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes logits, if the model says which one that is."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        return None
    try:
        found = get()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def default_skip(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Return why a layer is left alone unless `skip` is given, None for most."""
    if name.rpartition(".")[2] == "lm_head" or module is output_embeddings(model):
        return "output embedding: skip=() compresses it"
    if isinstance(module, nn.Linear) and _ROUTER.search(name):
        return "router of experts: skip=() compresses it"
    return None


def configs(model: nn.Module) -> list[Any]:
    """Return each distinct configuration object that the model's modules hold."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return list(found.values())


@dataclass(frozen=True)
class Acceleration:
    """Names of the layers that `accelerate` lets run by one op, and why the others do not."""

    joined: tuple[str, ...]
    left_alone: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.joined)} decoder layers run by one op each"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(f"left alone: {len(names)} ({names[0]} …): {reason}")
        return "\n".join(lines)


def accelerate(model: Any) -> Any:
    """Let each decoder layer of a compressed Llama-like model run by one native op, in place.

    For Llama, Mistral, Qwen2, Qwen3 and models built alike, on CPU, with layers of uniform schemes
    (`w8a8`, `w8a8-g64`, `w8a16`, `w4a16`, `w4a8`). Each layer is tried on random tokens first and
    left alone unless it gives what the model's own code gives. Modules, parameters, `state_dict`
    and checkpoints stay as they are; calls with gradients, in training mode, under `torch.compile`,
    with forward hooks inside a layer, or with caches other than `DynamicCache`, run the model's own
    code. Wrap calls in `torch.inference_mode()` (`generate` does). Copies and pickles of the model
    are not accelerated.

        model = accelerate(llmq.quantize(model, scheme="w8a8-g64", skip=()))
        print(model.llmq_acceleration)

    Args:
        model: of transformers; other models, and layers of other kinds, are left alone.

    Returns:
        The model, with `model.llmq_acceleration`, which counts and names what was left alone.
    """
    from llmq.models import decoder_layers

    joined, left_alone = [], {}
    for stack, name, layer in _decoder_layers(model):
        reason = None
        if not decoder_layers.is_one_op(layer):
            reason = decoder_layers.why_not(layer) or decoder_layers.try_out(stack, layer)
        if reason is None:
            joined.append(name)
        else:
            left_alone[name] = reason
    model.llmq_acceleration = Acceleration(tuple(joined), left_alone)
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate` in place; return the model."""
    from llmq.models import decoder_layers

    for _, _, layer in _decoder_layers(model):
        if decoder_layers.is_one_op(layer):
            decoder_layers.part(layer)
    model.__dict__.pop("llmq_acceleration", None)
    return model


def _decoder_layers(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Give (module that holds the list and the rotary embedding, name, layer) of each layer."""
    for prefix, module in list(model.named_modules()):
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and hasattr(module, "rotary_emb"):
            for i, layer in enumerate(layers):
                yield module, f"{prefix}.layers.{i}".lstrip("."), layer
