"""The op of a whole decoder layer: schema, reference and fake of `torch.ops.llmq.decoder_layer`.

h = x + o(attention(rope(q(n)), rope(k(n)), v(n))) with n = rms_norm(x), then
y = h + down(silu(gate(m)) * up(m)) with m = rms_norm(h): a layer of Llama, Mistral, Qwen2 or Qwen3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.ops.checks import check, check_width
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
    _check(x, norms, cos, sin, keys, values, mask, weights, weight_scales, start)
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


def _check(
    x: Tensor,
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    weights: list[Tensor],
    weight_scales: list[Tensor],
    start: int,
) -> None:
    op = "decoder_layer"
    check(x.dim() == 3, op, f"x must be [batch, tokens, K], got {list(x.shape)}")
    check(start >= 0, op, f"start must not be negative, got {start}")
    (B, T, K), D = x.shape, cos.shape[-1]
    check(len(norms) in (2, 4), op, f"norms must be 2 or 4, got {len(norms)}")
    for tensors in (weights, weight_scales):
        message = f"a layer has 7 linear layers, got {len(tensors)} tensors of a kind"
        check(len(tensors) == len(LINEARS), op, message)
    check_width(op, K, norms[0].numel())
    q, k, v, o, gate, up, down = (unpack_scales(scale).shape[0] for scale in weight_scales)
    check(
        D > 0
        and D % 2 == 0
        and q % D == k % D == 0
        and k > 0
        and q % k == 0
        and v == k
        and gate == up
        and o == down == K,
        op,
        f"the linear layers do not fit each other, x [..., {K}] and heads of {D}",
    )
    for angles in (cos, sin):
        fits = angles.shape in ((1, T, D), (B, T, D))
        check(fits, op, f"cos and sin must be [1 or {B}, {T}, {D}], got {list(angles.shape)}")
    S, H = start + T, k // D
    for name, cache in (("keys", keys), ("values", values)):
        shape = list(cache.shape)
        fits = len(shape) == 4 and shape[:2] == [B, H] and shape[2] >= S and shape[3] == D
        check(fits, op, f"{name} must be [{B}, {H}, at least {S}, {D}], got {shape}")
    if mask is not None:
        shape, heads = list(mask.shape), q // D
        fits = len(shape) == 4 and shape[0] in (1, B) and shape[1] in (1, heads)
        message = f"mask must be [1 or {B}, 1 or {heads}, {T}, {S}], got {shape}"
        check(fits and shape[2:] == [T, S], op, message)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    _check(x, *(*rest[:8], rest[12]))
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
