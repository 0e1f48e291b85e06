"""Compressed linear layers in training: float masters, rounded as their layer would round them.

The gradient passes the rounding as if it were not there (the straight-through estimator of Bengio
et al., arXiv:1308.3432). What trains is the whole weight, or an update of low rank
(W + 2 · up · down; Hu et al., arXiv:2106.09685, eq. 3) which passes mask and rounding together with
the weight that it is added to, so that merging it changes nothing; and scales, if asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.formats import rtn, uniform
from llmq.nn import QuantLinear, SparseLinear
from llmq.scheme import Scheme

_LORA_SCALE = 2.0  # alpha / rank


class _StraightThrough(torch.autograd.Function):
    """Forward gives another value than its input; the gradient passes as if it had not."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.mask = mask
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # A product with a mask of float32 takes an eighth of the time of one with a bool mask.
        grad = grads[0] if ctx.mask is None else grads[0] * ctx.mask.to(grads[0].dtype)
        return grad, None, None


class Master(nn.Module):
    """A linear layer in training: y = x rounded(W)ᵀ + bias, W float32 [N, K].

    Args:
        layer: compressed, or a `Linear` (which rounds nothing).
        rank: of the update that trains in place of the weight, which then stays; None for all of
            it. The bias stays too.
        learn_scales: whether scales train as well, as factors exp(t) of those the layer has, by
            the gradient of Esser et al. (LSQ, arXiv:1902.08153, eq. 3). They are taken from the
            weight anew at each step otherwise.
        generator: draws the update's `down`; `up` starts at zero.

    Raises:
        ValueError: if scales are to be learned that the scheme does not have.
    """

    def __init__(
        self,
        layer: QuantLinear | SparseLinear | nn.Linear,
        rank: int | None = None,
        *,
        learn_scales: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        plain = isinstance(layer, nn.Linear)
        weight = layer.weight.detach() if plain else layer.dequantize()  # type: ignore[operator]
        weight = weight.to(torch.float32, copy=True)  # a float layer gives its own tensor
        self.weight = nn.Parameter(weight, requires_grad=rank is None)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), rank is None)
        self.scheme: Scheme | None = None if plain else layer.scheme  # type: ignore[assignment]
        self.pattern = layer.pattern if isinstance(layer, SparseLinear) else None
        self.mask: Tensor | None = layer.mask() if isinstance(layer, SparseLinear) else None
        table = layer._parameters.get("weight_codebook")
        self.table: Tensor | None = None if table is None else table.detach()
        input_scale = layer._parameters.get("input_scale")
        self.input_scale = None if input_scale is None else input_scale.detach()
        self.bias_dtype = None if bias is None else bias.dtype
        self.value_dtype = layer.weight.dtype
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        if rank is not None:
            N, K = weight.shape
            rank = min(rank, N, K)
            down = torch.randn(rank, K, generator=generator) * K**-0.5
            self.down = nn.Parameter(down.to(weight.device))
            self.up = nn.Parameter(torch.zeros(N, rank, device=weight.device))
        self.log_factor: nn.Parameter | None = None
        self.scale: Tensor | None = None
        self.zero_point: Tensor | None = None
        if learn_scales and self.scheme is not None:
            if self.scheme.method != "uniform" or self.scheme.granularity == "tensor":
                raise ValueError(
                    f"{self.scheme.name} has no scales to learn; uniform schemes by channel or "
                    f"group do"
                )
            assert not plain
            tensors = layer.canonical()  # type: ignore[operator]
            self.scale = tensors["weight_scale"].clone()
            self.zero_point = tensors.get("weight_zero_point")
            self.log_factor = nn.Parameter(torch.zeros_like(self.scale))

    def current(self) -> Tensor:
        """Return the weight [N, K] as trained so far, before mask and rounding."""
        if self.down is None or self.up is None:
            return self.weight
        return torch.addmm(self.weight, self.up, self.down, alpha=_LORA_SCALE)

    def rounded(self) -> Tensor:
        """Return the weight [N, K] that the coded layer would have, with a gradient."""
        weight = self.current()
        if self.log_factor is not None:
            return self._on_learned_scales(weight)
        if self.scheme is None and self.mask is None:
            return weight
        with torch.no_grad():
            value = weight if self.mask is None or self.up is None else weight * self.mask
            if self.scheme is not None:
                value = rtn.fake_quantize(value, self.scheme, self.table)
        return _StraightThrough.apply(weight, value, self.mask)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.rounded()
        if self.scheme is not None and self.scheme.activations is not None:
            with torch.no_grad():
                group = self.scheme.activation_group_size or 0
                codes, scale = torch.ops.llmq.quantize_activation(x, group, self.input_scale)
                shape = (*scale.shape, -1)
                rounded = (codes.view(shape).float() * scale[..., None]).view(x.shape).to(x.dtype)
            x = _StraightThrough.apply(x, rounded, None)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def write(self, layer: QuantLinear | SparseLinear | nn.Linear) -> None:
        """Let `layer`, which the master was made from, have what was trained."""
        if not isinstance(layer, nn.Linear):
            layer.load_state_dict(self.encoded().state_dict())
            return
        layer.weight.copy_(self.current())
        if layer.bias is not None and self.bias is not None:
            layer.bias.copy_(self.bias)

    def encoded(self) -> QuantLinear | SparseLinear:
        """Return the layer that the master stands for, coded by its scheme."""
        N, K = self.weight.shape
        weight = self.current().detach()
        linear = nn.Linear(K, N, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        bias = None
        if self.bias is not None:
            bias = self.bias.detach().to(self.bias_dtype)
            linear.bias = nn.Parameter(bias, requires_grad=False)
        coded: QuantLinear | None = None
        inputs: dict[str, Any] = {"input_scale": self.input_scale}
        if self.scheme is not None and self.log_factor is not None:
            on_grid = self._learned_codes()
            coded = QuantLinear.from_encoded(on_grid, bias, self.scheme, in_features=K, **inputs)
        elif self.scheme is not None and self.table is not None:  # that training has rounded to
            levels = rtn.encode(weight, self.scheme, table=self.table)
            coded = QuantLinear.from_encoded(levels, bias, self.scheme, in_features=K)
        if self.pattern is None:
            assert self.scheme is not None
            return coded or QuantLinear.from_linear(linear, self.scheme, **inputs)
        if coded is not None:
            return SparseLinear.from_linear(coded, self.pattern, mask=self.mask)
        if self.scheme is None:
            linear.weight.data = linear.weight.data.to(self.value_dtype)
        return SparseLinear.from_linear(
            linear, self.pattern, scheme=self.scheme, mask=self.mask, **inputs
        )

    # -- learned scales ----------------------------------------------------------------------------

    def _steps(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight / scale + zero point [N, G, group], and the scale [N, G, 1]."""
        assert self.scale is not None
        assert self.log_factor is not None
        scale = (self.scale * self.log_factor.exp())[..., None]
        steps = weight.unflatten(1, (scale.shape[1], -1)) / scale
        return (steps if self.zero_point is None else steps + self.zero_point[..., None]), scale

    def _range(self) -> tuple[int, int, float]:
        """Return the lowest and highest code, and that of zero without a zero point."""
        assert self.scheme is not None
        if self.scheme.bits == 4:
            return 0, 15, 8.0 if self.zero_point is None else 0.0
        return (-127, 127, 0.0) if self.zero_point is None else (-128, 127, 0.0)

    def _on_learned_scales(self, weight: Tensor) -> Tensor:
        if self.mask is not None:
            weight = weight * self.mask
        steps, scale = self._steps(weight)
        low, high, middle = self._range()
        steps = steps + middle
        codes = (steps + (steps.round() - steps).detach()).clamp(low, high)
        zero = middle if self.zero_point is None else self.zero_point[..., None]
        return ((codes - zero) * scale).flatten(1)

    def _learned_codes(self) -> uniform.UniformWeight:
        assert self.scheme is not None
        weight = self.current().detach()
        if self.mask is not None:
            weight = weight * self.mask
        steps, scale = (t.detach() for t in self._steps(weight))
        low, high, middle = self._range()
        codes = (steps + middle).round().clamp(low, high).flatten(1).to(torch.int8)
        packed = codes if self.scheme.bits == 8 else uniform.pack_int4(codes)
        return uniform.UniformWeight(packed, scale[..., 0].contiguous(), self.zero_point)
