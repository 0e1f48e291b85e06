"""A Llama of random weights, in plain torch with a static cache: what a GPU takes for whole models.

Random weights cost what trained ones do, and no model hub is needed. Decoding is one captured step
of one token against a cache of fixed length, as serving engines do it; prefill is one pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmq
from benchmarks import gpu_timing


class Shape(NamedTuple):
    """Sizes of a Llama."""

    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    layers: int
    vocabulary: int
    prompt: int = 2048


SHAPES = {
    "tiny": Shape(128, 4, 2, 256, 2, 100, 8),
    "smollm2-135m": Shape(576, 9, 3, 1536, 30, 49152),
    "llama-3-8b": Shape(4096, 32, 8, 14336, 32, 128256),
}


def _linear(K: int, N: int) -> nn.Linear:
    return nn.Linear(K, N, bias=False)


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.width = shape, shape.hidden // shape.heads
        kv = shape.kv_heads * self.width
        self.input_norm, self.mlp_norm = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.q_proj = _linear(shape.hidden, shape.hidden)
        self.k_proj, self.v_proj = _linear(shape.hidden, kv), _linear(shape.hidden, kv)
        self.o_proj = _linear(shape.hidden, shape.hidden)
        self.gate_proj = _linear(shape.hidden, shape.mlp)
        self.up_proj = _linear(shape.hidden, shape.mlp)
        self.down_proj = _linear(shape.mlp, shape.hidden)

    def forward(self, x: Tensor, cache: Tensor, at: Tensor, rotation: Tensor) -> Tensor:
        tokens, heads = x.shape[0], (x.shape[0], -1, self.width)
        h = self.input_norm(x)
        q, k = (_rotate(p(h).view(heads), rotation) for p in (self.q_proj, self.k_proj))
        cache[0].index_copy_(0, at, k)
        cache[1].index_copy_(0, at, self.v_proj(h).view(heads))
        # A single token sees the whole cache, which is full; a prompt what is before each token.
        q, k, v = (t.transpose(0, 1)[None] for t in (q, cache[0], cache[1]))
        if tokens > 1:
            k, v = k[:, :, :tokens], v[:, :, :tokens]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=True)
        x = x + self.o_proj(mixed[0].transpose(0, 1).reshape(tokens, -1))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = rotation[0][:, None], rotation[1][:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Llama(nn.Module):
    """Token ids [tokens] to the logits of the last one, [1, vocabulary]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.lm_head = _linear(shape.hidden, shape.vocabulary)

    def forward(self, ids: Tensor, caches: Tensor, at: Tensor, rotation: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache, at, rotation)
        return self.lm_head(self.norm(x[-1:]))


@torch.inference_mode()
def measure(name: str, scheme: str, device: torch.device) -> dict[str, float]:
    """Return tokens/s of prefill and decoding, at batch 1, of a model in `scheme`."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = Llama(shape).eval()
    finally:
        torch.set_default_dtype(before)
    if scheme != "bfloat16":
        with torch.inference_mode(False):
            model = llmq.quantize(model, scheme=scheme)
    width, length = shape.hidden // shape.heads, shape.prompt
    sizes = (shape.layers, 2, length, shape.kv_heads, width)
    caches = torch.zeros(sizes, dtype=torch.bfloat16, device=device)
    angles = torch.arange(length, device=device)[:, None] * 10000 ** (
        -torch.arange(0, width, 2, device=device) / width
    )
    rotation = torch.stack((angles.cos(), angles.sin())).to(torch.bfloat16)
    ids, at = (
        torch.zeros(length, dtype=torch.int64, device=device),
        torch.arange(length, device=device),
    )
    last = rotation[:, -1:]
    seconds = gpu_timing.medians(
        {
            "prefill": [lambda: model(ids, caches, at, rotation)],
            "decode": [lambda: model(ids[:1], caches, at[-1:], last)],
        },
        device,
    )
    return {"prefill": length / seconds["prefill"], "decode": 1 / seconds["decode"]}
