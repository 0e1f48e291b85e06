"""`QuantLinear`: a linear layer whose weight is coded uniformly or by a codebook."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from llmq.formats import codebook, rtn, uniform
from llmq.nn.base import (
    CompressedLayer,
    autocast,
    call,
    frozen,
    input_scale_of,
    linear_weight,
    wrong_width,
)
from llmq.ops.reference import pack_scales, unpack_scales
from llmq.runtime import dispatch
from llmq.scheme import Scheme, resolve_scheme

_NAMES = (
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_codebook",
    "input_scale",
    "bias",
)
_SCALES = ("weight_scale", "weight_zero_point")  # that kernels read in panels too


class QuantLinear(CompressedLayer):
    """A linear layer with quantized weight: y = x Wᵀ + bias, x [..., K], y [..., N] in x's dtype.

    Made by `from_linear` or `llmq.quantize`. Parameters (`requires_grad=False`): `weight` int8
    [N, K] or [N, K / 2], `weight_scale` float32 [N, groups], `weight_zero_point` int8 [N, groups]
    or None, `weight_codebook` float32 [1 or N, 2^bits] or None, `input_scale` float32 [1] with
    static activations, `bias` [N] or None. Formats: `llmq/formats/uniform.py` and `codebook.py`
    (uniform: Jacob et al., arXiv:1712.05877). Calling it raises `ValueError` for x that is not
    [..., K] in float32, bfloat16 or float16.

        >>> layer = llmq.QuantLinear.from_linear(torch.nn.Linear(64, 32), "w8a8")
        >>> layer(torch.randn(2, 64)).shape, layer.dequantize().shape
        (torch.Size([2, 32]), torch.Size([32, 64]))
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    weight_codebook: nn.Parameter | None
    input_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        tensors: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self._op = scheme.op
        for name in _NAMES:
            self.register_parameter(name, frozen(tensors.get(name)))
        self._pack()

    @classmethod
    def from_linear(
        cls, linear: nn.Module, scheme: Scheme | str, *, input_scale: Tensor | float | None = None
    ) -> QuantLinear:
        """Quantize a `Linear` or `Conv1D`, rounding each weight to the nearest code.

        Args:
            linear: with weight [N, K] in floating point.
            scheme: a `Scheme` or the name of a preset.
            input_scale: the step of its inputs' codes, where the scheme's activations are static.

        Raises:
            TypeError: if `linear` is no linear layer.
            ValueError: if the weight is not finite, a group size does not divide K, or the input
                scale is missing, given for a dynamic scheme, or not finite and above 1e-30.
        """
        scheme = resolve_scheme(scheme)
        weight, bias = linear_weight(linear)
        scheme.check_fits(weight.shape[0], weight.shape[1])
        encoded = rtn.encode(weight, scheme)
        layer = cls.from_encoded(
            encoded, bias, scheme, in_features=weight.shape[1], input_scale=input_scale
        )
        return layer.train(linear.training)

    @classmethod
    def from_encoded(
        cls,
        encoded: rtn.Encoded,
        bias: Tensor | None,
        scheme: Scheme,
        *,
        in_features: int,
        input_scale: Tensor | float | None = None,
    ) -> QuantLinear:
        """Wrap canonical tensors that a format or an algorithm has made."""
        tensors = {n: t for n, t in encoded._asdict().items() if t is not None}
        tensors |= input_scale_of(scheme, input_scale, encoded.weight.device)
        if bias is not None:
            tensors["bias"] = bias
        return cls(in_features, encoded.weight_scale.shape[0], scheme, tensors)

    def forward(self, x: Tensor) -> Tensor:
        if (x.shape or (-1,))[-1] != self.in_features:  # a scalar has no width
            raise wrong_width(self._op, x, self.in_features)
        x, ops, p = autocast(x), torch.ops.llmq, self._parameters
        group = self.scheme.activation_group_size or 0
        if self._op == "int8_linear":
            op = ops.int8_linear.default
            last = (p["bias"], group, p["input_scale"])
            return call(op, x, p["weight"], p["weight_scale"], *last)
        codes = (p["weight"], p["weight_scale"])
        if self._op == "codebook_linear":
            op, bits = ops.codebook_linear.default, self.scheme.bits
            return call(op, x, codes[0], p["weight_codebook"], codes[1], p["bias"], bits)
        return call(
            ops.weight_only_linear.default,
            x,
            *codes,
            p["weight_zero_point"],
            p["bias"],
            self.scheme.bits,
            None if self.scheme.activations is None else group,
        )

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, float32 [N, K]."""
        tensors, bits, K = self.canonical(), self.scheme.bits, self.in_features
        if self.scheme.method == "quantile":
            codes, scale = tensors["weight"], tensors["weight_scale"]
            return codebook.decode(codes, tensors["weight_codebook"], scale, bits=bits, K=K)
        zero_point = tensors.get("weight_zero_point")
        return uniform.decode(
            tensors["weight"], tensors["weight_scale"], zero_point, bits=bits, K=K
        )

    def canonical(self) -> dict[str, Tensor]:
        tensors = {n: p.data for n, p in self._parameters.items() if p is not None}
        if tensors["weight"].dim() == 4:
            tensors["weight"] = torch.ops.llmq.unpack_panels(
                tensors["weight"], self.scheme.bits, self.out_features, self.in_features
            )
            tensors.update({n: unpack_scales(tensors[n]) for n in _SCALES if n in tensors})
        return tensors

    def _panels(self) -> dict[str, Tensor] | None:
        tensors = {n: p.data for n, p in self._parameters.items() if p is not None}
        weight = tensors["weight"]
        if (
            weight.dim() == 4
            or weight.numel() == 0
            or not dispatch.keeps_panels(weight.device, self.scheme)
        ):
            return None
        tensors["weight"] = torch.ops.llmq.pack_panels(weight, self.scheme.bits)
        if self.scheme.group_size is not None and self.out_features % 16 == 0:
            tensors.update({n: pack_scales(tensors[n]) for n in _SCALES if n in tensors})
        return tensors

    def _op_shape(self) -> dispatch.OpShape:
        scheme = self.scheme
        activations = None if scheme.activations is None else scheme.activation_group_size or 0
        return dispatch.OpShape(scheme.bits, scheme.group_size or 0, activations)

    def kernel(self, M: int, dtype: torch.dtype = torch.float32) -> dispatch.Kernel:
        """Return the kernel that runs for M tokens of `dtype`, with the reason."""
        N, K = self.out_features, self.in_features
        return dispatch.choose(self.scheme.op, self.weight.device, dtype, M, N, K, self._op_shape())

    def config(self) -> dict[str, Any]:
        """Return what `empty_layer` needs to make a layer of these shapes, ready for JSON."""
        return {
            "type": "QuantLinear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": None if self.bias is None else str(self.bias.dtype).removeprefix("torch."),
            "scheme": asdict(self.scheme),
            "shapes": {name: list(t.shape) for name, t in self.canonical().items()},
        }

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme.name}, bias={self.bias is not None}"
        )
