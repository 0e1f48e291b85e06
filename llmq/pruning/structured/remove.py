"""Structured pruning: whole attention heads and MLP channels, so that matrices become smaller.

A unit is a head (with grouped queries: a key-value head and its queries) or a channel (with
group-wise quantization: a group of channels). Its score is the L2 norm of the weights that would
go with it (the criterion of Li et al., arXiv:1608.08710), as a share of the matrix that they are
in: its rows in a layer before or its columns in the layer after, whichever share is largest. With
data it is what the unit adds to the outputs of the layer after (`importance.py`). Every layer of a
kind keeps the same number of units, so shapes stay regular.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibrate.folding import Journal
from llmq.calibrate.stages import Call
from llmq.models import experts
from llmq.models.targets import set_attributes
from llmq.nn import QuantLinear, SparseLinear, dense_weight, is_conv1d
from llmq.pruning.structured import importance
from llmq.pruning.structured.choose_units import choose, score
from llmq.pruning.structured.config_sizes import config_values
from llmq.pruning.structured.heads_and_channels import (
    PrunableBlock,
    Slice,
    find_blocks,
    split_experts,
)
from llmq.pruning.structured.slicing import select, take
from llmq.report import Change, few


def prune(
    model: nn.Module,
    rate: float,
    skipped: set[str],
    calls: list[Call] | None = None,
    *,
    refit: bool = False,
) -> tuple[dict[str, Change], str]:
    """Drop the share `rate` of the heads and MLP channels of `model`, in place.

    Args:
        model: whose attention and MLPs are found by the names in `llmq/models/layouts.py`.
        rate: in [0, 1).
        skipped: names of layers to leave alone; an attention or MLP with one of them stays whole.
        calls: of the model, whose activations then tell what matters (`importance.py`).
        refit: whether the layers after what goes are fitted to the outputs that they had.

    Returns:
        What changed, by layer name, and a line that tells how many units stayed.

    Raises:
        ValueError: if nothing is found, or a layer cannot be sliced. The model is as it was.
    """
    blocks, whole = find_blocks(model, skipped)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no attention or MLP whose layers are named as in BERT-, "
            f'GPT-2-, Llama-, T5-, OPT- or Mixtral-like models; use pattern="unstructured"'
        )
    if rate == 0:
        return {}, ""
    known = {} if calls is None else importance.scores(model, blocks, calls)
    choose(blocks, rate, known)
    journal, errors = Journal(), {}
    try:
        if refit and calls is not None:
            errors = importance.refit(model, blocks, calls, journal)
        changes = _shrink(model, blocks, whole, known)
    except BaseException:
        journal.undo()
        raise
    for name, error in errors.items():
        changes[name] = changes[name]._replace(weight_error=error)
    choice = _summary(blocks)
    if calls is not None:
        choice += f"; scored on {len(calls)} batches" + (", layers after refitted" * refit)
        fused = [block.name for block in blocks if block.fused is not None]
        if refit and fused:
            choice += f"\nnot refitted, as experts are one parameter: {few(fused)}"
        unscored = [name for block in blocks for name in _names(block) if name not in known]
        if unscored:
            choice += f"\nby magnitude, as no data reached them: {few(unscored)}"
    return changes, choice


def _names(block: PrunableBlock) -> list[str]:
    """Return the names that what is in a block is scored by."""
    if block.fused is None:
        return [block.name]
    return [f"{block.name}.{i}" for i in range(block.fused.get_parameter("down_proj").shape[0])]


def _shrink(
    model: nn.Module,
    blocks: list[PrunableBlock],
    whole: set[tuple[str, int]],
    known: dict[str, Tensor],
) -> dict[str, Change]:
    """Take out what `keep` of each block leaves; all that can fail comes first."""
    changes: dict[str, Change] = {}
    replacements: list[tuple[str, nn.Module]] = []
    parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
    for block in blocks:
        if block.fused is not None:
            sliced = _slice_fused(block, known)
            parameters += sliced
            changes[block.name] = _fused_change(block.fused, [p for _, _, p in sliced])
            continue
        for name, side, layer, index in _merged(block):
            rows, columns = (index, None) if side == "rows" else (None, index)
            new = take(name, layer, rows=rows, columns=columns)
            replacements.append((name, new))
            changes[name] = _change(layer, new)
        if block.bias is not None:
            parameters += _slice_bias(block.bias[1], _kept(block))
    configs = config_values(model, blocks, whole)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    # From here on nothing can fail.
    for name, layer in replacements:
        for parent, attribute in places[id(model.get_submodule(name))]:
            setattr(parent, attribute, layer)
        if not isinstance(layer, (QuantLinear, SparseLinear)):
            sizes = ("nx", "nf") if is_conv1d(layer) else ("in_features", "out_features")
            set_attributes(model, name, {size: getattr(layer, size) for size in sizes})
    for module, attribute, parameter in parameters:
        module._parameters[attribute] = parameter
    for block in blocks:
        if block.bias is not None:
            set_attributes(model, block.bias[0], {"embedding_dim": len(_kept(block))})
        for name, attributes in block.attributes.items():
            count = len(block.keep)
            values = {a: round(per_unit * count) for a, per_unit in attributes.items()}
            set_attributes(model, name, values)
    for config, values in configs:
        for attribute, value in values.items():
            setattr(config, attribute, value)
    return changes


def _kept(block: PrunableBlock) -> Tensor:
    """Return the heads or channels that stay, int64."""
    return Slice("", nn.Identity(), "columns", [0], block.size // block.units).index(block.keep)


def _merged(block: PrunableBlock) -> list[tuple[str, str, nn.Module, Tensor]]:
    """Return name, side, layer and kept rows or columns of each layer, fused q, k, v in one."""
    merged: dict[tuple[str, str], tuple[nn.Module, list[Tensor]]] = {}
    for part in block.slices:
        entry = merged.setdefault((part.name, part.side), (part.layer, []))
        entry[1].append(part.index(block.keep))
    return [
        (name, side, layer, torch.cat(index).sort().values.to(next(layer.parameters()).device))
        for (name, side), (layer, index) in merged.items()
    ]


def _slice_fused(
    block: PrunableBlock, known: dict[str, Tensor]
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    module = block.fused
    assert module is not None
    split = experts.SplitExperts.from_fused(module)
    kept: dict[str, list[Tensor]] = {}
    biases: list[Tensor] = []
    for inner in split_experts(block.name, split):
        shares = known[inner.name] if inner.name in known else score(inner)
        inner.keep = shares.topk(len(block.keep)).indices.sort().values
        for name, side, layer, index in _merged(inner):
            attribute = name.split(".")[-2]
            rows, columns = (index, None) if side == "rows" else (None, index)
            new: Any = take(name, layer, rows=rows, columns=columns)
            kept.setdefault(attribute, []).append(new.weight.detach())
            if new.bias is not None and side == "rows":
                biases.append(new.bias.detach())
    result = []
    for attribute, weights in kept.items():
        stacked = torch.stack([w.T if module.is_transposed else w for w in weights]).contiguous()
        old = module._parameters[attribute]
        assert old is not None
        result.append((module, attribute, nn.Parameter(stacked, old.requires_grad)))
        if biases and attribute == split.first:
            bias = nn.Parameter(torch.stack(biases), old.requires_grad)
            result.append((module, f"{attribute}_bias", bias))
    return result


def _slice_bias(embedding: nn.Module, keep: Tensor) -> list[tuple[nn.Module, str, nn.Parameter]]:
    weight = embedding._parameters["weight"]
    assert weight is not None
    taken = select(weight.detach(), None, keep.to(weight.device))
    return [(embedding, "weight", nn.Parameter(taken, weight.requires_grad))]


def _fused_change(experts_module: nn.Module, after: list[nn.Parameter]) -> Change:
    before = [p for p in experts_module._parameters.values() if p is not None]
    size = sum(p.numel() * p.element_size() for p in before)
    shape = list(experts_module.get_parameter("down_proj").shape)
    return Change("experts", _lost(before, after), size, shape)


def _lost(before: list[Any], after: list[Any]) -> float:
    """Return ‖what is gone‖ / ‖before‖ where `after` is a part of `before`."""
    total, left = (
        sum(float(t.detach().double().square().sum()) for t in ts) for ts in (before, after)
    )
    return math.sqrt(max(0.0, 1 - left / total)) if total else 0.0


def _change(before: nn.Module, after: nn.Module) -> Change:
    old, new = dense_weight(before), dense_weight(after)
    size = sum(p.numel() * p.element_size() for p in before.parameters())
    if isinstance(before, (QuantLinear, SparseLinear)):
        size = before.bytes()
    return Change(type(before).__name__, _lost([old], [new]), size, list(old.shape))


def _summary(blocks: list[PrunableBlock]) -> str:
    counts: dict[tuple[str, int, int], int] = {}
    for block in blocks:
        left = len(block.keep) * (block.size // block.units)
        key = (block.kind, block.size, left)
        counts[key] = counts.get(key, 0) + 1
    parts = [
        f"{kind} {size} -> {left} in {count} {'attention' if kind == 'heads' else 'MLP'} "
        f"layer{'s' if count > 1 else ''}"
        for (kind, size, left), count in counts.items()
    ]
    return "structured: " + ", ".join(parts)
