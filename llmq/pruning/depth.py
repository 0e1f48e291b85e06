"""Whole layers: which ones hardly change what passes through them, and a model without some.

A block's influence is 1 − E cos(h, f(h)), with h what it reads and f(h) what it gives at each token
(Men et al., "ShortGPT: Layers in large language models are more redundant than you expect",
arXiv:2403.03853, equation 1). The first block of a list always stays: T5's holds what all read.
SmolLM2-135M without 3 of its 30: perplexity 21.7 by influence, 33.1 evenly, 2818 the last (whole:
14.7; `benchmarks/algorithms.py`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llmq.calibrate.blockwise import still
from llmq.calibrate.stages import Call, stages
from llmq.models.accelerate import restore
from llmq.models.targets import matches
from llmq.models.transformers import configs
from llmq.report import ModelReport

# What configurations call the number of layers of one kind.
_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers"),
)
# Lists in configurations with an entry a layer, and lists of layers' indices.
_ENTRIES = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
_INDICES = ("mlp_only_layers", "moe_layers", "cross_attention_layers")


def prune(model: nn.Module, rate: float, skip: tuple[str, ...], calls: list[Call]) -> str:
    """Drop the share `rate` of the blocks of each list, those of least influence, in place.

    Args:
        model: whose lists of blocks its configurations count.
        rate: in [0, 1); the number that stays is rounded, and one at least.
        skip: name patterns of blocks that stay.
        calls: of the model.

    Returns:
        A line that tells which blocks are gone, and their influence.

    Raises:
        ValueError: if the model has no such lists, or more is to stay than the rate leaves. The
            model is as it was.
    """
    found = lists(model)
    influence = influences(model, calls)
    kept: dict[str, list[int]] = {}
    parts = []
    for name, blocks in found.items():
        count = len(blocks)
        layers = max(1, math.floor(count * (1 - rate) + 0.5))
        stay = {i for i in range(count) if any(matches(f"{name}.{i}", s) for s in skip)}
        if len(stay | {0}) > layers:
            raise ValueError(
                f"{name}: rate {rate} leaves {layers} of {count} blocks, but the first and those "
                f"in skip are {len(stay | {0})}; skip fewer, or lower the rate"
            )
        ranks = influence | {f"{name}.{i}": math.inf for i in stay}
        kept[name] = chosen(name, count, layers, ranks)
        gone = [i for i in range(count) if i not in kept[name]]
        told = ", ".join(f"{i} ({influence[f'{name}.{i}']:.3f})" for i in gone)
        parts.append(f"{name} {count} -> {layers}" + (f", without {told}" if gone else ""))
    keep(model, kept)
    return "layers: " + "; ".join(parts)


def lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the model's lists of layers by name: those whose length a configuration tells.

    Raises:
        ValueError: if there is none, or a layer's place is part of what it computes.
    """
    if any(getattr(config, "scale_attn_by_inverse_layer_idx", False) for config in configs(model)):
        raise ValueError(
            f"{type(model).__name__} divides attention by a layer's place "
            f"(scale_attn_by_inverse_layer_idx), which would change if others went"
        )
    counts = {getattr(config, name, None) for config in configs(model) for name in _COUNTS}
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) in counts and not inside:
            found[name] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of layers that its configuration counts"
        )
    return found


def influences(model: nn.Module, calls: list[Call]) -> dict[str, float]:
    """Return by how much each block changes its input: 1 − mean cos(h, f(h)), by name."""
    found: dict[str, float] = {}
    with still(model):
        for stage in stages(model, calls, "influence"):
            if not stage.name:
                continue
            total, rows = 0.0, 0
            for call, output in zip(stage.calls, stage.run(), strict=True):
                before = call[0][0] if call[0] else next(iter(call[1].values()))
                after = output[0] if isinstance(output, tuple) else output
                cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
                total, rows = total + float(cosine.double().sum()), rows + cosine.numel()
            found[stage.name] = 1 - total / rows
    return found


def chosen(name: str, count: int, layers: int, influence: dict[str, float]) -> list[int]:
    """Return which `layers` of the `count` blocks of list `name` stay: those of most influence.

    Raises:
        ValueError: naming a block whose influence is not known.
    """
    missing = [f"{name}.{i}" for i in range(count) if f"{name}.{i}" not in influence]
    if missing:
        raise ValueError(f"the data must run {missing[0]} once a batch; give batches that do")
    scores = torch.tensor([influence[f"{name}.{i}"] for i in range(1, count)], dtype=torch.float64)
    ranked = scores.argsort(descending=True, stable=True) + 1
    return [0, *sorted(ranked[: layers - 1].tolist())]


def keep(model: nn.Module, kept: dict[str, list[int]]) -> None:
    """Leave the blocks of these indices in the lists of these names, in place.

    Configurations, places in caches, and what llmq notes of modules by name follow. Lists of one
    length keep as many each. What `accelerate` did is undone: it knew each layer's place.
    """
    if hasattr(model, "llmq_acceleration"):
        restore(model)
    renamed: dict[str, str | None] = {}  # blocks, as they are called until now; None for gone
    counts: dict[int, int] = {}
    entries: list[tuple[Any, str, Any]] = []
    for name, indices in kept.items():
        count = len(model.get_submodule(name)._modules)
        counts[count] = len(indices)
        renamed |= {f"{name}.{i}": None for i in range(count)}
        renamed |= {f"{name}.{i}": f"{name}.{new}" for new, i in enumerate(indices)}
        config = _config_of(model, name)
        for attribute in _ENTRIES:
            given = getattr(config, attribute, None)
            if isinstance(given, (list, tuple)) and len(given) == count:
                entries.append((config, attribute, [given[i] for i in indices]))
        for attribute in _INDICES:
            given = getattr(config, attribute, None)
            if isinstance(given, (list, tuple)):
                left = [new for new, i in enumerate(indices) if i in given]
                entries.append((config, attribute, left))
    # All are read before any is set: some are other names of one field.
    entries += [
        (config, attribute, counts[value])
        for config in configs(model)
        for attribute in _COUNTS
        if (value := getattr(config, attribute, None)) in counts
    ]
    for config, attribute, value in entries:
        setattr(config, attribute, value)
    for name, indices in kept.items():
        stays = [model.get_submodule(f"{name}.{i}") for i in indices]
        for i, block in enumerate(stays):
            for module in block.modules():
                if type(getattr(module, "layer_idx", None)) is int:  # its place in a cache
                    module.layer_idx = i  # type: ignore[assignment]
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.ModuleList(stays))
    _rename(model, renamed)


def _config_of(model: nn.Module, name: str) -> Any:
    """Return the configuration of the innermost module around `name` that has one."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            return config
    return None


def _rename(model: Any, renamed: dict[str, str | None]) -> None:
    """Call layers by their new names in the model's report and attributes; forget those gone."""

    def after(name: str) -> str | None:
        for old, new in renamed.items():
            if f"{name}.".startswith(f"{old}."):
                return None if new is None else new + name[len(old) :]
        return name

    report: ModelReport | None = getattr(model, "llmq_report", None)
    if report is not None:
        layers = [replace(r, name=new) for r in report.layers if (new := after(r.name)) is not None]
        model.llmq_report = replace(report, layers=layers)
    noted: dict[str, Any] = getattr(model, "llmq_module_attributes", {})
    if noted:
        left = {new: v for name, v in noted.items() if (new := after(name)) is not None}
        model.llmq_module_attributes = left
