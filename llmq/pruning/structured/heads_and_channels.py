"""Finds what structured pruning drops: a model's heads and channels, and the layers they touch.

A unit is a head (with grouped queries: a key-value head and its queries) or a channel (with
group-wise quantization: a group of channels).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.models import experts, layouts
from llmq.nn import QuantLinear, dense_weight
from llmq.pruning.structured.slicing import is_linear


@dataclass
class Slice:
    """One layer of a unit's: where it is, and how a unit maps to its rows or columns.

    `offsets` are the first row (or column) of unit 0 in each of the layer's parts, `width` the
    rows of a unit, `step` the rows between neighbours in a unit (2 where gate and up interleave).
    """

    name: str
    layer: nn.Module
    side: str  # "rows" or "columns"
    offsets: list[int]
    width: int
    step: int = 1

    def index(self, units: Tensor) -> Tensor:
        """Return the rows or columns of `units`, in the order in which they stay."""
        inner = torch.arange(self.width) * self.step
        parts = [(o + units[:, None] * self.width * self.step + inner) for o in self.offsets]
        return torch.cat([part.flatten() for part in parts])

    def scores(self, units: int) -> Tensor:
        """Return the sum of squares of each unit's weights, float64 [units]."""
        weight = dense_weight(self.layer).double().square()
        sums = weight.sum(1 if self.side == "rows" else 0)
        return (
            sums[self.index(torch.arange(units)).to(sums.device)]
            .reshape(len(self.offsets), units, self.width)
            .sum(dim=(0, 2))
        )


@dataclass
class PrunableBlock:
    """An attention or an MLP: its units, its layers, and the integers that count them."""

    name: str
    kind: str  # "heads" or "channels"
    units: int
    size: int  # heads or channels before
    slices: list[Slice]
    attributes: dict[str, dict[str, float]]  # by module, attribute: value a unit
    key: str  # blocks with the same key keep the same units
    head_dim: int = 0
    key_value_heads: int = 0
    bias: tuple[str, nn.Module] | None = None
    fused: nn.Module | None = None
    in_config: bool = False
    needs_config: bool = False
    keep: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def find_blocks(
    model: nn.Module, skipped: set[str]
) -> tuple[list[PrunableBlock], set[tuple[str, int]]]:
    """Return what can shrink, and the (kind, size) of what is skipped: configs go on telling it."""
    blocks: list[PrunableBlock] = []
    whole: set[tuple[str, int]] = set()
    for name, module in model.named_modules():
        for attention in layouts.ATTENTION:
            block = _attention(name, module, attention)
            if block is not None:
                blocks.append(block)
                break
        for mlp in layouts.MLP:
            block = _mlp(name, module, mlp)
            if block is not None:
                blocks.append(block)
                break
        if isinstance(module, experts.SplitExperts):
            blocks += split_experts(name, module)
        elif experts.fused_parameters(module) and experts.why_not_split(module) is None:
            blocks.append(_fused_experts(name, module))
    chosen = []
    for block in blocks:
        if block.name in skipped or any(s.name in skipped for s in block.slices):
            if block.needs_config:
                raise ValueError(
                    f"{block.name} counts its heads in the configuration, so that all layers or "
                    f"none lose some; take it out of skip, or skip every attention layer"
                )
            whole.add((block.kind, block.size))
        else:
            chosen.append(block)
    return chosen, whole


def _linear(module: nn.Module, path: str) -> nn.Module | None:
    found = layouts.child(module, path)
    return found if is_linear(found) else None


def _join(name: str, path: str) -> str:
    return f"{name}.{path}" if name and path else name or path


def _counted(
    name: str, module: nn.Module, old: Mapping[tuple[str, ...], int], units: int
) -> dict[str, dict[str, float]]:
    """Return, for the attributes that count what is pruned, their value a unit."""
    found = {
        attribute: value / units
        for attributes, value in old.items()
        for attribute in attributes
        if getattr(module, attribute, None) == value
    }
    return {name: found} if found else {}


