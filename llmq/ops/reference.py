"""What the ops' references share: the arithmetic of floating-point and of int8 inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.formats import activation


def canonical(weight: Tensor, bits: int, N: int, K: int) -> Tensor:
    """Return the weight [N, K] or [N, K/2] that CPU panels [P, K/4 or K/8, 16, 4] stand for."""
    return torch.ops.llmq.unpack_panels(weight, bits, N, K) if weight.dim() == 4 else weight


def pack_scales(scale: Tensor) -> Tensor:
    """Return scales or zero points [N, G] as CPU panels [N / 16, G, 16]; 16 divides N."""
    N, G = scale.shape
    return scale.view(N // 16, 16, G).transpose(1, 2).contiguous()


def unpack_scales(scale: Tensor) -> Tensor:
    """Return scales or zero points [N, G], whether or not they stand in panels [N / 16, G, 16]."""
    return scale if scale.dim() != 3 else scale.transpose(1, 2).reshape(-1, scale.shape[1])


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x Wᵀ accumulated in float32 and returned in x's dtype; weight is float32 [N, K]."""
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def coded_linear(
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


def group_of(weight_scale: Tensor, K: int) -> int:
    G = weight_scale.shape[1]
    return K // G if G > 1 else 0
