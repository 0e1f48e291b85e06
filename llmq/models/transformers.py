"""What transformers' models say of themselves: output embeddings, routers, layer types."""

from __future__ import annotations

import re
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
