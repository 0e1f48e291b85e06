"""Finds the layers of a model that a verb may change, says why others stay, and swaps them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmq.models import experts
from llmq.models import transformers as hf
from llmq.nn import CompressedLayer, LowRankLinear, QuantEmbedding, embedding_factor, is_conv1d

Places = list[tuple[nn.Module, str]]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Target:
    """A layer that a verb may replace: its first `name`, its `kind`, and everywhere it stands."""

    name: str
    module: nn.Module
    kind: str
    places: Places

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.module, (nn.Embedding, QuantEmbedding))


@dataclass
class Found:
    """The layers that a verb may change, and the reason for each that it may not.

    `groups` holds layers that share one weight tensor together; `splits` maps fused experts to
    the layers they become, which are not in the model yet.
    """

    groups: list[list[Target]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    splits: list[tuple[str, Places, experts.SplitExperts]] = field(default_factory=list)


def matches(name: str, pattern: str) -> bool:
    """Whether a skip pattern names the module `name` or something that it is part of.

    A pattern is one or more whole dotted parts, anywhere in the name (`"lm_head"`, `"layers.0"`,
    `"mlp.down_proj"`), or, with `*`, `?` or `[`, a shell pattern for the whole name.
    """
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def find(model: nn.Module, skip: tuple[str, ...] | None, *, embeddings: bool) -> Found:
    """List what a verb may change in `model`, without changing anything.

    Args:
        model: any module that contains linear layers.
        skip: name patterns (`matches`); None leaves output embeddings and routers alone.
        embeddings: whether the verb can change an embedding (with `skip=()`, or where a linear
            layer that is changed shares its tensor).

    Raises:
        TypeError: if `model` is no module or `skip` no tuple of strings.
        ValueError: if the model is itself a single layer, which cannot be replaced in place, or a
            pattern in `skip` matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if skip is not None and not (
        isinstance(skip, (tuple, list)) and all(isinstance(s, str) for s in skip)
    ):
        raise TypeError(f"skip must be a tuple of name patterns, got {skip!r}")
    if isinstance(model, CompressedLayer) or _kind(model)[0] is not None:
        raise ValueError(
            f"the model is itself one {type(model).__name__}, which cannot be replaced in place; "
            f"use llmq.QuantLinear.from_linear, or put it in a torch.nn.Sequential"
        )
    found = Found()
    targets: list[Target] = []
    owners: dict[int, list[str]] = {}
    all_places = _places(model)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
        kind, reason = _kind(module)
        if experts.fused_parameters(module):
            reason = _skipped(model, name, module, skip) or experts.why_not_split(module)
            if reason is None:
                split = experts.SplitExperts.from_fused(module)
                found.splits.append((name, all_places[id(module)], split))
                targets += _expert_targets(name, split)
        if reason is not None:
            found.reasons[name] = reason
        elif kind is not None:
            targets.append(Target(name, module, kind, all_places[id(module)]))
    _check_skip(skip or (), {n for n, _ in model.named_modules() if n} | {t.name for t in targets})
    by_weight: dict[int, list[Target]] = {}
    for target in targets:
        weight = target.module._parameters.get("weight")
        by_weight.setdefault(id(weight if weight is not None else target), []).append(target)
    for key, group in by_weight.items():
        reason = _group_reason(model, group, owners.get(key, []), skip, embeddings)
        if reason is None:
            # An embedding comes first: it makes the tensor that a tied linear layer shares.
            found.groups.append(sorted(group, key=lambda t: not t.is_embedding))
        else:
            found.reasons.update({target.name: reason for target in group})
    for name, _, split in found.splits:
        inside = [f"{name}.{path}" for path, m in split.named_modules() if type(m) is nn.Linear]
        if all(path in found.reasons for path in inside):
            found.reasons[name] = found.reasons[inside[0]]
    return found


def _check_skip(skip: tuple[str, ...], names: set[str]) -> None:
    """Raise `ValueError` if a pattern matches none of a model's modules."""
    for pattern in skip:
        if any(matches(name, pattern) for name in names):
            continue
        known = {known for name in names for known in (name, *name.split("."))}
        near = difflib.get_close_matches(pattern, sorted(known), n=3)
        meant = f"did you mean {' or '.join(map(repr, near))}?" if near else "name another"
        longest = max(sorted(names), key=lambda name: name.count("."))
        raise ValueError(
            f"skip: {pattern!r} matches no layer of the model; {meant} (a pattern is one or more "
            f"whole parts of a name such as {longest!r}, or a shell pattern for the whole name)"
        )


def _places(model: nn.Module) -> dict[int, Places]:
    places: dict[int, Places] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, attribute))
    return places


