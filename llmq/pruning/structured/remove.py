"""Structured pruning: whole attention heads and MLP channels, so that matrices become smaller.

A unit is a head (with grouped queries: a key-value head and its queries) or a channel (with
group-wise quantization: a group of channels). Its score is the L2 norm of the weights that would
go with it (the criterion of Li et al., arXiv:1608.08710), as a share of the matrix that they are
in: its rows in a layer before or its columns in the layer after, whichever share is largest. With
data it is what the unit adds to the outputs of the layer after (`importance.py`). Every layer of a
kind keeps the same number of units, so shapes stay regular.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibrate.folding import Journal
from llmq.calibrate.stages import Call
from llmq.models import experts, layouts
from llmq.models import transformers as hf
from llmq.models.targets import set_attributes
from llmq.nn import QuantLinear, SparseLinear, dense_weight, is_conv1d
from llmq.pruning.structured import importance
from llmq.pruning.structured.heads_and_channels import Block, Slice, find, split_experts
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
        model: whose attention and MLPs are found by the names in `integrations/layouts.py`.
        rate: in [0, 1).
        skipped: names of layers to leave alone; an attention or MLP with one of them stays whole.
        calls: of the model, whose activations then tell what matters (`importance.py`).
        refit: whether the layers after what goes are fitted to the outputs that they had.

    Returns:
        What changed, by layer name, and a line that tells how many units stayed.

    Raises:
        ValueError: if nothing is found, or a layer cannot be sliced. The model is as it was.
    """
    blocks, whole = find(model, skipped)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no attention or MLP whose layers are named as in BERT-, "
            f'GPT-2-, Llama-, T5-, OPT- or Mixtral-like models; use pattern="unstructured"'
        )
    if rate == 0:
        return {}, ""
    known = {} if calls is None else importance.scores(model, blocks, calls)
    _choose(blocks, rate, known)
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


def _names(block: Block) -> list[str]:
    """Return the names that what is in a block is scored by."""
    if block.fused is None:
        return [block.name]
    return [f"{block.name}.{i}" for i in range(block.fused.get_parameter("down_proj").shape[0])]


def _shrink(
    model: nn.Module,
    blocks: list[Block],
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
    config_values = _config_values(model, blocks, whole)
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
    for config, values in config_values:
        for attribute, value in values.items():
            setattr(config, attribute, value)
    return changes


# -- choosing and slicing --------------------------------------------------------------------------


def _choose(blocks: list[Block], rate: float, known: dict[str, Tensor]) -> None:
    """Set `keep` of each block: as many units in all blocks of a kind and size.

    Their scores are those `known`, by block name, else of their weights.
    """
    by_size: dict[tuple[str, int], list[Block]] = {}
    for block in blocks:
        by_size.setdefault((block.kind, block.size), []).append(block)
    for (kind, size), same in by_size.items():
        step = 1 if kind == "heads" else _channel_step(size)
        step = math.lcm(step, *(b.size // b.units * _activation_step(b) for b in same))
        keep = max(step, math.floor(size * (1 - rate) / step + 0.5) * step)
        scores: dict[str, Tensor] = {}
        for block in same:
            score = known[block.name] if block.name in known else _score(block)
            scores[block.key] = scores.get(block.key, 0) + score  # type: ignore[assignment]
        for block in same:
            count = min(block.units, keep // (block.size // block.units))
            block.keep = scores[block.key].topk(count).indices.sort().values.cpu()


def _channel_step(channels: int) -> int:
    """Channels stay in multiples of this, so that groups and kernels still fit them."""
    step = 64
    while channels % step or channels // step < 8:
        if step == 1:
            break
        step //= 2
    return step


def _activation_step(block: Block) -> int:
    """Units that share an activation scale in the layer after."""
    if block.fused is not None:
        return 1
    layer = block.slices[-1].layer
    scheme = layer.scheme if isinstance(layer, (QuantLinear, SparseLinear)) else None
    group = None if scheme is None else scheme.activation_group_size
    unit = block.slices[-1].width
    return 1 if group is None else group // math.gcd(group, unit)


def _score(block: Block) -> Tensor:
    """Return each unit's largest share of the squared norm of one of its matrices, float64."""
    if block.fused is not None:
        # Experts kept as one parameter keep as many channels each, but each its own: scored apart.
        return torch.zeros(block.units, dtype=torch.float64)
    shares = []
    for part in block.slices:
        norms = part.scores(block.units).cpu()
        shares.append(norms / norms.sum().clamp_min(1e-30))
    # Not the sum over matrices: what is small on average may be all that drives one of them.
    # SmolLM2-135M, 10 % of its channels: perplexity 4909 by the sum, 755 by the largest.
    return torch.stack(shares).amax(0)


def _kept(block: Block) -> Tensor:
    """Return the heads or channels that stay, int64."""
    return Slice("", nn.Identity(), "columns", [0], block.size // block.units).index(block.keep)


def _merged(block: Block) -> list[tuple[str, str, nn.Module, Tensor]]:
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
    block: Block, known: dict[str, Tensor]
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    module = block.fused
    assert module is not None
    split = experts.SplitExperts.from_fused(module)
    kept: dict[str, list[Tensor]] = {}
    biases: list[Tensor] = []
    for inner in split_experts(block.name, split):
        score = known[inner.name] if inner.name in known else _score(inner)
        inner.keep = score.topk(len(block.keep)).indices.sort().values
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


# -- configurations --------------------------------------------------------------------------------


def _config_values(
    model: nn.Module, blocks: list[Block], whole: set[tuple[str, int]]
) -> list[tuple[Any, dict[str, int]]]:
    """Return what the model's configurations must say now, where they can say it.

    A head count is told only where the size of a head has a field of its own and the
    configuration finds the new count valid; else the modules' own integers tell it.
    """
    channels = {
        block.size: len(block.keep) * (block.size // block.units)
        for block in blocks
        if block.kind == "channels" and ("channels", block.size) not in whole
    }
    heads = [block for block in blocks if block.kind == "heads"]
    told = heads and all(block.in_config for block in heads)
    told = told and not any(kind == "heads" for kind, _ in whole)
    result = []
    for config in hf.configs(model):
        values = {}
        for attribute in layouts.CONFIG_CHANNELS:
            value = getattr(config, attribute, None)
            if attribute == "n_inner" and hasattr(config, attribute) and value is None:
                value = 4 * config.hidden_size  # GPT-2's default
            if value in channels:
                values[attribute] = channels[value]
        if told and getattr(config, "num_attention_heads", None) == heads[0].size:
            first = heads[0]
            count = {"num_attention_heads": len(first.keep) * (first.size // first.units)}
            if hasattr(config, "num_key_value_heads"):
                count["num_key_value_heads"] = (
                    len(first.keep) * first.key_value_heads // first.units
                )
            if not hasattr(config, "d_kv"):
                count["head_dim"] = first.head_dim
            if _is_valid(config, values | count):
                values |= count
            elif first.needs_config:
                raise ValueError(
                    f"{type(config).__name__} does not take {count}; choose another pruning_rate, "
                    f"or name the attention layers in skip"
                )
        result.append((config, values))
    return result


def _is_valid(config: Any, values: dict[str, int]) -> bool:
    trial = copy.deepcopy(config)
    try:
        for attribute, value in values.items():
            setattr(trial, attribute, value)
        if hasattr(trial, "validate"):
            trial.validate()
    except Exception:
        return False
    return True


def _summary(blocks: list[Block]) -> str:
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
