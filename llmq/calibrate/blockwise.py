"""Compresses a model block by block, each for the inputs that the blocks before give it by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from llmq.calibrate import kept_blocks
from llmq.calibrate.folding import Journal
from llmq.calibrate.stages import Call, Stage, stages
from llmq.calibrate.statistics import Statistics, gather
from llmq.models import transformers as hf
from llmq.models.targets import Found, Target
from llmq.nn import CompressedLayer, dense_weight
from llmq.report import relative_error
from llmq.storage.resume import Store


class InputScaling(Protocol):
    """Scales the inputs of a block's layers before they are converted: SmoothQuant, AWQ."""

    journal: Journal
    folded: list[str]  # names of the layers whose inputs could be scaled

    def prepare(
        self, stage: Stage, groups: list[list[Target]], statistics: list[Statistics]
    ) -> None: ...


# What layers that share one weight become, given their inputs' statistics (rows 0: none).
Convert = Callable[[list[Target], Statistics], list[nn.Module]]


@dataclass
class Compressed:
    """What became of a model's layers.

    Args:
        layers: the new ones, with what they replace.
        unreached: names of those that no data reached.
        errors: ‖before − after‖ / ‖before‖ of weights that an earlier run has made, by name.
    """

    layers: list[tuple[Target, nn.Module]] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)


def compress(
    model: nn.Module,
    found: Found,
    calls: list[Call],
    convert: Convert,
    *,
    what: str,
    full: bool,
    sample: bool = False,
    scaling: InputScaling | None = None,
    kept: Store | None = None,
) -> Compressed:
    """Convert the layers of `found`, and put them into the model, in the order in which they run.

    Args:
        model: is as it was if anything here raises.
        found: its layers and their groups; fused experts are split.
        calls: what the model is called with, a batch each.
        convert: called once for each group.
        what: on the progress bar.
        full: whether `convert` needs all second moments.
        sample: whether it needs some inputs as they are.
        scaling: scales the inputs of a block's layers before they are converted.
        kept: blocks of an earlier run, and where those of this one are kept.
    """
    done = Compressed()
    journal = Journal() if scaling is None else scaling.journal
    with _restored(found, journal), still(model):
        for _, places, split in found.splits:
            for parent, attribute in places:
                setattr(parent, attribute, split)
        left = list(found.groups)
        for i, stage in enumerate(stages(model, calls, what)):
            groups = [g for g in left if not stage.name or _inside(g, stage.name)]
            taken = {group[0].name for group in groups}
            left = [group for group in left if group[0].name not in taken]
            single = [group[0] for group in groups if len(group) == 1]
            keeps = kept if stage.name and len(single) == len(groups) else None
            earlier = None
            if keeps is not None:
                earlier = kept_blocks.load(keeps, i, model, single, journal)
            if earlier is not None:
                _place(done, list(zip(single, earlier.layers, strict=True)))
                done.unreached += earlier.unreached
                done.errors.update(earlier.errors)
                if scaling is not None:
                    scaling.folded += earlier.folded
                continue
            changes, folds = len(journal), 0 if scaling is None else len(scaling.folded)
            first, missed = len(done.layers), len(done.unreached)
            _convert(stage, groups, convert, full, sample, scaling, done)
            if keeps is not None:
                new = {t.name: m for t, m in done.layers[first:] if isinstance(m, CompressedLayer)}
                if len(new) == len(groups):
                    errors = {t.name: _error(t, m) for t, m in done.layers[first:]}
                    folded = [] if scaling is None else scaling.folded[folds:]
                    block = kept_blocks.KeptBlock([], done.unreached[missed:], errors, folded)
                    kept_blocks.save(keeps, i, model, new, journal.changed(changes), block)
    return done


def _convert(
    stage: Stage,
    groups: list[list[Target]],
    convert: Convert,
    full: bool,
    sample: bool,
    scaling: InputScaling | None,
    done: Compressed,
) -> None:
    linear = [g for g in groups if not any(target.is_embedding for target in g)]
    sample = sample or scaling is not None
    statistics = gather(stage, linear, full=full, sample=sample) if linear else []
    if scaling is not None and stage.name:
        scaling.prepare(stage, linear, statistics)
    by_name = {g[0].name: s for g, s in zip(linear, statistics, strict=True)}
    for group in groups:
        own = by_name.get(group[0].name)
        if own is None or not own.rows:
            own = Statistics.empty(0, torch.device("cpu"), full=full)
            done.unreached += [t.name for t in group if not t.is_embedding]
        _place(done, list(zip(group, convert(group, own), strict=True)))


def _place(done: Compressed, layers: list[tuple[Target, nn.Module]]) -> None:
    for target, layer in layers:
        if layer is not target.module:
            done.layers.append((target, layer))
            for parent, attribute in target.places:
                setattr(parent, attribute, layer)


def _error(target: Target, layer: nn.Module) -> float:
    return relative_error(dense_weight(target.module), dense_weight(layer))


def _inside(group: list[Target], block: str) -> bool:
    return all(f"{target.name}.".startswith(f"{block}.") for target in group)


@contextmanager
def _restored(found: Found, journal: Journal) -> Iterator[None]:
    """On an error, put back every layer and parameter that stood in the model before."""
    before = [
        (parent, attribute, parent._modules[attribute])
        for _, places, _ in found.splits
        for parent, attribute in places
    ]
    before += [
        (parent, attribute, target.module)
        for group in found.groups
        for target in group
        for parent, attribute in target.places
    ]
    try:
        yield
    except BaseException:
        for parent, attribute, module in before:
            setattr(parent, attribute, module)
        journal.undo()
        raise


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Let `model` run without dropout, gradients and key-value caches; then put it back as it was.

    A cache would grow each time that a block is run again.
    """
    modes = [(module, module.training) for module in model.modules()]
    caching = [config for config in hf.configs(model) if getattr(config, "use_cache", False)]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for config in caching:
            config.use_cache = True
