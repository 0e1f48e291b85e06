"""How a linear op becomes one of `torch.ops.llmq`: schema, reference, fake, GPU kernels, backward.

Schemas live here, so the ops exist without a compiled library; native code only registers faster
implementations of the same meaning. In every op x is [..., K] and y [..., N], both float32,
bfloat16 or float16; dot products accumulate in int32 or float32. One class an op: its fields are
the op's arguments, `check` returns N or raises, `op_shape` is what the choice of a kernel asks for,
`reference` computes y from checked arguments, and `dense` is the weight that they stand for,
float32 [N, K], through which gradients flow.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Protocol

import torch
from torch import Tensor

from llmq.runtime import gpu
from llmq.runtime.dispatch import OpShape

library = torch.library.Library("llmq", "DEF")


class LinearOp(Protocol):
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    @property
    def x(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def op_shape(self) -> OpShape: ...
    def check(self) -> int: ...
    def reference(self) -> Tensor: ...
    def dense(self) -> Tensor: ...


@functools.cache
def _print_kernel(op: str, M: int, N: int, K: int) -> None:
    print(f"llmq: {op} M={M} N={N} K={K} -> reference")


def define(schema: str, op: type[LinearOp]) -> None:
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
        y: Tensor = gpu.run(name, tuple(call), call.reference, call.op_shape, N)  # type: ignore[arg-type]
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
        library.define(definition, tags=(torch.Tag.pt2_compliant_tag,))
        defined = definition.split("(")[0]
        library.impl(defined, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"llmq::{defined}", shape, lib=library)
    library.impl(name, cuda, "CUDA")
    torch.library.register_autograd(
        f"llmq::{name}", backward, setup_context=setup_context, lib=library
    )
