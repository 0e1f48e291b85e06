"""Compressed linear layers in training: float masters, rounded as their layer would round them.

The gradient passes the rounding as if it were not there (the straight-through estimator of Bengio
et al., arXiv:1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.formats import activation, codebook, uniform
from llmq.nn import QuantLinear, SparseLinear
from llmq.scheme import Scheme


class _StraightThrough(torch.autograd.Function):
    """Forward gives another value than its input; the gradient passes as if it had not."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.mask = mask
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] if ctx.mask is None else grads[0] * ctx.mask
        return grad, None, None


class Master(nn.Module):
    """A compressed linear layer in training: y = x fake_quantized(W)ᵀ + bias, W float32 [N, K]."""

    def __init__(self, layer: QuantLinear | SparseLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.dequantize().float())
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().float())
        self.scheme = layer.scheme
        self.pattern = layer.pattern if isinstance(layer, SparseLinear) else None
        self.mask: Tensor | None = layer.mask() if isinstance(layer, SparseLinear) else None
        table = layer._parameters.get("weight_codebook")
        self.table: Tensor | None = None if table is None else table.detach()
        self.bias_dtype = None if bias is None else bias.dtype
        self.value_dtype = layer.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        with torch.no_grad():
            value = (
                weight if self.scheme is None else fake_quantize(weight, self.scheme, self.table)
            )
        if self.scheme is not None or self.mask is not None:
            weight = _StraightThrough.apply(weight, value, self.mask)
        if self.scheme is not None and self.scheme.activations is not None:
            with torch.no_grad():
                group = self.scheme.activation_group_size or 0
                codes, scale = activation.quantize_activation(x, group)
                shape = (*scale.shape, -1)
                rounded = (codes.view(shape).float() * scale[..., None]).view(x.shape).to(x.dtype)
            x = _StraightThrough.apply(x, rounded, None)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def encoded(self) -> QuantLinear | SparseLinear:
        """Return the layer that the master stands for, coded by its scheme."""
        N, K = self.weight.shape
        linear = nn.Linear(K, N, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(self.bias_dtype)
            linear.bias = nn.Parameter(bias, requires_grad=False)
        if self.pattern is None:
            assert self.scheme is not None
            if self.table is not None:  # the levels that training has rounded to
                coded = _on_levels(linear.weight.data, self.scheme, self.table)
                kept = None if self.bias is None else linear.bias.data
                return QuantLinear.from_encoded(coded, kept, self.scheme, in_features=K)
            return QuantLinear.from_linear(linear, self.scheme)
        if self.scheme is None:
            linear.weight.data = linear.weight.data.to(self.value_dtype)
        return SparseLinear.from_linear(linear, self.pattern, scheme=self.scheme, mask=self.mask)


def fake_quantize(weight: Tensor, scheme: Scheme, table: Tensor | None = None) -> Tensor:
    """Return float32 weight [N, K] rounded to the levels of `scheme`, with fresh scales.

    `table` [1 or N, levels] is the codebook of a quantile scheme, which stays as it is.
    """
    K = weight.shape[1]
    if scheme.method == "quantile":
        coded = _on_levels(weight, scheme, table)
        return codebook.decode(*coded, bits=scheme.bits, K=K)
    if scheme.bits == 8 and scheme.symmetric and scheme.granularity == "channel":
        # What encode and decode below would give, in 4 passes over memory instead of 12.
        scale = torch.linalg.vector_norm(weight, float("inf"), dim=1, keepdim=True) / 127
        scale = torch.where(scale == 0, 1.0, scale.clamp(min=torch.finfo(torch.float32).tiny))
        return (weight / scale).round_().clamp_(-127, 127).mul_(scale)
    encoded = uniform.encode(
        weight,
        bits=scheme.bits,
        granularity=scheme.granularity,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
    )
    return uniform.decode(*encoded, bits=scheme.bits, K=K)


def _on_levels(weight: Tensor, scheme: Scheme, table: Tensor | None) -> codebook.CodebookWeight:
    return codebook.encode(
        weight,
        bits=scheme.bits,
        granularity=scheme.granularity,
        group_size=scheme.group_size,
        weight_codebook=table,
    )
