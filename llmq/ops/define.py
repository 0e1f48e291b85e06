"""The ops of `torch.ops.llmq`: schema, argument checks, reference, fake and backward, op by op.

Schemas live here, so the ops exist without a compiled library; native code only registers faster
implementations of the same meaning. In every op x is [..., K] and y [..., N], both float32,
bfloat16 or float16; dot products accumulate in int32 or float32. One class an op: its fields are
the op's arguments, `check` returns N or raises, `form` tells the choice of a kernel what shapes do
not, `reference` computes y from checked arguments, and `dense` is the weight that they stand for,
float32 [N, K], through which gradients flow.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.formats import activation, bitmap, bitmap_tiles, block, codebook, semi_structured, uniform
from llmq.runtime import extension, gpu
from llmq.runtime.dispatch import Format

_library = torch.library.Library("llmq", "DEF")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _LinearOp(Protocol):
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    @property
    def x(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def form(self) -> Format: ...
    def check(self) -> int: ...
    def reference(self) -> Tensor: ...
    def dense(self) -> Tensor: ...


# -- checks --------------------------------------------------------------------------------------


def _check(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise ValueError(f"llmq.{op}: {message}")


def _check_x(op: str, x: Tensor, *others: Tensor | None) -> int:
    """Return K of x [..., K] after checking its dtype and that the others are where it is."""
    if x.dtype not in _FLOATS:
        raise TypeError(f"llmq.{op}: x must be float32, bfloat16 or float16, got {x.dtype}")
    _check(x.dim() >= 1, op, "x must have at least one dimension, got a scalar")
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(
                f"llmq.{op}: x is on {x.device}, a weight tensor on {other.device}; "
                f"move the layer or the input"
            )
    return x.shape[-1]


def _check_scale(op: str, K: int, weight_scale: Tensor, bias: Tensor | None) -> int:
    """Return N of weight_scale [N, G] after checking both against K and the bias."""
    _check(
        weight_scale.dim() == 2 and weight_scale.dtype == torch.float32,
        op,
        f"weight_scale must be float32 [N, groups], got {weight_scale.dtype} "
        f"{list(weight_scale.shape)}",
    )
    N, G = weight_scale.shape
    _check(G > 0 and K % G == 0, op, f"weight_scale has {G} groups, which do not divide K={K}")
    if bias is not None:
        _check(bias.shape == (N,), op, f"bias must be [{N}], got {list(bias.shape)}")
    return N


def _check_group(op: str, K: int, group_size: int | None) -> None:
    _check(
        group_size is None or group_size == 0 or (group_size > 0 and K % group_size == 0),
        op,
        f"activation group size {group_size} does not divide K={K}",
    )


def _check_static(op: str, group_size: int | None, K: int, scale: Tensor | None) -> None:
    """Check an activation_scale but for its value: reading that would wait for a GPU."""
    if scale is not None:
        _check(
            scale.dtype == torch.float32 and tuple(scale.shape) == (1,),
            op,
            f"activation_scale must be float32 [1], got {scale.dtype} {list(scale.shape)}",
        )
        _check(
            group_size == 0 or (group_size == K and K > 0),
            op,
            f"activation_scale is one for all inputs: it goes with an activation group size of 0, "
            f"got {group_size}",
        )


def _check_codes(op: str, weight: Tensor, bits: int, N: int, K: int) -> None:
    _check(bits in (4, 8), op, f"bits must be 8 or 4, got {bits}")
    if weight.dtype != torch.int8:
        raise TypeError(f"llmq.{op}: weight must be int8, got {weight.dtype}")
    panels = (math.ceil(N / 16), math.ceil(K * bits / 32), 16, 4)
    rows = (N, math.ceil(K * bits / 8))
    _check(
        tuple(weight.shape) == (panels if weight.dim() == 4 else rows),
        op,
        f"weight must be {list(rows)} (or panels {list(panels)}) for x [..., {K}] and "
        f"weight_scale of {N} rows, got {list(weight.shape)}",
    )


def _group(weight_scale: Tensor, K: int) -> int:
    G = weight_scale.shape[1]
    return K // G if G > 1 else 0


# -- reference arithmetic ------------------------------------------------------------------------


def _canonical(weight: Tensor, bits: int, N: int, K: int) -> Tensor:
    """Return the weight [N, K] or [N, K/2] that CPU panels [P, K/4 or K/8, 16, 4] stand for."""
    return torch.ops.llmq.unpack_panels(weight, bits, N, K) if weight.dim() == 4 else weight


def pack_scales(scale: Tensor) -> Tensor:
    """Return scales or zero points [N, G] as CPU panels [N / 16, G, 16]; 16 divides N."""
    N, G = scale.shape
    return scale.view(N // 16, 16, G).transpose(1, 2).contiguous()


def unpack_scales(scale: Tensor) -> Tensor:
    """Return scales or zero points [N, G], whether or not they stand in panels [N / 16, G, 16]."""
    return scale if scale.dim() != 3 else scale.transpose(1, 2).reshape(-1, scale.shape[1])


def _float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ accumulated in float32 and returned in x's dtype; weight is float32 [N, K]."""
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _coded_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    activation_scale: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ with int8 inputs and integer weights [N, K] already freed of their zero points."""
    K, N = x.shape[-1], weight_scale.shape[0]
    codes, x_scale = activation.quantize_activation(
        x.reshape(math.prod(x.shape[:-1]), K), group_size, activation_scale
    )
    group = math.gcd(K // weight_scale.shape[1], group_size or K)
    y = torch.zeros(codes.shape[0], N, dtype=torch.float32, device=x.device)
    for start in range(0, K, max(group, 1)):
        dot = torch.zeros(codes.shape[0], N, dtype=torch.int32, device=x.device)
        # |x·w| ≤ 127·255 a term, so float32 adds 512 of them exactly (< 2²⁴).
        for k in range(start, start + group, 512):
            span = slice(k, min(k + 512, start + group))
            dot += (codes[:, span].float() @ weight[:, span].float().T).to(torch.int32)
        x_group = start * x_scale.shape[1] // K
        w_group = start * weight_scale.shape[1] // K
        y += dot.float() * x_scale[:, x_group, None] * weight_scale[None, :, w_group]
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], N)


# -- definition ----------------------------------------------------------------------------------


@functools.cache
def _print_kernel(op: str, M: int, N: int, K: int) -> None:
    print(f"llmq: {op} M={M} N={N} K={K} -> reference")


def _define(schema: str, op: type[_LinearOp]) -> None:
    """Define the linear op `schema`; its reference serves every device without a kernel.

    Inputs that are quantized on the fly pass their gradient straight through (the straight-through
    estimator of Bengio et al., arXiv:1308.3432).
    """
    name = schema.split("(")[0]
    bias_at: int = op._fields.index("bias")  # type: ignore[attr-defined]

    def reference(*args: Any, **kwargs: Any) -> Tensor:
        call = op(*args, **kwargs)
        N, K = call.check(), call.x.shape[-1]
        if os.environ.get("LLMQ_PRINT_KERNELS") == "1":
            _print_kernel(name, call.x.numel() // max(K, 1), N, K)
        return call.reference()

    def cuda(*args: Any, **kwargs: Any) -> Tensor:
        call = op(*args, **kwargs)
        N = call.check()
        y: Tensor = gpu.run(name, tuple(call), call.reference, call.form, N)  # type: ignore[arg-type]
        return y

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        call = op(*args, **kwargs)
        return call.x.new_empty(*call.x.shape[:-1], call.check())

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *rest = inputs
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in rest))
        ctx.constants = [None if isinstance(value, Tensor) else value for value in rest]
        ctx.K = x.shape[-1]

    # An op of its own, since decoding checks the data, which a compiler that traces cannot.
    def x_grad(grad: Tensor, K: int, *rest: Any) -> Tensor:
        return (grad.float() @ op(grad.new_empty(0, K), *rest).dense()).to(grad.dtype)

    def x_grad_fake(grad: Tensor, K: int, *rest: Any) -> Tensor:
        return grad.new_empty(*grad.shape[:-1], K)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rest = [
            constant if tensor is None else tensor
            for tensor, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)
        ]
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            grads[0] = getattr(torch.ops.llmq, f"{name}_x_grad")(grad, ctx.K, *rest)
        # Arguments left at their defaults, a missing bias among them, are not passed on to here.
        if any(ctx.needs_input_grad[bias_at : bias_at + 1]):
            summed = grad.reshape(-1, grad.shape[-1]).float().sum(0)
            grads[bias_at] = summed.to(rest[bias_at - 1].dtype)
        return tuple(grads)

    grad_schema = schema.replace(f"{name}(Tensor x", f"{name}_x_grad(Tensor grad, int K")
    for definition, implementation, shape in (
        (schema, reference, fake),
        (grad_schema, x_grad, x_grad_fake),
    ):
        _library.define(definition, tags=(torch.Tag.pt2_compliant_tag,))
        defined = definition.split("(")[0]
        _library.impl(defined, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"llmq::{defined}", shape, lib=_library)
    _library.impl(name, cuda, "CUDA")
    torch.library.register_autograd(
        f"llmq::{name}", backward, setup_context=setup_context, lib=_library
    )


# -- quantize_activation: symmetric int8 codes, a float32 scale a token or group, or a given one ---


def _check_quantize(x: Tensor, group_size: int, scale: Tensor | None) -> None:
    op = "quantize_activation"
    K = _check_x(op, x, scale)
    _check_group(op, K, group_size)
    _check_static(op, group_size, K, scale)


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
    form = Format(activation_group=group_size)
    codes, scale = gpu.run("quantize_activation", arguments, reference, form, 1)
    return codes, scale


def _quantize_activation_fake(
    x: Tensor, group_size: int = 0, activation_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_quantize(x, group_size, activation_scale)
    groups = x.shape[-1] // group_size if group_size else 1
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty(*x.shape[:-1], groups, dtype=torch.float32)


_library.define(
    "quantize_activation(Tensor x, int group_size=0, Tensor? activation_scale=None) "
    "-> (Tensor, Tensor)"
)
_library.impl("quantize_activation", _quantize_activation, "CompositeExplicitAutograd")
_library.impl("quantize_activation", _quantize_activation_cuda, "CUDA")
torch.library.register_fake("llmq::quantize_activation", _quantize_activation_fake, lib=_library)


# -- int8_linear (W8A8): exact int32 dots of codes, then x_scale · weight_scale + bias -------------
# With an activation_scale [1], as a calibration has measured it, that is every token's x_scale.


class _Int8Linear(NamedTuple):
    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    activation_group_size: int = 0
    activation_scale: Tensor | None = None

    def check(self) -> int:
        op = "int8_linear"
        others = (self.weight, self.weight_scale, self.bias, self.activation_scale)
        K = _check_x(op, self.x, *others)
        N = _check_scale(op, K, self.weight_scale, self.bias)
        _check(
            self.weight_scale.shape[1] == 1,
            op,
            f"weight_scale must be [{N}, 1], got {list(self.weight_scale.shape)}; "
            f"weight_only_linear takes groups",
        )
        _check_codes(op, self.weight, 8, N, K)
        _check_group(op, K, self.activation_group_size)
        _check_static(op, self.activation_group_size, K, self.activation_scale)
        return N

    @property
    def form(self) -> Format:
        return Format(activation_group=self.activation_group_size)

    def reference(self) -> Tensor:
        codes = _canonical(self.weight, 8, self.weight_scale.shape[0], self.x.shape[-1])
        group, scale = self.activation_group_size, self.activation_scale
        return _coded_linear(self.x, codes, self.weight_scale, self.bias, group, scale)

    def dense(self) -> Tensor:
        K = self.x.shape[-1]
        codes = _canonical(self.weight, 8, self.weight_scale.shape[0], K)
        return uniform.decode(codes, self.weight_scale, None, bits=8, K=K)


_define(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
    "int activation_group_size=0, Tensor? activation_scale=None) -> Tensor",
    _Int8Linear,
)


# -- weight_only_linear (W8A16, W4A16; with int8 activations W4A8): dequantized on the fly ---------


class _WeightOnlyLinear(NamedTuple):
    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None = None
    bias: Tensor | None = None
    bits: int = 8
    activation_group_size: int | None = None

    def check(self) -> int:
        op, zero_point = "weight_only_linear", self.weight_zero_point
        K = _check_x(op, self.x, self.weight, self.weight_scale, zero_point, self.bias)
        N = _check_scale(op, K, unpack_scales(self.weight_scale), self.bias)
        if zero_point is not None:
            _check(
                zero_point.shape == self.weight_scale.shape and zero_point.dtype == torch.int8,
                op,
                f"weight_zero_point must be int8 {list(self.weight_scale.shape)} as weight_scale, "
                f"got {zero_point.dtype} {list(zero_point.shape)}",
            )
        _check_codes(op, self.weight, self.bits, N, K)
        _check_group(op, K, self.activation_group_size)
        return N

    @property
    def form(self) -> Format:
        group = _group(self.weight_scale, self.x.shape[-1])
        return Format(self.bits, group, self.activation_group_size)

    def _decode(self, scale: Tensor) -> Tensor:
        K = self.x.shape[-1]
        codes = _canonical(self.weight, self.bits, scale.shape[0], K)
        zero_point = self.weight_zero_point
        zero_point = None if zero_point is None else unpack_scales(zero_point)
        return uniform.decode(codes, scale, zero_point, bits=self.bits, K=K)

    def reference(self) -> Tensor:
        if self.activation_group_size is None:
            return _float_linear(self.x, self.dense(), self.bias)
        scale = unpack_scales(self.weight_scale)
        integers = self._decode(torch.ones_like(scale))
        return _coded_linear(self.x, integers, scale, self.bias, self.activation_group_size)

    def dense(self) -> Tensor:
        return self._decode(unpack_scales(self.weight_scale))


_define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_zero_point=None, Tensor? bias=None, int bits=8, "
    "int? activation_group_size=None) -> Tensor",
    _WeightOnlyLinear,
)


# -- codebook_linear (quantile): looked up on the fly ---------------------------------------------


class _CodebookLinear(NamedTuple):
    x: Tensor
    weight: Tensor
    weight_codebook: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    bits: int = 8

    def check(self) -> int:
        op, table = "codebook_linear", self.weight_codebook
        K = _check_x(op, self.x, self.weight, table, self.weight_scale, self.bias)
        N = _check_scale(op, K, unpack_scales(self.weight_scale), self.bias)
        _check_codes(op, self.weight, self.bits, N, K)
        _check(
            table.dtype == torch.float32
            and tuple(table.shape) in ((1, 2**self.bits), (N, 2**self.bits)),
            op,
            f"weight_codebook must be float32 [1 or {N}, {2**self.bits}], got {table.dtype} "
            f"{list(table.shape)}",
        )
        return N

    @property
    def form(self) -> Format:
        return Format(self.bits, _group(self.weight_scale, self.x.shape[-1]))

    def reference(self) -> Tensor:
        return _float_linear(self.x, self.dense(), self.bias)

    def dense(self) -> Tensor:
        K, scale = self.x.shape[-1], unpack_scales(self.weight_scale)
        codes = _canonical(self.weight, self.bits, scale.shape[0], K)
        return codebook.decode(codes, self.weight_codebook, scale, bits=self.bits, K=K)


_define(
    "codebook_linear(Tensor x, Tensor weight, Tensor weight_codebook, Tensor weight_scale, "
    "Tensor? bias=None, int bits=8) -> Tensor",
    _CodebookLinear,
)


# -- sparse linears: unstructured (bitmap), 2:4, block --------------------------------------------
# They differ in how values and positions are stored; decoded to [N, K], they compute the same.


def _check_sparse(
    op: str,
    x: Tensor,
    weight: Tensor,
    N: int,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    group_size: int | None,
    activation_scale: Tensor | None,
) -> None:
    K = _check_x(op, x, weight, weight_scale, bias, activation_scale)
    _check_group(op, K, group_size)
    _check_static(op, group_size, K, activation_scale)
    _check(
        (weight.dtype == torch.int8) == (weight_scale is not None),
        op,
        f"int8 values need a weight_scale and floating-point values take none, got {weight.dtype} "
        f"{'without' if weight_scale is None else 'with'} a scale",
    )
    _check(group_size is None or weight_scale is not None, op, "int8 activations need int8 values")
    if weight_scale is not None:
        _check_scale(op, K, weight_scale, bias)
        _check(
            tuple(weight_scale.shape) == (N, 1),
            op,
            f"weight_scale must be [{N}, 1], got {list(weight_scale.shape)}",
        )


def _sparse_linear(
    x: Tensor,
    values: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    group_size: int | None,
    activation_scale: Tensor | None,
) -> Tensor:
    if weight_scale is None or group_size is None:
        return _float_linear(x, _scaled(values, weight_scale), bias)
    return _coded_linear(x, values, weight_scale, bias, group_size, activation_scale)


def _scaled(values: Tensor, weight_scale: Tensor | None) -> Tensor:
    return values.float() if weight_scale is None else values.float() * weight_scale


class _BitmapSparseLinear(NamedTuple):
    x: Tensor
    weight: Tensor
    weight_bitmask: Tensor
    row_offsets: Tensor
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    activation_group_size: int | None = None
    activation_scale: Tensor | None = None

    def _rows(self) -> int:
        # In panels the offsets are of panels, not of rows; those always come with a scale. In tiles
        # they are of strips of 32 rows, of which there are whole ones without a scale.
        if self.weight_scale is not None:
            return self.weight_scale.shape[0]
        strips = self.weight_bitmask.dim() == 4
        return 32 * self.row_offsets.shape[0] if strips else self.row_offsets.numel() - 1

    def check(self) -> int:
        inputs = (self.activation_group_size, self.activation_scale)
        op, N = "bitmap_sparse_linear", self._rows()
        _check_sparse(op, self.x, self.weight, N, self.weight_scale, self.bias, *inputs)
        return N

    @property
    def form(self) -> Format:
        tiles = self.weight_bitmask.dim() == 4
        return Format(8 * self.weight.element_size(), 0, self.activation_group_size, tiles)

    def _values(self) -> Tensor:
        stored = (self.weight, self.weight_bitmask, self.row_offsets)
        K = self.x.shape[-1]
        if self.weight_bitmask.dim() == 3:
            stored = torch.ops.llmq.unpack_bitmap_panels(*stored, self._rows(), K)
        elif self.weight_bitmask.dim() == 4:
            stored = bitmap_tiles.unpack(*stored, self._rows(), K)
        return bitmap.decode(*stored, K)

    def reference(self) -> Tensor:
        inputs = (self.activation_group_size, self.activation_scale)
        return _sparse_linear(self.x, self._values(), self.weight_scale, self.bias, *inputs)

    def dense(self) -> Tensor:
        return _scaled(self._values(), self.weight_scale)


_define(
    "bitmap_sparse_linear(Tensor x, Tensor weight, Tensor weight_bitmask, Tensor row_offsets, "
    "Tensor? weight_scale=None, Tensor? bias=None, int? activation_group_size=None, "
    "Tensor? activation_scale=None) -> Tensor",
    _BitmapSparseLinear,
)


class _SemiStructuredLinear(NamedTuple):
    x: Tensor
    weight: Tensor
    weight_meta: Tensor
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    activation_group_size: int | None = None
    activation_scale: Tensor | None = None

    def check(self) -> int:
        inputs = (self.activation_group_size, self.activation_scale)
        op, N = "semi_structured_linear", self.weight.shape[0]
        _check_sparse(op, self.x, self.weight, N, self.weight_scale, self.bias, *inputs)
        return N

    @property
    def form(self) -> Format:
        return Format(8 * self.weight.element_size(), 0, self.activation_group_size)

    def _values(self) -> Tensor:
        return semi_structured.decode(self.weight, self.weight_meta, self.x.shape[-1])

    def reference(self) -> Tensor:
        inputs = (self.activation_group_size, self.activation_scale)
        return _sparse_linear(self.x, self._values(), self.weight_scale, self.bias, *inputs)

    def dense(self) -> Tensor:
        return _scaled(self._values(), self.weight_scale)


_define(
    "semi_structured_linear(Tensor x, Tensor weight, Tensor weight_meta, "
    "Tensor? weight_scale=None, Tensor? bias=None, int? activation_group_size=None, "
    "Tensor? activation_scale=None) -> Tensor",
    _SemiStructuredLinear,
)


class _BlockSparseLinear(NamedTuple):
    x: Tensor
    weight: Tensor
    block_index: Tensor
    block_offsets: Tensor
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    activation_group_size: int | None = None
    activation_scale: Tensor | None = None

    def _rows(self) -> int:
        return (self.block_offsets.numel() - 1) * self.weight.shape[1]

    def check(self) -> int:
        inputs = (self.activation_group_size, self.activation_scale)
        op, N = "block_sparse_linear", self._rows()
        _check_sparse(op, self.x, self.weight, N, self.weight_scale, self.bias, *inputs)
        return N

    @property
    def form(self) -> Format:
        return Format(8 * self.weight.element_size(), 0, self.activation_group_size)

    def _values(self) -> Tensor:
        K, N = self.x.shape[-1], self._rows()
        return block.decode(self.weight, self.block_index, self.block_offsets, K, N)

    def reference(self) -> Tensor:
        inputs = (self.activation_group_size, self.activation_scale)
        return _sparse_linear(self.x, self._values(), self.weight_scale, self.bias, *inputs)

    def dense(self) -> Tensor:
        return _scaled(self._values(), self.weight_scale)


_define(
    "block_sparse_linear(Tensor x, Tensor weight, Tensor block_index, Tensor block_offsets, "
    "Tensor? weight_scale=None, Tensor? bias=None, int? activation_group_size=None, "
    "Tensor? activation_scale=None) -> Tensor",
    _BlockSparseLinear,
)


# -- native only: the CPU kernels' weight layouts and their instruction set -----------------------

_library.define("pack_panels(Tensor weight, int bits) -> Tensor")
_library.define("unpack_panels(Tensor packed, int bits, int N, int K) -> Tensor")
_library.define(
    "pack_bitmap_panels(Tensor weight, Tensor weight_bitmask, Tensor row_offsets, int K) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "unpack_bitmap_panels(Tensor weight, Tensor weight_bitmask, Tensor panel_offsets, int N, "
    "int K) -> (Tensor, Tensor, Tensor)"
)
_library.define("cpu_isa() -> str")
_library.define("set_cpu_isa(str isa) -> ()")

# Of CUDA tensors, with the arguments of the op that they stand for; called by `runtime/gpu.py`.
_library.define(
    "cuda_quantize_activation(Tensor x, int group_size, Tensor? activation_scale=None) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "cuda_int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "int activation_group_size, Tensor? activation_scale=None) -> Tensor"
)
_library.define(
    "cuda_weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_zero_point, Tensor? bias, int bits, int? activation_group_size) -> Tensor"
)
_library.define(
    "cuda_semi_structured_linear(Tensor x, Tensor weight, Tensor weight_meta, "
    "Tensor? weight_scale, Tensor? bias, int? activation_group_size, "
    "Tensor? activation_scale=None) -> Tensor"
)
_library.define(
    "cuda_bitmap_sparse_linear(Tensor x, Tensor weight, Tensor weight_bitmask, Tensor row_offsets, "
    "Tensor? weight_scale, Tensor? bias, int? activation_group_size, "
    "Tensor? activation_scale=None) -> Tensor"
)
_library.define(
    "cuda_expand_bitmap(Tensor weight, Tensor weight_bitmask, Tensor row_offsets, int N, int K) "
    "-> Tensor"
)

extension.load()
