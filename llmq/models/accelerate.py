"""The verbs `accelerate` and `restore`: decoder layers that run as one op each, and back.

Which layers can, and why others cannot, is decided here; `fused_decoder_layer.py` is how they run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.models.fused_decoder_layer import (
    ATTENTION,
    HEAD_NORMS,
    MLP,
    FusedCall,
    fuse,
    is_fused,
    linears,
    norms,
    unfuse,
)
from llmq.nn import QuantLinear
from llmq.ops import decoder

_LAYER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_SILU = ("SiLU", "SiLUActivation")


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did: the layers that run as one op each, and why others do not.

    Args:
        fused: names of the layers that run as one op.
        left_alone: the reason, by the name of each decoder layer that runs as before.
    """

    fused: tuple[str, ...]
    left_alone: dict[str, str]

    def __str__(self) -> str:
        if not self.fused and not self.left_alone:
            return (
                "nothing to accelerate: the model has no decoder layers as Llama, Mistral or Qwen "
                "of transformers have"
            )
        lines = [f"{len(self.fused)} decoder layers run as one op each"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(f"left alone: {len(names)} ({names[0]} …): {reason}")
        return "\n".join(lines)


def accelerate(model: Any) -> Any:
    """Let each decoder layer of a quantized Llama-like model run as one op, in place.

    This saves the time between the layer's ops, most of all while decoding on CPU. It works for
    Llama, Mistral, Qwen2, Qwen3 and models of the same structure, on CPU, with the schemes `w8a8`,
    `w8a8-g64`, `w8a16`, `w4a16-gN` and `w4a8-gN`. Each layer is tried on random tokens first, and
    is left alone unless its outputs stay the same. Any other model is returned as it was.

    Modules, parameters, `state_dict` and checkpoints do not change. The model's own code runs with
    gradients, in training mode, under `torch.compile`, with forward hooks inside a layer, and with
    caches other than `DynamicCache`, so wrap calls in `torch.inference_mode()` (`generate` does).
    Copies and pickles of the model are not accelerated.

    Args:
        model: any module.

    Returns:
        The model, with `model.llmq_acceleration`: which layers run as one op, and why others do
        not.

    Raises:
        TypeError: if `model` is not a `torch.nn.Module`.

    Example:
        >>> model = llmq.accelerate(llmq.quantize(model, scheme="w8a8-g64"))
        >>> print(model.llmq_acceleration)
    """
    fused, left_alone = [], {}
    for stack, name, layer in _decoder_layers(model):
        reason = None
        if not is_fused(layer):
            reason = why_not_fused(layer) or _try_out(stack, layer)
        if reason is None:
            fused.append(name)
        else:
            left_alone[name] = reason
    model.llmq_acceleration = Acceleration(tuple(fused), left_alone)
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate` in place and return the model, whose layers run their own code again.

    Raises:
        TypeError: if `model` is not a `torch.nn.Module`.
    """
    for _, _, layer in _decoder_layers(model):
        if is_fused(layer):
            unfuse(layer)
    model.__dict__.pop("llmq_acceleration", None)
    return model


def _decoder_layers(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Give (module that holds the list and the rotary embedding, name, layer) of each layer."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for prefix, module in list(model.named_modules()):
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and hasattr(module, "rotary_emb"):
            for i, layer in enumerate(layers):
                yield module, f"{prefix}.layers.{i}".lstrip("."), layer


def why_not_fused(layer: nn.Module) -> str | None:
    """Return why a decoder layer cannot run as one op, None if it can."""
    if tuple(name for name, _ in layer.named_children()) != _LAYER:
        return "it has other modules than attention, MLP and their two norms"
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    children = [name for name, _ in attention.named_children()]
    head_norms = [name for name in children if name in HEAD_NORMS]
    if sorted(set(children) - set(head_norms)) != sorted(ATTENTION) or len(head_norms) == 1:
        return f"its attention has the modules {', '.join(children)}"
    if sorted(name for name, _ in mlp.named_children()) != sorted(MLP):
        return f"its MLP has the modules {', '.join(name for name, _ in mlp.named_children())}"
    if type(mlp.act_fn).__name__ not in _SILU:
        return f"its activation is {type(mlp.act_fn).__name__}, not SiLU"
    for name, module in zip(decoder.LINEARS, linears(layer), strict=True):
        if type(module) is not QuantLinear:
            return f"{name} is {type(module).__name__}, not a QuantLinear"
        if module.scheme.op not in ("int8_linear", "weight_only_linear"):
            return f"{name} runs as {module.scheme.op}"
        if module.scheme.activations == "static":
            return f"{name} has a static input scale, which the op does not take"
        if module.weight.device.type != "cpu":
            return f"{name} is on {module.weight.device}; the op has a CPU kernel only"
    all_norms = norms(layer)
    if any(not hasattr(n, "variance_epsilon") or n.weight is None for n in all_norms):
        return "its norms are not RMSNorm"
    if len({n.variance_epsilon for n in all_norms}) != 1:
        return "its norms have different epsilons"
    if not hasattr(attention, "scaling") or not hasattr(attention, "layer_idx"):
        return "its attention has no scaling or layer_idx"
    return None


@torch.no_grad()
def _try_out(stack: Any, layer: Any) -> str | None:
    """Fuse a layer if its outputs stay the same; return why it stays as it was, None if it fused.

    Args:
        stack: the module that holds the layer and makes `position_embeddings`.
        layer: a decoder layer for which `why_not_fused` returns None.
    """
    training, fused = layer.training, FusedCall(layer)
    if not fused.intact():
        return "a module inside has forward hooks"
    layer.eval()
    try:
        expected = _outputs(stack, layer, fused)
        fuse(layer)
        got = _outputs(stack, layer, fused)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        if is_fused(layer):
            unfuse(layer)
        return f"it raised an error when tried: {error}"
    finally:
        layer.train(training)
    for (x, a), (_, b) in zip(expected, got, strict=True):
        change = (a.double() - x.double()).norm()
        # A code of an input that rounds the other way moves an output by less than 1 % of its size.
        allowed = 0.02 * change + 4 * torch.finfo(a.dtype).eps * a.double().norm()
        if not (a.double() - b.double()).norm() <= allowed:
            unfuse(layer)
            return "its outputs would change: it computes something else than the op"
    return None


def _outputs(stack: Any, layer: Any, fused: FusedCall) -> list[tuple[Tensor, Tensor]]:
    """Return inputs and outputs of a layer for a prompt of 7 tokens and one more token."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    dtype = fused.norms[0].weight.dtype
    cache, done, results = DynamicCache(), 0, []
    hidden = fused.linears[0].in_features
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
