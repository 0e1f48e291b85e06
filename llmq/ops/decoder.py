"""The op of a whole decoder layer: schema, reference and fake of `torch.ops.llmq.decoder_layer`.

h = x + o(attention(rope(q(n)), rope(k(n)), v(n))) with n = rms_norm(x), then
y = h + down(silu(gate(m)) * up(m)) with m = rms_norm(h): a layer of Llama, Mistral, Qwen2 or Qwen3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.ops.define import library
from llmq.ops.reference import unpack_scales

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) · weight over the last dimension, all in float32."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads x [B, H, T, D] turned by cos and sin [B, T, D] (arXiv:2104.09864)."""
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return attention of q [B, H, T, D] to k, v [B, heads, S, D], each for H / heads of q's.

    Without a mask (bool, or to be added) the last query sees all keys, the one before all but one.
    """
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = scaling * q @ k.transpose(2, 3)
    if mask is None:
        T, S = scores.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -1e30)
    else:
        scores = scores + mask.float().clamp(min=-1e30)
    return F.softmax(scores, -1) @ v


def decoder_layer(
    x: Tensor,
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    weights: list[Tensor],
    weight_scales: list[Tensor],
    weight_zero_points: list[Tensor],
    biases: list[Tensor],
    bits: list[int],
    activation_groups: list[int],
    start: int,
    eps: float,
    scaling: float,
) -> Tensor:
    """Return the layer's output [B, T, K] for x [B, T, K], and write T keys and values to a cache.

    Args:
        x: float32, bfloat16 or float16; the result is of its dtype, what lies between is float32.
        norms: weights [K] before attention and before the MLP; then those [D] of q and k, if any.
        cos, sin: [1 or B, T, D], D the size of a head.
        keys, values: [B, heads, room, D] with at least start + T of room, of x's dtype; tokens from
            `start` on are written.
        mask: [1 or B, 1 or H, T, start + T], bool or to be added to scores; None: causal.
        weights, weight_scales: of the seven linear layers in the order of `LINEARS`, as
            `int8_linear` or `weight_only_linear` takes them.
        weight_zero_points, biases: likewise, empty tensors where there is none; or none at all.
        bits: of each linear layer's codes.
        activation_groups: of each linear layer's int8 inputs, 0 for one scale a token; -1 for
            floating-point inputs.
        start: tokens in the cache before.
        eps: of every norm.
        scaling: of the scores.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    _check(x, weight_scales, cos, keys, start)
    ops = torch.ops.llmq
    (B, T, _), D = x.shape, cos.shape[-1]
    cos, sin = cos.float(), sin.float()

    def linear(i: int, y: Tensor) -> Tensor:
        zero, bias = (
            tensors[i] if tensors and tensors[i].numel() else None
            for tensors in (weight_zero_points, biases)
        )
        group = activation_groups[i]
        scale = weight_scales[i]
        one_scale = scale.dim() == 2 and scale.shape[1] == 1
        if bits[i] == 8 and group >= 0 and zero is None and one_scale:
            result: Tensor = ops.int8_linear(y, weights[i], scale, bias, group)
        else:
            inputs = None if group < 0 else group
            result = ops.weight_only_linear(y, weights[i], scale, zero, bias, bits[i], inputs)
        return result

    def heads(i: int, y: Tensor) -> Tensor:
        return linear(i, y).view(B, T, -1, D).transpose(1, 2)

    hidden = x.float()
    normed = rms_norm(hidden, norms[0], eps)
    q, k, v = (heads(i, normed) for i in range(3))
    if len(norms) == 4:
        q, k = rms_norm(q, norms[2], eps), rms_norm(k, norms[3], eps)
    end = start + T
    keys[:, :, start:end] = rope(k, cos, sin)
    values[:, :, start:end] = v
    seen = (keys[:, :, :end].float(), values[:, :, :end].float())
    mixed = attention(rope(q, cos, sin), *seen, mask, scaling)
    hidden = hidden + linear(3, mixed.transpose(1, 2).reshape(B, T, -1))
    normed = rms_norm(hidden, norms[1], eps)
    hidden = hidden + linear(6, F.silu(linear(4, normed)) * linear(5, normed))
    return hidden.to(x.dtype)


def _check(x: Tensor, weight_scales: list[Tensor], cos: Tensor, keys: Tensor, start: int) -> None:
    wide, narrow = (unpack_scales(weight_scales[i]).shape[0] for i in range(2))
    D, (B, T) = cos.shape[-1], x.shape[:2]
    if D == 0 or wide % D or narrow % D or wide % max(narrow, 1):
        raise ValueError(
            f"llmq.decoder_layer: q gives {wide} and k {narrow} outputs of heads [{D}]"
        )
    if keys.shape[:2] != (B, narrow // D) or keys.shape[2] < start + T or keys.shape[3] != D:
        raise ValueError(
            f"llmq.decoder_layer: keys must be [{B}, {narrow // D}, at least {start + T}, {D}], "
            f"got {list(keys.shape)}"
        )


def _fake(
    x: Tensor,
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    weights: list[Tensor],
    weight_scales: list[Tensor],
    *rest: Any,
) -> Tensor:
    _check(x, weight_scales, cos, keys, start=rest[4])
    return x.new_empty(x.shape)


library.define(
    "decoder_layer(Tensor x, Tensor[] norms, Tensor cos, Tensor sin, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor? mask, Tensor[] weights, Tensor[] weight_scales, "
    "Tensor[] weight_zero_points, Tensor[] biases, int[] bits, int[] activation_groups, "
    "SymInt start, float eps, float scaling) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("decoder_layer", decoder_layer, "CompositeExplicitAutograd")
torch.library.register_fake("llmq::decoder_layer", _fake, lib=library)
