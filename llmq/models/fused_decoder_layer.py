"""A decoder layer of transformers that runs as one op, `torch.ops.llmq.decoder_layer`.

The layer keeps its modules, parameters and state dict. Only its class changes, to a subclass whose
`forward` calls the op where the op computes the same. Everywhere else it runs the model's own code:
with gradients, in training, under `torch.compile`, with hooks on modules inside, and with a cache
or arguments that the op does not know.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from llmq.models import kv_cache
from llmq.nn.base import call
from llmq.ops import decoder

ATTENTION = decoder.LINEARS[:4]
MLP = (*decoder.LINEARS[4:], "act_fn")
HEAD_NORMS = ("q_norm", "k_norm")
_IMPLEMENTATIONS = ("sdpa", "eager")
# Arguments of a layer that change nothing about what it computes.
_HARMLESS = ("output_hidden_states", "return_dict", "logits_to_keep", "num_items_in_batch")
_NOTHING = torch.empty(0)
_CALL = "_llmq_fused_call"


def linears(layer: Any) -> list[Any]:
    """Return the seven linear layers of a decoder layer, in the op's order."""
    attention, mlp = layer.self_attn, layer.mlp
    return [getattr(attention, n) for n in ATTENTION] + [getattr(mlp, n) for n in MLP[:3]]


def norms(layer: Any) -> list[Any]:
    """Return the norms of a decoder layer, in the op's order."""
    head = [m for name, m in layer.self_attn.named_children() if name in HEAD_NORMS]
    return [layer.input_layernorm, layer.post_attention_layernorm, *head]


class FusedCall:
    """What the op needs of a layer, and whether the op may run the layer at a given call."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.linears = linears(layer)
        self.norms = norms(layer)
        self.scaling = float(attention.scaling)
        self.eps = float(self.norms[0].variance_epsilon)
        self.index = attention.layer_idx
        self.head_dim = attention.head_dim
        self.heads = self.linears[1].out_features // self.head_dim
        self.config = attention.config
        schemes = [m.scheme for m in self.linears]
        self.bits = [s.bits for s in schemes]
        self.groups = [
            -1 if s.activations is None else s.activation_group_size or 0 for s in schemes
        ]
        self.has_bias = any(m.bias is not None for m in self.linears)
        self.has_zero_point = any(m.weight_zero_point is not None for m in self.linears)
        # Modules that are replaced, or get hooks, must run themselves.
        inside = [m for m in layer.modules() if m is not layer]
        self.children = [(m._modules, dict(m._modules)) for m in (layer, attention, layer.mlp)]
        self.hooks: list[Any] = [
            h for m in inside for h in (m._forward_hooks, m._forward_pre_hooks)
        ]
        everywhere: Any = nn.modules.module
        self.hooks += [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]

    def intact(self) -> bool:
        """Whether the layer is made of the modules that it had, and none of them has hooks."""
        return all(now == then for now, then in self.children) and not (
            any(self.hooks) and self._watched()
        )

    def _watched(self) -> bool:
        """Whether a hook wants to see what happens inside.

        transformers leaves its own in place once it was asked for hidden states or attentions.
        """
        found = [hook for hooks in self.hooks for hook in hooks.values()]
        return bool(self.config.output_attentions) or any(
            getattr(hook, "__name__", "") != "output_capturing_hook" for hook in found
        )

    def run(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: Any,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> Tensor | None:
        """Return the layer's output, or None, with nothing done, if the op is not for this call."""
        if x.device.type != "cpu" or x.dim() != 3 or torch.is_autocast_enabled("cpu"):
            return None
        implementation = self.config._attn_implementation
        tokens = x.shape[1]
        cos, sin = position_embeddings
        if implementation not in _IMPLEMENTATIONS or cos.shape[-1] != self.head_dim or not tokens:
            return None
        cached = None if cache is None else self._cached(cache)
        if cache is not None and (cached is None or not cached.fits(tokens)):
            return None
        start = 0 if cached is None else cached.get_seq_length()
        if mask is None:
            # Without a mask sdpa is causal from the first key on, eager attention not at all.
            if tokens > 1 and (start or implementation == "eager"):
                return None
        elif mask.dim() != 4 or mask.shape[2:] != (tokens, start + tokens):
            return None
        if cached is None:
            shape = (x.shape[0], self.heads, tokens, self.head_dim)
            keys, values = x.new_empty(shape), x.new_empty(shape)
        else:
            keys, values, start = cached.extend(tokens, x, self.heads, self.head_dim)
        parameters = [m._parameters for m in self.linears]
        return call(
            torch.ops.llmq.decoder_layer.default,
            x,
            [n._parameters["weight"] for n in self.norms],
            cos,
            sin,
            keys,
            values,
            mask,
            [p["weight"] for p in parameters],
            [p["weight_scale"] for p in parameters],
            _some(parameters, "weight_zero_point") if self.has_zero_point else [],
            _some(parameters, "bias") if self.has_bias else [],
            self.bits,
            self.groups,
            start,
            self.eps,
            self.scaling,
        )

    def _cached(self, cache: Any) -> Any:
        """Return this layer's part of a cache if it is one that grows, else None."""
        from transformers.cache_utils import Cache

        layers = getattr(cache, "layers", None)
        if type(cache).update is not Cache.update or cache.offloading or layers is None:
            return None
        if self.index >= len(layers):
            return None
        return kv_cache.growing(layers[self.index])


def _some(parameters: list[Any], name: str) -> list[Tensor]:
    return [_NOTHING if p.get(name) is None else p[name] for p in parameters]


@functools.cache
def _fused_class(kind: Any) -> Any:
    """Return the subclass of a decoder layer's class whose `forward` calls the op."""
    original = kind.forward

    class Layer(kind):  # type: ignore[misc]
        def __reduce_ex__(self, protocol: Any) -> Any:
            """Copy and pickle as the layer of transformers that it is."""
            state = {name: v for name, v in self.__dict__.items() if name != _CALL}
            return _blank, (kind,), state

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self.training
            or position_embeddings is None
            or any(kwargs[name] and name not in _HARMLESS for name in kwargs)
        ):
            fused: FusedCall = self.__dict__[_CALL]
            if fused.intact():
                output = fused.run(
                    hidden_states, attention_mask, past_key_values, position_embeddings
                )
                if output is not None:
                    return output
        return original(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )

    Layer.__name__, Layer.__qualname__ = kind.__name__, kind.__qualname__
    Layer.__module__, Layer.__doc__ = kind.__module__, kind.__doc__
    # Set afterwards: transformers wraps what a subclass defines, and the original is wrapped.
    Layer.forward = functools.wraps(original)(forward)
    return Layer


def _blank(kind: Any) -> Any:
    return kind.__new__(kind)


def is_fused(layer: nn.Module) -> bool:
    """Whether `fuse` was applied to the layer."""
    return _CALL in layer.__dict__


def fuse(layer: Any) -> None:
    """Let a layer run as one op; `accelerate.why_not_fused` tells which layers can."""
    layer.__dict__[_CALL] = FusedCall(layer)
    layer.__class__ = _fused_class(type(layer))  # type: ignore[arg-type]


def unfuse(layer: nn.Module) -> None:
    """Undo `fuse`."""
    del layer.__dict__[_CALL]
    layer.__class__ = type(layer).__mro__[1]