def _attention(
    name: str, module: nn.Module, layout: layouts.AttentionLayout
) -> PrunableBlock | None:
    paths = [path for path, _ in layout.projections] + [layout.output]
    layers: dict[str, nn.Module] = {
        path: child for path in paths if (child := _linear(module, path)) is not None
    }
    if len(layers) < len(paths):
        return None
    inner, _, _ = paths[0].rpartition(".")
    owner = layouts.child(module, inner) if inner else module
    assert owner is not None
    sizes = [v for a in layouts.HEAD_DIM if isinstance(v := getattr(owner, a, None), int)]
    if not sizes or any(p is not None for p in owner._parameters.values()):
        return None
    head_dim = sizes[0]
    for norm in layouts.HEAD_NORMS:
        parameters = list(m.parameters()) if (m := owner._modules.get(norm)) is not None else []
        if any(p.numel() != head_dim for p in parameters):
            return None
    width = _features(layers[layout.output], "columns")
    heads = width // head_dim
    path, packed = next((path, kinds) for path, kinds in layout.projections if "k" in kinds)
    queries = width * packed.count("q")
    key_rows = (_features(layers[path], "rows") - queries) // (len(packed) - packed.count("q"))
    key_value_heads = key_rows // head_dim
    if not key_value_heads or heads % key_value_heads or width % head_dim:
        return None
    ratio = heads // key_value_heads
    # Heads whose inputs share a scale in the layer after go together.
    group = _channel_unit(layers[layout.output])
    units = key_value_heads // (group // math.gcd(group, head_dim * ratio))
    slices = []
    for path, k in layout.projections:
        offset = 0
        for letter in k:
            unit = head_dim * (ratio if letter == "q" else 1) * key_value_heads // units
            slices.append(Slice(_join(name, path), layers[path], "rows", [offset], unit))
            offset += unit * units
        if _features(layers[path], "rows") != offset:
            return None
    output = Slice(
        _join(name, layout.output), layers[layout.output], "columns", [0], width // units
    )
    slices.append(output)
    old: Mapping[tuple[str, ...], int] = {
        layouts.HEADS: heads,
        layouts.KEY_VALUE_HEADS: key_value_heads,
        layouts.WIDTH: width,
    }
    bias = None
    if layout.position_bias is not None:
        embedding = owner._modules.get(layout.position_bias)
        bias = (
            None
            if embedding is None
            else (_join(_join(name, inner), layout.position_bias), embedding)
        )
    shared = re.sub(r"\.\d+\.", ".*.", name) if layout.position_bias else name
    return PrunableBlock(
        name,
        "heads",
        units,
        heads,
        slices,
        _counted(_join(name, inner), owner, old, units),
        shared,
        head_dim=head_dim,
        key_value_heads=key_value_heads,
        bias=bias,
        in_config=layout.in_config,
        needs_config=layout.needs_config,
    )


def _features(layer: nn.Module | None, side: str) -> int:
    assert layer is not None
    names = ("out_features", "nf") if side == "rows" else ("in_features", "nx")
    return int(next(getattr(layer, n) for n in names if hasattr(layer, n)))


def _mlp(name: str, module: nn.Module, layout: layouts.MLPLayout) -> PrunableBlock | None:
    paths = [path for path, _ in layout.up] + [layout.down]
    layers = [layouts.child(module, path) for path in paths]
    if not all(is_linear(layer) for layer in layers):
        return None
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.children()):
        return None  # keeps statistics of each channel
    channels = _features(layers[-1], "columns")
    parts = [copies for _, copies in layout.up]
    if any(
        _features(layer, "rows") != channels * copies
        for layer, copies in zip(layers, parts, strict=False)
    ):
        return None
    unit = _channel_unit(layers[-1])
    slices = [
        Slice(_join(name, path), layer, "rows", [i * channels for i in range(copies)], unit)
        for (path, copies), layer in zip(layout.up, layers, strict=False)
        if layer is not None
    ]
    assert layers[-1] is not None
    slices.append(Slice(_join(name, layout.down), layers[-1], "columns", [0], unit))
    units = channels // unit
    attributes = _counted(name, module, {layouts.CHANNELS: channels}, units)
    return PrunableBlock(name, "channels", units, channels, slices, attributes, name)


def _channel_unit(down: nn.Module | None) -> int:
    """Channels that share a scale in the layer after, so that they go together."""
    group = down.scheme.group_size if isinstance(down, QuantLinear) else None
    return 1 if group is None else group


def split_experts(name: str, split: experts.SplitExperts) -> list[PrunableBlock]:
    shell = split.shell
    first: Any = split._modules[split.first]
    down: Any = split._modules["down_proj"]
    blocks = []
    for i, layer in enumerate(down):
        channels, unit = _features(layer, "columns"), _channel_unit(layer)
        up = Slice(f"{name}.{split.first}.{i}", first[i], "rows", *_up_rows(shell, channels, unit))
        output = Slice(f"{name}.down_proj.{i}", layer, "columns", [0], unit)
        units = channels // unit
        attributes = {}
        if i == 0:
            attributes = _counted(f"{name}.shell", shell, {layouts.CHANNELS: channels}, units)
        blocks.append(
            PrunableBlock(
                f"{name}.{i}", "channels", units, channels, [up, output], attributes, f"{name}.{i}"
            )
        )
    return blocks


def _up_rows(shell: nn.Module, channels: int, unit: int) -> tuple[list[int], int, int]:
    """Return offsets, width and step of a unit's rows in an expert's first layer."""
    if not shell.has_gate:
        return [0], unit, 1
    if getattr(shell, "is_concatenated", True):
        return [0, channels], unit, 1
    return [0, 1], unit, 2


def _fused_experts(name: str, module: nn.Module) -> PrunableBlock:
    split = experts.SplitExperts.from_fused(module)
    down: Any = split._modules["down_proj"]
    channels = _features(down[0], "columns")
    attributes = _counted(name, module, {layouts.CHANNELS: channels}, channels)
    return PrunableBlock(name, "channels", channels, channels, [], attributes, name, fused=module)
