"""Runs the layers of Llama-like transformers models by one op each, exactly reversibly.

A layer keeps its modules, parameters and state dict; only its class becomes a subclass whose
`forward` calls `torch.ops.llmq.decoder_layer` where it can tell that this gives the same, and the
model's own code everywhere else: with gradients, in training, under `torch.compile`, with hooks on
modules inside, with a cache or arguments that the op does not know.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from llmq.models import kv_cache
from llmq.nn import QuantLinear
from llmq.nn.base import call
from llmq.ops import decoder

_LAYER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_ATTENTION = decoder.LINEARS[:4]
_MLP = (*decoder.LINEARS[4:], "act_fn")
_HEAD_NORMS = ("q_norm", "k_norm")
_SILU = ("SiLU", "SiLUActivation")
_IMPLEMENTATIONS = ("sdpa", "eager")
# Arguments of a layer that change nothing about what it computes.
_HARMLESS = ("output_hidden_states", "return_dict", "logits_to_keep", "num_items_in_batch")
_NOTHING = torch.empty(0)
_PLAN = "_llmq_plan"


def why_not(layer: nn.Module) -> str | None:
    """Return what stands between a decoder layer and the op, None if nothing does."""
    if tuple(name for name, _ in layer.named_children()) != _LAYER:
        return "other modules than attention, MLP and their two norms"
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    children = [name for name, _ in attention.named_children()]
    norms = [name for name in children if name in _HEAD_NORMS]
    if sorted(set(children) - set(norms)) != sorted(_ATTENTION) or len(norms) == 1:
        return f"an attention of {', '.join(children)}"
    if sorted(name for name, _ in mlp.named_children()) != sorted(_MLP):
        return f"an MLP of {', '.join(name for name, _ in mlp.named_children())}"
    if type(mlp.act_fn).__name__ not in _SILU:
        return f"its activation {type(mlp.act_fn).__name__}"
    for name, module in zip(decoder.LINEARS, _linears(layer), strict=True):
        if type(module) is not QuantLinear:
            return f"{name} is {type(module).__name__}, not a QuantLinear"
        if module.scheme.op not in ("int8_linear", "weight_only_linear"):
            return f"{name} runs as {module.scheme.op}"
        if module.scheme.activations == "static":
            return f"{name} has a static input scale, which the op does not take"
        if module.weight.device.type != "cpu":
            return f"{name} is on {module.weight.device}; the op has a kernel for CPU alone"
    all_norms = _norms(layer)
    if any(not hasattr(n, "variance_epsilon") or n.weight is None for n in all_norms):
        return "a norm that is not a root mean square"
    if len({n.variance_epsilon for n in all_norms}) != 1:
        return "norms of different epsilons"
    if not hasattr(attention, "scaling") or not hasattr(attention, "layer_idx"):
        return "an attention without scaling and layer_idx"
    return None


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [getattr(attention, n) for n in _ATTENTION] + [getattr(mlp, n) for n in _MLP[:3]]


def _norms(layer: Any) -> list[Any]:
    head = [m for name, m in layer.self_attn.named_children() if name in _HEAD_NORMS]
    return [layer.input_layernorm, layer.post_attention_layernorm, *head]


class Plan:
    """What a layer's `forward` needs at hand for the op, and when it must not be used."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.linears = _linears(layer)
        self.norms = _norms(layer)
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
def _one_op(kind: Any) -> Any:
    """Return the subclass of a decoder layer's class that runs by the op where it can."""
    original = kind.forward

    class Layer(kind):  # type: ignore[misc]
        def __reduce_ex__(self, protocol: Any) -> Any:
            """Copy and pickle as the layer of transformers that it is."""
            state = {name: v for name, v in self.__dict__.items() if name != _PLAN}
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
            plan: Plan = self.__dict__[_PLAN]
            if plan.intact():
                output = plan.run(
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


def is_one_op(layer: nn.Module) -> bool:
    """Whether a layer runs by the op where it can."""
    return _PLAN in layer.__dict__


def join(layer: Any) -> None:
    """Let a layer for which `why_not` gives nothing run by the op."""
    layer.__dict__[_PLAN] = Plan(layer)
    layer.__class__ = _one_op(type(layer))  # type: ignore[arg-type]


@torch.no_grad()
def try_out(stack: Any, layer: Any) -> str | None:
    """Join a layer if it then gives what it gave; return what stands in the way, None if nothing.

    Args:
        stack: the module that holds the layer and makes `position_embeddings`.
        layer: for which `why_not` gives nothing.
    """
    training, plan = layer.training, Plan(layer)
    if not plan.intact():
        return "a module inside has forward hooks"
    layer.eval()
    try:
        expected = _tokens_through(stack, layer, plan)
        join(layer)
        got = _tokens_through(stack, layer, plan)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        if is_one_op(layer):
            part(layer)
        return f"it cannot be tried out: {error}"
    finally:
        layer.train(training)
    for (x, a), (_, b) in zip(expected, got, strict=True):
        change = (a.double() - x.double()).norm()
        # A code of an input that rounds the other way moves an output by less than 1 % of its size.
        allowed = 0.02 * change + 4 * torch.finfo(a.dtype).eps * a.double().norm()
        if not (a.double() - b.double()).norm() <= allowed:
            part(layer)
            return "it computes something else than the op"
    return None


def _tokens_through(stack: Any, layer: Any, plan: Plan) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and outputs of a layer for a prompt of 7 tokens and one more token."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    dtype = plan.norms[0].weight.dtype
    cache, done, results = DynamicCache(), 0, []
    hidden = plan.linears[0].in_features
    for tokens in (7, 1):
        x = torch.randn(1, tokens, hidden, generator=generator).to(dtype)
        positions = torch.arange(done, done + tokens)[None]
        causal = torch.ones(1, 1, tokens, done + tokens, dtype=torch.bool).tril(done)
        mask = torch.zeros(causal.shape, dtype=dtype).masked_fill(~causal, torch.finfo(dtype).min)
        output = layer(
            x,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=stack.rotary_emb(x, positions),
        )
        done += tokens
        results.append((x, output[0] if isinstance(output, tuple) else output))
    return results


def part(layer: nn.Module) -> None:
    """Undo `join`."""
    del layer.__dict__[_PLAN]
    layer.__class__ = type(layer).__mro__[1]