def _kind(module: nn.Module) -> tuple[str | None, str | None]:
    """Return what `module` is to a verb, or why it is left alone although it holds a matrix."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None, "torch.nn.MultiheadAttention reads this weight itself"
    if isinstance(module, nn.MultiheadAttention):
        return None, "torch.nn.MultiheadAttention keeps q, k and v in one parameter"
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return None, f"{type(module).__name__} has a forward of its own"
        return "Linear", None
    if isinstance(module, nn.Embedding):
        if embedding_factor(module) is None:
            return None, f"{type(module).__name__} has a forward of its own"
        return "Embedding", None
    if is_conv1d(module):
        return "Conv1D", None
    if isinstance(module, CompressedLayer):
        return type(module).__name__, None
    return None, None


def _expert_targets(name: str, split: experts.SplitExperts) -> list[Target]:
    targets = []
    for attribute in (split.first, "down_proj"):
        linears = getattr(split, attribute)
        for i, linear in enumerate(linears):
            full = f"{name}.{attribute}.{i}"
            targets.append(Target(full, linear, "expert", [(linears, str(i))]))
    return targets


def _skipped(
    model: nn.Module, name: str, module: nn.Module, skip: tuple[str, ...] | None
) -> str | None:
    if skip is None:
        return hf.default_skip(model, name, module)
    for pattern in skip:
        if matches(name, pattern):
            return f"skip={pattern!r}"
    return None


def _group_reason(
    model: nn.Module,
    group: list[Target],
    owners: list[str],
    skip: tuple[str, ...] | None,
    embeddings: bool,
) -> str | None:
    """Return why the layers that share one weight are all left alone, None if they are not."""
    for target in group:
        reason = _skipped(model, target.name, target.module, skip)
        if reason is not None:
            return reason if len(group) == 1 else f"{reason} (weight of {target.name})"
    names = {target.name for target in group}
    for owner in owners:
        if owner not in names:
            return f"shares its tensor with {owner}, which cannot be compressed"
    if not any(target.is_embedding for target in group):
        return None
    if not embeddings:
        tied = "an embedding's rows are looked up"
        return f"{tied}: no sparse form" if len(group) == 1 else f"tied to an embedding: {tied}"
    if len(group) == 1 and isinstance(group[0].module, nn.Embedding):
        if skip is None or len(skip):
            return "embedding: skip=() compresses it"
        if group[0].module.embedding_dim < 32:
            return "embedding with rows too short to gain from a scale each"
        if group[0].module.max_norm is not None:
            return "embedding with max_norm changes its weight as it runs"
    return None


def check_weight(name: str, weight: Tensor) -> None:
    """Raise `ValueError` if the float weight of layer `name` cannot be compressed."""
    if weight.is_meta:
        raise ValueError(f"{name}: weight is on the meta device; load the model's weights first")
    if weight.dtype not in _FLOATS:
        raise ValueError(
            f"{name}: weight is {weight.dtype}; expected float32, bfloat16 or float16 "
            f"(model.float() converts)"
        )
    if not bool(torch.isfinite(weight).all()):
        bad = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise ValueError(f"{name}: weight has NaN or infinite values, the first at {bad}")


def swap(model: nn.Module, found: Found, replacements: Iterable[tuple[Target, nn.Module]]) -> None:
    """Put new layers in their places: the only step that changes the model, and it cannot fail."""
    done = list(replacements)
    changed = {target.name for target, _ in done}
    for name, places, split in found.splits:
        if any(t.startswith(f"{name}.") for t in changed):
            for parent, attribute in places:
                setattr(parent, attribute, split)
    for target, layer in done:
        for parent, attribute in target.places:
            setattr(parent, attribute, layer)
    for name, _, split in found.splits:
        if any(t.startswith(f"{name}.") for t in changed):
            for module in split.modules():
                if type(module) is nn.Linear:
                    experts.own_weights(module)
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, (CompressedLayer, LowRankLinear)) for child in module.children()
        ):
            # Its fused path would read the codes of linear1 and linear2 as if they were weights.
            set_attributes(model, name, {"activation_relu_or_gelu": 0})


def set_attributes(model: nn.Module, name: str, attributes: dict[str, int]) -> None:
    """Set integers of module `name`, and note them in `model.llmq_module_attributes` for saving."""
    module = model.get_submodule(name)
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    kept: dict[str, dict[str, int]] = dict(getattr(model, "llmq_module_attributes", {}))
    kept[name] = {**kept.get(name, {}), **attributes}
    model.llmq_module_attributes = kept  # type: ignore[assignment]
