"""A student: the same model with fewer layers, which then learns from the whole one.

    student = make_student(teacher, layers=15, data=windows)
    llmq.fine_tune(student, windows, teacher=teacher, hidden_weight=1.0)

Narrower ones are made by `llmq.prune(…, pattern="structured")`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.algorithms.blockwise import still
from llmq.algorithms.calibration import stages
from llmq.calibrate import calls_of
from llmq.integrations.transformers import configs

# What configurations call the number of layers of one kind.
_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers"),
)


def make_student(model: nn.Module, layers: int, *, data: Any = None) -> nn.Module:
    """Return a copy of `model` with `layers` of its layers, encoder and decoder each.

    The first layer always stays. Without data the others are taken evenly, the last among them, as
    DistilBERT did (Sanh et al., arXiv:1910.01108). With data those go that change their input
    least: of least block influence 1 − E cos(h, f(h)) (Men et al., ShortGPT, arXiv:2403.03853,
    equation 1).

    Args:
        model: a transformers model; stays as it is.
        layers: 1 or more, fewer than there are.
        data: as `llmq.quantize` takes it.

    Raises:
        TypeError: if `layers` is no integer.
        ValueError: if the model has no list of layers that its configuration counts, or not more
            than `layers`.
    """
    if isinstance(layers, bool) or not isinstance(layers, int):
        raise TypeError(f"layers must be an integer, got {layers!r}")
    found = _lists(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of layers that its configuration counts"
        )
    for name, blocks in found.items():
        if not 1 <= layers < len(blocks):
            raise ValueError(
                f"layers must be 1 … {len(blocks) - 1}, fewer than {name} has, got {layers}"
            )
    influence = {} if data is None else influences(model, data)
    kept = {name: _chosen(name, len(blocks), layers, influence) for name, blocks in found.items()}
    # The copy must not copy what goes.
    gone: dict[int, Any] = {}
    for name, blocks in found.items():
        gone |= {id(block): None for i, block in enumerate(blocks) if i not in kept[name]}
    student = copy.deepcopy(model, gone)
    sizes = {len(blocks) for blocks in found.values()}
    for name, indices in kept.items():
        stays = [student.get_submodule(f"{name}.{i}") for i in indices]
        for i, block in enumerate(stays):
            for module in block.modules():
                if type(getattr(module, "layer_idx", None)) is int:  # its place in a cache
                    module.layer_idx = i  # type: ignore[assignment]
        parent, _, attribute = name.rpartition(".")
        setattr(student.get_submodule(parent), attribute, nn.ModuleList(stays))
    first = next(iter(kept.values()))
    for config in configs(student):
        for attribute in _COUNTS:
            if getattr(config, attribute, None) in sizes:
                setattr(config, attribute, layers)
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and len(kinds) in sizes:
            config.layer_types = [kinds[i] for i in first]
    return student


def influences(model: nn.Module, data: Any) -> dict[str, float]:
    """Return by how much each block changes its input: 1 − mean cos(h, f(h)), by name."""
    found: dict[str, float] = {}
    with still(model):
        for stage in stages(model, calls_of(model, data), "student"):
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


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    counts = {getattr(config, name, None) for config in configs(model) for name in _COUNTS}
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) in counts and not inside:
            found[name] = module
    return found


def _chosen(name: str, count: int, layers: int, influence: dict[str, float]) -> list[int]:
    if not influence:
        step = (count - 1) / max(layers - 1, 1)
        return [math.floor(i * step + 0.5) for i in range(layers)]
    scores = torch.tensor([influence.get(f"{name}.{i}", math.inf) for i in range(1, count)])
    best: Tensor = scores.topk(layers - 1).indices + 1
    return [0, *sorted(best.tolist())]
