"""The verb `quantize`: codes the weights of a model's linear layers, in place."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from llmq.calibrate import blockwise
from llmq.calibrate.data import calls_of
from llmq.calibrate.kept_blocks import open_store
from llmq.calibrate.statistics import Statistics
from llmq.models.targets import Target, find, swap
from llmq.quantization.algorithm import parse_algorithm
from llmq.quantization.convert import change, convert
from llmq.quantization.fit_scheme import check, fitted, pick
from llmq.quantization.smoothquant_awq import Scaling
from llmq.report import attach, few
from llmq.scheme import Scheme

_log = logging.getLogger("llmq")


def quantize(
    model: nn.Module,
    bits: int = 8,
    *,
    scheme: str | Scheme | None = None,
    data: Any = None,
    algorithm: str = "rtn",
    skip: tuple[str, ...] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Quantize the linear layers of `model` in place and return it, with `model.llmq_report`.

    Converts `Linear`, GPT-2's `Conv1D`, experts kept as 3-D parameters, and sparse layers, whose
    masks stay. The report says what became of each layer, and why others were left alone.

    Args:
        model: any module with float32, bfloat16 or float16 weights.
        bits: without a `scheme`: 8 picks int8 weights, with int8 activations if the device is fast
            at that; 4 picks groups of 32 inputs, or fewer where 32 does not divide.
        scheme: a `Scheme` or the name of a preset. One with static activations needs data; layers
            that no data reaches get dynamic activations.
        data: calibration data: token ids, a pair (text or texts, tokenizer), or any iterable of
            what the model takes. One block at a time is in memory beside the model.
        algorithm: how to choose the codes. `"rtn"` rounds to the nearest code and takes no data.
            `"clip"` does so in the range that loses least, with or without data. `"gptq"` rounds
            one input after the other, and the rest of a row makes up for each error.
            `"smoothquant"` and `"awq"` first scale inputs, where the model allows it exactly; alone
            or before another, as in `"smoothquant+gptq"`. Static activation scales span all inputs
            with `"rtn"`, and the range that loses least with the others.
        skip: name patterns of layers to leave alone: whole dotted parts of a name (`"lm_head"`,
            `"layers.0"`) or a shell pattern for all of it. None skips the output embedding, what
            shares its tensor, and routers of experts. `()` skips nothing and compresses embeddings
            too, as int8 by row.
        resume: a directory that keeps each block once it is done, from which the same call goes on
            if it was interrupted; only with data.

    Raises:
        ValueError: if options do not go together or `skip` matches nothing; or, naming the layer,
            if a weight is not finite or of another dtype, a group size does not divide its inputs,
            or it is compressed already in another way. The model is then as it was.
        TypeError: if an argument is of the wrong type.

    Example:
        >>> model = llmq.quantize(model, scheme="w8a8-g64")
        >>> print(model.llmq_report)
    """
    picked, choice = pick(model, bits, scheme)
    static = picked.activations == "static"
    scaling, how = parse_algorithm(algorithm, static=static, has_data=data is not None)
    if resume is not None and data is None:
        raise ValueError("resume needs data: without calibration there is nothing to resume")
    found = find(model, skip, embeddings=True)
    for group in found.groups:
        for target in group:
            check(target, fitted(picked, target, scheme is not None))

    def coded(group: list[Target], statistics: Statistics | None) -> list[nn.Module]:
        return convert(group, fitted(picked, group[0], scheme is not None), how, statistics)

    errors: dict[str, float] = {}
    if data is None:
        replacements = []
        with tqdm(found.groups, desc="quantize", unit="layer", delay=1, leave=False) as progress:
            for group in progress:
                layers = coded(group, None)
                replacements += [
                    (target, layer)
                    for target, layer in zip(group, layers, strict=True)
                    if layer is not target.module
                ]
    else:
        calls = calls_of(model, data)
        schemes = {
            t.name: fitted(picked, group[0], scheme is not None)
            for group in found.groups
            for t in group
        }
        scaled = None if scaling is None else Scaling(scaling, schemes)
        kept = open_store(resume, f"quantize {schemes} {algorithm}", found.groups, calls)
        done = blockwise.compress(
            model,
            found,
            calls,
            coded,
            what="quantize",
            full=how == "gptq",
            sample=static and how != "rtn",
            scaling=scaled,
            kept=kept,
        )
        replacements, errors = done.layers, done.errors
        choice = _said(choice, algorithm, len(calls), scaled, done.unreached, static)
    changes = {target.name: change(target, layer) for target, layer in replacements}
    changes.update({n: changes[n]._replace(weight_error=e) for n, e in errors.items()})
    swap(model, found, replacements)
    if choice:
        _log.info(choice)
    attach(model, changes, found.reasons, choice)
    return model


def _said(
    choice: str,
    algorithm: str,
    batches: int,
    scaled: Scaling | None,
    unreached: list[str],
    static: bool,
) -> str:
    """Return the report's lines on what calibration did."""
    lines = [choice] if choice else []
    lines.append(f"{algorithm}, calibrated on {batches} batches")
    if scaled is not None:
        left = [name for name in scaled.schemes if name not in scaled.folded]
        of = f"{len(scaled.folded)} of {len(scaled.schemes)} layers"
        lines.append(f"{scaled.kind}: folded exactly for the inputs of {of}")
        if left:
            lines.append(f"  not, as nothing before them takes the scales: {few(left)}")
    if unreached:
        became = "dynamic, and " if static else ""
        lines.append(f"{became}rounded to nearest, as no data reached them: {few(unreached)}")
    return "\n".join(lines)
