"""The checks of an op's arguments, and their words: of the references, of fakes and of GPUs.

The CPU drivers (`csrc/cpu`) check again what guards memory, in the same words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise ValueError(f"llmq.{op}: {message}")


def check_x(op: str, x: Tensor, *others: Tensor | None) -> int:
    """Return K of x [..., K] after checking its dtype and that the others are where it is."""
    if x.dtype not in _FLOATS:
        raise TypeError(f"llmq.{op}: x must be float32, bfloat16 or float16, got {x.dtype}")
    check(x.dim() >= 1, op, "x must have at least one dimension, got a scalar")
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(
                f"llmq.{op}: x is on {x.device}, a weight tensor on {other.device}; "
                f"move the layer or the input"
            )
    return x.shape[-1]


def check_scale(op: str, K: int, weight_scale: Tensor, bias: Tensor | None) -> int:
    """Return N of weight_scale [N, G] after checking both against K and the bias."""
    check(
        weight_scale.dim() == 2 and weight_scale.dtype == torch.float32,
        op,
        f"weight_scale must be float32 [N, groups], got {weight_scale.dtype} "
        f"{list(weight_scale.shape)}",
    )
    N, G = weight_scale.shape
    check(G > 0 and K % G == 0, op, f"weight_scale has {G} groups, which do not divide K={K}")
    if bias is not None:
        check(bias.shape == (N,), op, f"bias must be [{N}], got {list(bias.shape)}")
    return N


def check_group(op: str, K: int, group_size: int | None) -> None:
    check(
        group_size is None or group_size == 0 or (group_size > 0 and K % group_size == 0),
        op,
        f"activation group size {group_size} does not divide K={K}",
    )


def check_static(op: str, group_size: int | None, K: int, scale: Tensor | None) -> None:
    """Check an activation_scale but for its value: reading that would wait for a GPU."""
    if scale is not None:
        check(
            scale.dtype == torch.float32 and tuple(scale.shape) == (1,),
            op,
            f"activation_scale must be float32 [1], got {scale.dtype} {list(scale.shape)}",
        )
        check(
            group_size == 0 or (group_size == K and K > 0),
            op,
            f"activation_scale is one for all inputs: it goes with an activation group size of 0, "
            f"got {group_size}",
        )


def check_codes(op: str, weight: Tensor, bits: int, N: int, K: int) -> None:
    check(bits in (4, 8), op, f"bits must be 8 or 4, got {bits}")
    if weight.dtype != torch.int8:
        raise TypeError(f"llmq.{op}: weight must be int8, got {weight.dtype}")
    panels = (math.ceil(N / 16), math.ceil(K * bits / 32), 16, 4)
    rows = (N, math.ceil(K * bits / 8))
    check(
        tuple(weight.shape) == (panels if weight.dim() == 4 else rows),
        op,
        f"weight must be {list(rows)} (or panels {list(panels)}) for x [..., {K}] and "
        f"weight_scale of {N} rows, got {list(weight.shape)}",
    )


def check_sparse(
    op: str,
    x: Tensor,
    weight: Tensor,
    N: int,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    group_size: int | None,
    activation_scale: Tensor | None,
) -> None:
    K = check_x(op, x, weight, weight_scale, bias, activation_scale)
    check_group(op, K, group_size)
    check_static(op, group_size, K, activation_scale)
    check(
        (weight.dtype == torch.int8) == (weight_scale is not None),
        op,
        f"int8 values need a weight_scale and floating-point values take none, got {weight.dtype} "
        f"{'without' if weight_scale is None else 'with'} a scale",
    )
    check(group_size is None or weight_scale is not None, op, "int8 activations need int8 values")
    if weight_scale is not None:
        check_scale(op, K, weight_scale, bias)
        check(
            tuple(weight_scale.shape) == (N, 1),
            op,
            f"weight_scale must be [{N}, 1], got {list(weight_scale.shape)}",
        )
