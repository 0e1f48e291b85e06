"""Compresses a model block by block, each for the inputs that the blocks before give it by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llmq.algorithms.calibration import Call, Stage, Statistics, gather, stages
from llmq.integrations import transformers as hf
from llmq.walk import Found, Target

# What layers that share one weight become, given their inputs' statistics (rows 0: none).
Convert = Callable[[list[Target], Statistics], list[nn.Module]]
# Changes a block before its layers are converted; may change the statistics with it.
Prepare = Callable[[Stage, list[list[Target]], list[Statistics]], None]


def compress(
    model: nn.Module,
    found: Found,
    calls: list[Call],
    convert: Convert,
    *,
    what: str,
    full: bool,
    sample: bool = False,
    prepare: Prepare | None = None,
) -> tuple[list[tuple[Target, nn.Module]], list[str]]:
    """Convert the layers of `found`, and put them into the model, in the order in which they run.

    Args:
        model: is as it was if anything here raises.
        found: its layers and their groups; fused experts are split.
        calls: what the model is called with, a batch each.
        convert: called once for each group.
        what: on the progress bar.
        full: whether `convert` needs all second moments.
        sample: whether it needs some inputs as they are.
        prepare: called once for each block, before its groups are converted.

    Returns:
        The new layers, and the names of those that no data reached.
    """
    done: list[tuple[Target, nn.Module]] = []
    unreached: list[str] = []
    with _restored(found), still(model):
        for name, places, split in found.splits:
            del name
            for parent, attribute in places:
                setattr(parent, attribute, split)
        left = list(found.groups)
        for stage in stages(model, calls, what):
            groups = [g for g in left if not stage.name or _inside(g, stage.name)]
            left = [g for g in left if not (not stage.name or _inside(g, stage.name))]
            linear = [g for g in groups if not any(target.is_embedding for target in g)]
            statistics = gather(stage, linear, full=full, sample=sample) if linear else []
            if prepare is not None and stage.name:
                prepare(stage, linear, statistics)
            by_name = {g[0].name: s for g, s in zip(linear, statistics, strict=True)}
            for group in groups:
                own = by_name.get(group[0].name)
                if own is None or not own.rows:
                    own = Statistics.empty(0, torch.device("cpu"), full=full)
                    unreached += [t.name for t in group if not t.is_embedding]
                for target, layer in zip(group, convert(group, own), strict=True):
                    if layer is target.module:
                        continue
                    done.append((target, layer))
                    for parent, attribute in target.places:
                        setattr(parent, attribute, layer)
    return done, unreached


def _inside(group: list[Target], block: str) -> bool:
    return all(target.name.startswith(f"{block}.") for target in group)


@contextmanager
def _restored(found: Found) -> Iterator[None]:
    """On an error, put back every layer that stood in the model before."""
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
