"""Runs an op on CUDA tensors: asks `dispatch` which kernel, and calls it with the op's arguments.

Triton's are functions of `llmq_kernels`, imported when first needed; CUDA's are ops of the compiled
library, `cuda_<op>`. Both take the arguments of the op they stand for: already checked, no size 0,
x as it lies and all other tensors contiguous. Many tokens of a weight in bitmap tiles go by the op
of dense weights, which asks anew. Nothing here waits for the GPU or reads from it, so
calls can be captured in graphs.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.runtime import dispatch


def run(
    op: str,
    arguments: tuple[Any, ...],
    reference: Callable[[], Any],
    op_shape: dispatch.OpShape,
    N: int,
) -> Any:
    """Return what `op` gives for `arguments`, x [..., K] first.

    Args:
        op: name of an op in `torch.ops.llmq`.
        arguments: all of its arguments, checked.
        reference: computes the same where no kernel does.
        op_shape: of the weight and the inputs.
        N: output features.
    """
    x = arguments[0]
    K = x.shape[-1]
    M = x.numel() // K if K else 0
    kernel = dispatch.choose_gpu(op, x.device.index, x.dtype, M, N, K, op_shape)
    if os.environ.get("LLMQ_PRINT_KERNELS") == "1":
        _print(op, M, N, K, kernel)
    if kernel.name == "reference":
        return reference()
    call = _function(op, kernel.name)
    rest = (a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments[1:])
    arguments = (x, *rest)
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return call(*arguments)
    with torch.cuda.device(x.device):  # kernels launch on the current device's current stream
        return call(*arguments)


@functools.cache
def _function(op: str, kernel: str) -> Callable[..., Any]:
    if kernel.endswith("_cuda"):
        return getattr(torch.ops.llmq, f"cuda_{op}").default
    if kernel.endswith("_dense"):
        return _expanded
    module = importlib.import_module(f"llmq_kernels.{dispatch.TRITON_MODULES[op]}")
    return getattr(module, op)


def _expanded(
    x: Tensor,
    weight: Tensor,
    weight_bitmask: Tensor,
    row_offsets: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    group_size: int | None,
    activation_scale: Tensor | None,
) -> Tensor:
    """Compute `bitmap_sparse_linear` of a weight in bitmap tiles, written out as a dense one."""
    ops, K = torch.ops.llmq, x.shape[-1]
    N = 32 * weight_bitmask.shape[0] if weight_scale is None else weight_scale.shape[0]
    dense = ops.cuda_expand_bitmap(weight, weight_bitmask, row_offsets, N, K)
    y: Tensor
    if weight_scale is None:
        y = F.linear(x, dense, bias)
    elif group_size is None:
        y = ops.weight_only_linear(x, dense, weight_scale, None, bias)
    else:
        y = ops.int8_linear(x, dense, weight_scale, bias, group_size, activation_scale)
    return y


@functools.cache
def _print(op: str, M: int, N: int, K: int, kernel: dispatch.Kernel) -> None:
    print(f"llmq: {op} M={M} N={N} K={K} -> {kernel.name}")
