"""What the arguments of an op must be: shapes, dtypes and devices, never values.

Every fault is a `ValueError` that names the op, what was given and what is expected. That holds
for wrong dtypes, too: native code under torch's stable ABI can raise nothing that becomes a
`TypeError`.
These checks run for references, fakes and GPUs; the CPU drivers (`csrc/cpu`) check the same in the
same words before they read memory. `tests/ops/test_arguments.py` holds both to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, op: str, message: str) -> None:
    """Raise `ValueError` unless the condition holds."""
    if not condition:
        raise ValueError(f"llmq.{op}: {message}")


def shown(tensor: Tensor) -> str:
    """Return dtype and shape of a tensor as errors give them: `int8 [4, 8]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless a tensor is of a dtype that kernels read as floating point."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    message = f"{name} must be float32, bfloat16 or float16, got {dtype}"
    check(tensor.dtype in FLOATS, op, message)


def check_x(op: str, x: Tensor, *others: Tensor | None) -> int:
    """Return K of x [..., K] after checking its dtype and that the others are where it is."""
    check(x.dim() >= 1, op, "x must have at least one dimension, got a scalar")
    check(x.dim() <= 64, op, f"x must have at most 64 dimensions, got {x.dim()}")
    check_float(op, "x", x)
    for other in others:
        if other is not None and other.device != x.device:
            check(
                False,
                op,
                f"x is on {x.device}, a weight tensor on {other.device}; move the layer or the "
                f"input",
            )
    return x.shape[-1]


def check_width(op: str, K: int, units: int, size: int = 1) -> None:
    """Raise unless K inputs fill `units` of `size` inputs each, the last one at least in part."""
    most, least = units * size, max((units - 1) * size + 1, 0)
    if not least <= K <= most:
        expected = str(most) if size == 1 or units == 0 else f"{least} to {most}"
        check(False, op, f"expected {expected} input features, got {K}")


def check_codes(op: str, weight: Tensor, bits: int, N: int, K: int) -> None:
    """Raise unless `weight` holds N rows of K codes: rows of bytes, or CPU panels of 16 rows."""
    check(bits in (4, 8), op, f"bits must be 8 or 4, got {bits}")
    panels = weight.dim() == 4 and tuple(weight.shape[2:]) == (16, 4)
    check(
        weight.dtype == torch.int8 and (panels or weight.dim() == 2),
        op,
        f"weight must be int8 [N, K] or [N, K / 2], or panels [N / 16, blocks, 16, 4], got "
        f"{shown(weight)}",
    )
    check_width(op, K, weight.shape[1], (32 if panels else 8) // bits)
    rows = (N + 15) // 16 if panels else N
    check(
        weight.shape[0] == rows,
        op,
        f"weight must have {rows} {'panels' if panels else 'rows'} for {N} output features, got "
        f"{weight.shape[0]}",
    )


def check_channel_scale(op: str, weight_scale: Tensor) -> int:
    """Return N of a weight_scale float32 [N, 1]."""
    good = weight_scale.dtype == torch.float32 and weight_scale.dim() == 2
    message = f"weight_scale must be float32 [N, 1], got {shown(weight_scale)}"
    check(good and weight_scale.shape[1] == 1, op, message)
    return weight_scale.shape[0]


def check_group_scale(op: str, weight_scale: Tensor) -> int:
    """Return N of a weight_scale [N, G], or in panels [N / 16, G, 16]."""
    shape = tuple(weight_scale.shape)
    panels = len(shape) == 3 and shape[2] == 16
    check(
        weight_scale.dtype == torch.float32 and (panels or len(shape) == 2),
        op,
        f"weight_scale must be float32 [N, groups] or panels [N / 16, groups, 16], got "
        f"{shown(weight_scale)}",
    )
    return shape[0] * (16 if panels else 1)


def check_groups(op: str, weight_scale: Tensor, K: int) -> None:
    """Raise unless the groups of a weight_scale divide K."""
    G = weight_scale.shape[1]
    check(G > 0 and K % G == 0, op, f"weight_scale has {G} groups, which do not divide K={K}")


def check_bias(op: str, bias: Tensor | None, N: int) -> None:
    """Raise unless a bias is floating point [N]."""
    if bias is not None:
        check(bias.shape == (N,), op, f"bias must be [{N}], got {list(bias.shape)}")
        check_float(op, "bias", bias)


def check_activations(op: str, K: int, group_size: int | None, scale: Tensor | None = None) -> None:
    """Check how inputs are coded, but for a scale's value: reading that would wait for a GPU."""
    check(
        not group_size or (group_size > 0 and K % group_size == 0),
        op,
        f"activation group size {group_size} does not divide K={K}",
    )
    if scale is not None:
        good = scale.dtype == torch.float32 and tuple(scale.shape) == (1,)
        check(good, op, f"activation_scale must be float32 [1], got {shown(scale)}")
        check(
            group_size is not None and group_size in (0, K),
            op,
            f"activation_scale goes with an activation group size of 0, got {group_size}",
        )


def check_sparse(
    op: str,
    x: Tensor,
    weight: Tensor,
    positions: tuple[Tensor, ...],
    weight_scale: Tensor | None,
    bias: Tensor | None,
    group_size: int | None,
    activation_scale: Tensor | None,
) -> int:
    """Return K, having checked all that does not depend on N or on how positions are stored."""
    K = check_x(op, x, weight, *positions, weight_scale, bias, activation_scale)
    check_activations(op, K, group_size, activation_scale)
    check(
        (weight.dtype == torch.int8) == (weight_scale is not None),
        op,
        f"int8 values need a weight_scale and floating-point values take none, got "
        f"{str(weight.dtype).removeprefix('torch.')} "
        f"{'without' if weight_scale is None else 'with'} a scale",
    )
    check(group_size is None or weight_scale is not None, op, "int8 activations need int8 values")
    if weight_scale is None:
        check_float(op, "weight", weight)
    else:
        check_channel_scale(op, weight_scale)
    return K
