"""The verb `prune`: drops the weights that matter least, in place."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.calibrate import blockwise
from llmq.calibrate.data import calls_of
from llmq.calibrate.stages import Statistics
from llmq.models.targets import Target, check_weight, find, swap
from llmq.nn import QuantLinear, SparseLinear, linear_bytes, linear_weight
from llmq.pruning import depth, magnitude, obs, sparsegpt, wanda
from llmq.pruning.rates import allocate
from llmq.pruning.structured import remove
from llmq.report import Change, attach, few, relative_error
from llmq.scheme import Pattern, parse_pattern
from llmq.storage.resume import Kept, run_of

_METHODS = ("magnitude", "wanda", "sparsegpt")


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
    """Prune the linear layers of `model` in place and return it; the report is attached.

    Works before and after `quantize`: int8 codes and scales of what stays are kept exactly. A
    model can be pruned again, at a higher rate, in the same pattern. Embeddings are never pruned.

    Args:
        model: any module; for `"structured"` a Transformer whose layers are named as in
            transformers' BERT-, GPT-2-, Llama-, T5- or Mixtral-like models.
        pruning_rate: share of the weights of each layer to drop, in [0, 1); for `"layers"` of the
            layers.
        pattern: `"unstructured"` (the smallest of each row), `"2:4"` (two of each four inputs,
            rate 0.5), `"block"` or `"block-RxC"` (whole blocks, 32×32 by default), `"structured"`
            (attention heads and MLP channels: the matrices themselves become smaller), `"layers"`
            (whole layers of encoder and decoder each; the first stays).
        method: what tells which weights matter. `"magnitude"`, which None stands for; `"wanda"`,
            magnitude times the norm of the input (of a head or channel: what it adds to the output
            of the layer after); `"sparsegpt"`, which also changes what stays to make up for what
            goes (int8 codes move on their scales). Of layers `"influence"` alone, which None stands
            for too: by how much each turns what passes through it.
        data: to calibrate with, needed by all but `"magnitude"`: token ids, a pair (text or texts,
            tokenizer), or any iterable of what the model takes (`calibrate/data.py`). A
            block at a time is in memory beside the model.
        skip: patterns of layers to leave alone, as in `quantize`; of `"layers"`, those that stay.
        allocation: `"uniform"`, or `"sensitivity"`: a layer whose loss changes the model's output
            more loses less (by `allocate.SPAN` at most), and all together the rate. For patterns of
            weights and blocks; needs data with any method, and a run of the model a layer.
        resume: a directory that keeps each block once it is done, from which the same call goes on
            if it was interrupted; only with data.

    Raises:
        ValueError: naming the layer, if its weight is not finite, the pattern does not divide it,
            its scheme has no sparse form, or it is pruned already at a higher rate or in another
            pattern; or if the rate is outside [0, 1). The model is then as it was.
        TypeError: if an argument is of the wrong type.
    """
    rate = _check_rate(pruning_rate)
    parsed = parse_pattern(pattern)
    method = _check_method(method, parsed, data, allocation)
    if resume is not None and (data is None or parsed.kind in ("structured", "layers")):
        raise ValueError("resume goes with data, and with patterns of weights or blocks of them")
    if parsed.kind == "2:4" and rate != 0.5:
        raise ValueError(f"pattern 2:4 drops two of each four: its rate is 0.5, got {rate}")
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
        attach(model, changes, found.reasons, choice)
        return model
    uniform = allocation == "uniform" or rate == 0
    for group in found.groups:
        for target in group:
            _check(target, parsed, rate if uniform else 1.0)
    calls = None if data is None else calls_of(model, data)
    kept = None
    if resume is not None and calls is not None:
        options = f"prune {rate} {parsed.name} {method}" + f" {allocation}" * (not uniform)
        kept = Kept(resume, run_of(options, found.groups, calls))
    rates = {target.name: rate for group in found.groups for target in group}
    if not uniform and calls is not None:
        scaled = method != "magnitude"
        rates = allocate(model, found.groups, calls, parsed, rate, wanda=scaled, resume=resume)

    def convert(group: list[Target], statistics: Statistics | None) -> list[nn.Module]:
        layers = [_convert(t, parsed, rates[t.name], method, statistics) for t in group]
        for layer in layers[1:]:
            _share(layers[0], layer)
        return list(layers)

    errors: dict[str, float] = {}
    choice = ""
    if rate == 0:
        replacements = []
    elif calls is None or method == "magnitude":
        with tqdm(found.groups, desc="prune", unit="layer", delay=1, leave=False) as progress:
            replacements = [
                pair for g in progress for pair in zip(g, convert(g, None), strict=True)
            ]
    else:
        full = method == "sparsegpt"
        done = blockwise.compress(model, found, calls, convert, what="prune", full=full, kept=kept)
        replacements, errors = done.layers, done.errors
        choice = f"{method}, calibrated on {len(calls)} batches"
        if done.unreached:
            choice += f"; by magnitude, as no data reached them: {few(done.unreached)}"
    if not uniform:
        choice = (choice or method) + f"; {rate} shared out by sensitivity: {_span(rates)} a layer"
    changes = {target.name: _change(target, layer) for target, layer in replacements}
    changes.update({n: changes[n]._replace(weight_error=e) for n, e in errors.items()})
    swap(model, found, replacements)
    if rate == 0:
        found.reasons.update({t.name: "pruning_rate=0" for group in found.groups for t in group})
    attach(model, changes, found.reasons, choice)
    return model


def _check_rate(rate: float) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"pruning_rate must be a number in [0, 1), got {rate!r}")
    if not 0 <= rate < 1:  # NaN fails too
        raise ValueError(f"pruning_rate must be in [0, 1), got {rate}")
    return float(rate)


def _span(rates: dict[str, float]) -> str:
    return f"{min(rates.values()):.3f} … {max(rates.values()):.3f}"


def _check_method(method: str | None, pattern: Pattern, data: Any, allocation: str) -> str:
    """Return the method that is meant, if it goes with pattern and data."""
    known = ("influence",) if pattern.kind == "layers" else _METHODS
    method = known[0] if method is None else method
    if method not in known:
        raise ValueError(
            f"unknown method {method!r}; there is {', '.join(known)} for pattern {pattern.name}"
        )
    if allocation not in ("uniform", "sensitivity"):
        raise ValueError(f"unknown allocation {allocation!r}; there is uniform, sensitivity")
    measures = allocation == "sensitivity"
    if measures and pattern.kind not in ("unstructured", "block"):
        raise ValueError(
            f"pattern {pattern.name} leaves no choice of rates; allocation={allocation!r} goes "
            f"with unstructured and block"
        )
    if method == "magnitude" and data is not None and not measures:
        raise ValueError(f"method {method!r} uses no data; leave data=None")
    if data is None and (method != "magnitude" or measures):
        what = f"allocation {allocation!r}" if measures else f"method {method!r}"
        raise ValueError(
            f"{what} needs data to calibrate with: token ids, a pair (text, "
            f"tokenizer), or batches of what the model takes"
        )
    return method


def _check(target: Target, pattern: Pattern, rate: float) -> None:
    """Raise `ValueError` naming the layer if it cannot be pruned so."""
    module, name = target.module, target.name
    if isinstance(module, (QuantLinear, SparseLinear)):
        scheme = module.scheme
        if scheme is not None and (
            scheme.bits != 8
            or scheme.method != "uniform"
            or not scheme.symmetric
            or scheme.granularity == "group"
        ):
            raise ValueError(
                f"{name} is {scheme.name}, which has no sparse form; prune a model that is w8a8, "
                f"w8a8-g64, w8a16 or not quantized"
            )
        weight = module.dequantize()
    else:
        weight = linear_weight(module)[0]
        check_weight(name, weight)
    N, K = weight.shape
    R, C = pattern.block if pattern.block else (1, 4 if pattern.kind == "2:4" else 1)
    if N % R or K % C:
        raise ValueError(
            f"{name}: pattern {pattern.name} does not divide its weight [{N}, {K}]; name the layer "
            f"in skip, or use 'block-RxC' with R dividing {N} and C dividing {K}"
        )
    if isinstance(module, SparseLinear):
        if module.pattern != pattern.name:
            raise ValueError(
                f"{name} is already pruned in pattern {module.pattern} and cannot become "
                f"{pattern.name}; prune the original model, or name the layer in skip"
            )
        gone = magnitude.pruned(module.mask())
        if gone > magnitude.goal(weight, pattern, rate):
            raise ValueError(
                f"{name} is already pruned to {gone / weight.numel():.3f}; pruning_rate={rate} "
                f"would bring weights back"
            )


def _convert(
    target: Target, pattern: Pattern, rate: float, method: str, statistics: Statistics | None
) -> SparseLinear:
    module = target.module
    kept = module.mask() if isinstance(module, SparseLinear) else None
    if isinstance(module, (QuantLinear, SparseLinear)):
        weight = module.dequantize()
    else:
        weight = linear_weight(module)[0]
    if statistics is None or not statistics.rows:
        mask = magnitude.mask(weight, pattern, rate, kept)
        return SparseLinear.from_linear(module, pattern, mask=mask)
    if method == "wanda":
        mask = wanda.mask(weight, statistics.squares, pattern, rate, kept)
        return SparseLinear.from_linear(module, pattern, mask=mask)
    return _sparsegpt(module, weight, statistics.moments, pattern, rate, kept)


def _sparsegpt(
    module: Any,
    weight: Tensor,
    moments: Tensor,
    pattern: Pattern,
    rate: float,
    kept: Tensor | None,
) -> SparseLinear:
    """Prune with an update: of int8 values on the scales that they have."""
    N, K = weight.shape
    bias = None if module.bias is None else module.bias.detach()
    if getattr(module, "scheme", None) is None:
        changed, mask = sparsegpt.prune(weight, moments, pattern, rate, kept=kept)
        linear = nn.Linear(K, N, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(changed.to(module.weight.dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return SparseLinear.from_linear(linear.train(module.training), pattern, mask=mask)
    scale = module.weight_scale.data
    round_to = _on_scale(scale[:, 0])
    changed, mask = sparsegpt.prune(weight, moments, pattern, rate, kept=kept, round_to=round_to)
    tensors = {"weight": torch.round(changed / scale).to(torch.int8), "weight_scale": scale}
    if module.input_scale is not None:
        tensors["input_scale"] = module.input_scale.data
    if bias is not None:
        tensors["bias"] = bias
    dense = QuantLinear(K, N, module.scheme, tensors).train(module.training)
    return SparseLinear.from_linear(dense, pattern, mask=mask)


def _on_scale(scale: Tensor) -> obs.Round:
    return lambda values, _: (values / scale).round_().clamp_(-128, 127) * scale


def _share(first: SparseLinear, layer: SparseLinear) -> None:
    """Let `layer` hold the tensors of `first`: both come from one weight."""
    for name, parameter in first._parameters.items():
        if name != "bias":
            layer._parameters[name] = parameter


def _change(target: Target, layer: nn.Module) -> Change:
    module = target.module
    assert isinstance(layer, SparseLinear)
    if isinstance(module, (QuantLinear, SparseLinear)):
        return Change(
            target.kind, relative_error(module.dequantize(), layer.dequantize()), module.bytes()
        )
    error = relative_error(linear_weight(module)[0], layer.dequantize())
    return Change(target.kind, error, linear_bytes(module))
