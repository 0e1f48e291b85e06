"""What `prune` makes of one layer: whether it can be pruned, its new form, and what it lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibrate.statistics import Statistics
from llmq.models.targets import Target, check_weight
from llmq.nn import CompressedLayer, QuantLinear, SparseLinear, dense_weight, linear_bytes
from llmq.pruning import magnitude, obs, sparsegpt, wanda
from llmq.report import Change, relative_error
from llmq.scheme import Pattern


def check(target: Target, pattern: Pattern, rate: float) -> None:
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
    weight = dense_weight(module)
    if not isinstance(module, CompressedLayer):
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


def convert(
    target: Target, pattern: Pattern, rate: float, method: str, statistics: Statistics | None
) -> SparseLinear:
    """Return the sparse layer of `target`; by magnitude where no statistics came."""
    module = target.module
    kept = module.mask() if isinstance(module, SparseLinear) else None
    weight = dense_weight(module)
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


def share_weight(first: SparseLinear, layer: SparseLinear) -> None:
    """Let `layer` hold the tensors of `first`: both come from one weight."""
    for name, parameter in first._parameters.items():
        if name != "bias":
            layer._parameters[name] = parameter


def change(target: Target, layer: nn.Module) -> Change:
    """Return what became of `target` as `layer` takes its place."""
    module = target.module
    assert isinstance(layer, SparseLinear)
    size = module.bytes() if isinstance(module, CompressedLayer) else linear_bytes(module)
    return Change(target.kind, relative_error(dense_weight(module), layer.dequantize()), size)
