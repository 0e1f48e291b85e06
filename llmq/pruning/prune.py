"""The verb `prune`: drops the weights that matter least, in place."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from llmq.calibrate import blockwise
from llmq.calibrate.data import calls_of
from llmq.calibrate.kept_blocks import open_store
from llmq.calibrate.statistics import Statistics
from llmq.models.targets import Target, find, swap
from llmq.pruning import convert, depth
from llmq.pruning.method import check_rate, choose_method
from llmq.pruning.rates import allocate
from llmq.pruning.structured import remove
from llmq.report import attach, few
from llmq.scheme import parse_pattern


def prune(
    model: nn.Module,
    pruning_rate: float = 0.5,
    *,
    pattern: str = "unstructured",
    method: str | None = None,
    data: Any = None,
    skip: tuple[str, ...] | None = None,
    allocation: str = "uniform",
    resume: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Prune the linear layers of `model` in place and return it, with `model.llmq_report`.

    Works before and after `quantize`: the int8 codes and scales of the weights that stay are kept
    exactly. A pruned model can be pruned again, at a higher rate, in the same pattern. Embeddings
    are never pruned.

    Args:
        model: any module; for `"structured"` and `"layers"` a Transformer whose layers are named as
            in transformers' BERT-, GPT-2-, Llama-, T5- or Mixtral-like models.
        pruning_rate: share of each layer's weights to drop, in [0, 1); for `"layers"` the share of
            the layers.
        pattern: which weights go together. `"unstructured"`: single weights of each row. `"2:4"`:
            two of each four inputs, at rate 0.5. `"block"` or `"block-RxC"`: whole blocks, 32×32 by
            default. `"structured"`: attention heads and MLP channels, so that the matrices
            themselves become smaller. `"layers"`: whole layers; the first of a list stays.
        method: how to tell which weights matter. `"magnitude"` needs no data. `"wanda"` multiplies
            the magnitude by the norm of the input. `"sparsegpt"` also changes the weights that
            stay, to make up for those that go (int8 codes move on their scales). `"influence"`, for
            `"layers"`, drops the layers that change their input least. None picks `"sparsegpt"`
            where there is data, else `"magnitude"`; the report says so.
        data: calibration data, for all methods but `"magnitude"`: token ids, a pair (text or texts,
            tokenizer), or any iterable of what the model takes. One block at a time is in memory
            beside the model.
        skip: name patterns of layers to leave alone, as in `quantize`; of `"layers"`, those that
            stay.
        allocation: `"uniform"` prunes all layers at one rate. `"sensitivity"` takes more from
            layers whose loss changes the model's output less, at the same rate over all; for
            unstructured and block patterns. It needs data, and one run of the model a layer.
        resume: a directory that keeps each block once it is done, from which the same call goes on
            if it was interrupted; only with data.

    Raises:
        ValueError: if the rate is outside [0, 1), or options do not go together; or, naming the
            layer, if a weight is not finite, the pattern does not divide it, its scheme has no
            sparse form, or it is pruned already at a higher rate or in another pattern. The model
            is then as it was.
        TypeError: if an argument is of the wrong type.

    Example:
        >>> model = llmq.prune(model, 0.5, data=(texts, tokenizer))
        >>> print(model.llmq_report)
    """
    parsed = parse_pattern(pattern)
    rate = check_rate(pruning_rate, parsed)
    named = method is not None
    method = choose_method(method, parsed, allocation, has_data=data is not None)
    said = method if named or data is None else f"{method} (picked, as there is data)"
    if resume is not None and (data is None or parsed.kind in ("structured", "layers")):
        raise ValueError("resume needs data, and a pattern other than structured or layers")
    found = find(model, skip, embeddings=False)
    if parsed.kind == "layers":
        choice = depth.prune(model, rate, skip or (), calls_of(model, data))
        found = find(model, None, embeddings=False)  # by the names that they have now
        stays = {t.name: "in a layer that stays" for group in found.groups for t in group}
        attach(model, {}, stays | found.reasons, choice)
        return model
    if parsed.kind == "structured":
        calls = None if data is None else calls_of(model, data)
        skipped = set(found.reasons)
        refit = method == "sparsegpt"
        changes, choice = remove.prune(model, rate, skipped, calls, refit=refit)
        left = "no attention head or MLP channel of a known structure"
        for group in found.groups:
            for target in group:
                found.reasons.setdefault(target.name, left)
        choice += f"; {said}" if choice and said != method else ""
        attach(model, changes, found.reasons, choice)
        return model
    uniform = allocation == "uniform" or rate == 0
    for group in found.groups:
        for target in group:
            convert.check(target, parsed, rate if uniform else 1.0)
    calls = None if data is None else calls_of(model, data)
    kept = None
    if calls is not None:
        options = f"prune {rate} {parsed.name} {method}" + f" {allocation}" * (not uniform)
        kept = open_store(resume, options, found.groups, calls)
    rates = {target.name: rate for group in found.groups for target in group}
    if not uniform and calls is not None:
        scaled = method != "magnitude"
        rates = allocate(model, found.groups, calls, parsed, rate, wanda=scaled, kept=kept)

    def pruned(group: list[Target], statistics: Statistics | None) -> list[nn.Module]:
        layers = [convert.convert(t, parsed, rates[t.name], method, statistics) for t in group]
        for layer in layers[1:]:
            convert.share_weight(layers[0], layer)
        return list(layers)

    errors: dict[str, float] = {}
    choice = ""
    if rate == 0:
        replacements = []
    elif calls is None or method == "magnitude":
        with tqdm(found.groups, desc="prune", unit="layer", delay=1, leave=False) as progress:
            replacements = [pair for g in progress for pair in zip(g, pruned(g, None), strict=True)]
    else:
        full = method == "sparsegpt"
        done = blockwise.compress(model, found, calls, pruned, what="prune", full=full, kept=kept)
        replacements, errors = done.layers, done.errors
        choice = f"{said}, calibrated on {len(calls)} batches"
        if done.unreached:
            choice += f"; by magnitude, as no data reached them: {few(done.unreached)}"
    if not uniform:
        span = f"{min(rates.values()):.3f} … {max(rates.values()):.3f}"
        choice = (choice or method) + f"; {rate} shared out by sensitivity: {span} a layer"
    changes = {target.name: convert.change(target, layer) for target, layer in replacements}
    changes.update({n: changes[n]._replace(weight_error=e) for n, e in errors.items()})
    swap(model, found, replacements)
    if rate == 0:
        found.reasons.update({t.name: "pruning_rate=0" for group in found.groups for t in group})
    attach(model, changes, found.reasons, choice)
    return model
