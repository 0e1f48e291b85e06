"""The ops of dense weights, and `quantize_activation`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats import activation, codebook, uniform
from llmq.ops.checks import (
    check,
    check_activations,
    check_bias,
    check_channel_scale,
    check_codes,
    check_group_scale,
    check_groups,
    check_x,
    shown,
)
from llmq.ops.define import define, library
from llmq.ops.reference import canonical, coded_linear, float_linear, group_of, unpack_scales
from llmq.runtime import gpu
from llmq.runtime.dispatch import OpShape

# -- quantize_activation: symmetric int8 codes, a float32 scale a token or group, or a given one ---


def _check_quantize(x: Tensor, group_size: int, scale: Tensor | None) -> None:
    op = "quantize_activation"
    check_activations(op, check_x(op, x, scale), group_size, scale)


def _quantize_activation(
    x: Tensor, group_size: int = 0, activation_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_quantize(x, group_size, activation_scale)
    return activation.quantize_activation(x, group_size, activation_scale)


def _quantize_activation_cuda(
    x: Tensor, group_size: int = 0, activation_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_quantize(x, group_size, activation_scale)
    arguments = (x, group_size, activation_scale)
    reference = functools.partial(activation.quantize_activation, *arguments)
    op_shape = OpShape(activation_group=group_size)
    codes, scale = gpu.run("quantize_activation", arguments, reference, op_shape, 1)
    return codes, scale


def _quantize_activation_fake(
    x: Tensor, group_size: int = 0, activation_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_quantize(x, group_size, activation_scale)
    groups = x.shape[-1] // group_size if group_size else 1
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty(*x.shape[:-1], groups, dtype=torch.float32)


library.define(
    "quantize_activation(Tensor x, int group_size=0, Tensor? activation_scale=None) "
    "-> (Tensor, Tensor)"
)
library.impl("quantize_activation", _quantize_activation, "CompositeExplicitAutograd")
library.impl("quantize_activation", _quantize_activation_cuda, "CUDA")
torch.library.register_fake("llmq::quantize_activation", _quantize_activation_fake, lib=library)


# -- int8_linear (W8A8): exact int32 dots of codes, then x_scale · weight_scale + bias -------------
# With an activation_scale [1], as a calibration has measured it, that is every token's x_scale.


class Int8Linear(NamedTuple):
    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    activation_group_size: int = 0
    activation_scale: Tensor | None = None

    def check(self) -> int:
        op, scale = "int8_linear", self.activation_scale
        K = check_x(op, self.x, self.weight, self.weight_scale, self.bias, scale)
        N = check_channel_scale(op, self.weight_scale)
        check_codes(op, self.weight, 8, N, K)
        check_activations(op, K, self.activation_group_size, scale)
        check_bias(op, self.bias, N)
        return N

    @property
    def op_shape(self) -> OpShape:
        return OpShape(activation_group=self.activation_group_size)

    def reference(self) -> Tensor:
        codes = canonical(self.weight, 8, self.weight_scale.shape[0], self.x.shape[-1])
        group, scale = self.activation_group_size, self.activation_scale
        return coded_linear(self.x, codes, self.weight_scale, self.bias, group, scale)

    def dense(self) -> Tensor:
        K = self.x.shape[-1]
        codes = canonical(self.weight, 8, self.weight_scale.shape[0], K)
        return uniform.decode(codes, self.weight_scale, None, bits=8, K=K)


define(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
    "int activation_group_size=0, Tensor? activation_scale=None) -> Tensor",
    Int8Linear,
)


# -- weight_only_linear (W8A16, W4A16; with int8 activations W4A8): dequantized on the fly ---------


class WeightOnlyLinear(NamedTuple):
    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None = None
    bias: Tensor | None = None
    bits: int = 8
    activation_group_size: int | None = None

    def check(self) -> int:
        op, scale, zero_point = "weight_only_linear", self.weight_scale, self.weight_zero_point
        K = check_x(op, self.x, self.weight, scale, zero_point, self.bias)
        N = check_group_scale(op, scale)
        check_codes(op, self.weight, self.bits, N, K)
        check_groups(op, scale, K)
        if zero_point is not None:
            check(
                zero_point.shape == scale.shape and zero_point.dtype == torch.int8,
                op,
                f"weight_zero_point must be int8 {list(scale.shape)} as weight_scale, got "
                f"{shown(zero_point)}",
            )
        check_activations(op, K, self.activation_group_size)
        check_bias(op, self.bias, N)
        return N

    @property
    def op_shape(self) -> OpShape:
        group = group_of(self.weight_scale, self.x.shape[-1])
        return OpShape(self.bits, group, self.activation_group_size)

    def _decode(self, scale: Tensor) -> Tensor:
        K = self.x.shape[-1]
        codes = canonical(self.weight, self.bits, scale.shape[0], K)
        zero_point = self.weight_zero_point
        zero_point = None if zero_point is None else unpack_scales(zero_point)
        return uniform.decode(codes, scale, zero_point, bits=self.bits, K=K)

    def reference(self) -> Tensor:
        if self.activation_group_size is None:
            return float_linear(self.x, self.dense(), self.bias)
        scale = unpack_scales(self.weight_scale)
        integers = self._decode(torch.ones_like(scale))
        return coded_linear(self.x, integers, scale, self.bias, self.activation_group_size)

    def dense(self) -> Tensor:
        return self._decode(unpack_scales(self.weight_scale))


define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_zero_point=None, Tensor? bias=None, int bits=8, "
    "int? activation_group_size=None) -> Tensor",
    WeightOnlyLinear,
)


# -- codebook_linear (quantile): looked up on the fly ---------------------------------------------


class CodebookLinear(NamedTuple):
    x: Tensor
    weight: Tensor
    weight_codebook: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    bits: int = 8

    def check(self) -> int:
        op, table = "codebook_linear", self.weight_codebook
        K = check_x(op, self.x, self.weight, table, self.weight_scale, self.bias)
        N = check_group_scale(op, self.weight_scale)
        check_codes(op, self.weight, self.bits, N, K)
        check_groups(op, self.weight_scale, K)
        size = 2**self.bits
        check(
            table.dtype == torch.float32 and tuple(table.shape) in ((1, size), (N, size)),
            op,
            f"weight_codebook must be float32 [1 or {N}, {size}], got {shown(table)}",
        )
        check_bias(op, self.bias, N)
        return N

    @property
    def op_shape(self) -> OpShape:
        return OpShape(self.bits, group_of(self.weight_scale, self.x.shape[-1]))

    def reference(self) -> Tensor:
        return float_linear(self.x, self.dense(), self.bias)

    def dense(self) -> Tensor:
        K, scale = self.x.shape[-1], unpack_scales(self.weight_scale)
        codes = canonical(self.weight, self.bits, scale.shape[0], K)
        return codebook.decode(codes, self.weight_codebook, scale, bits=self.bits, K=K)


define(
    "codebook_linear(Tensor x, Tensor weight, Tensor weight_codebook, Tensor weight_scale, "
    "Tensor? bias=None, int bits=8) -> Tensor",
    CodebookLinear,
)
