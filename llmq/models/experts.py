"""Mixture-of-experts layers whose experts are slices of 3-D parameters, as one layer an expert.

transformers (5 and later) keeps the experts of Mixtral, Qwen-MoE, OLMoE and others in
`gate_up_proj` [experts, 2 * intermediate, hidden] and `down_proj` [experts, hidden, intermediate]
of one module, which a walk over linear layers misses.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from llmq.nn import CompressedLayer

# Set by transformers on every experts class whose layout it describes.
_DESCRIPTION = ("has_gate", "has_bias", "is_transposed", "num_experts", "act_fn")
_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


def fused_parameters(module: nn.Module) -> list[str]:
    """Return the names of `module`'s own 3-D parameters, which may be experts."""
    if isinstance(module, (nn.modules.conv._ConvNd, CompressedLayer)):
        return []
    return [name for name, p in module._parameters.items() if p is not None and p.dim() == 3]


def why_not_split(module: nn.Module) -> str | None:
    """Return why fused experts cannot be split into layers, None if they can."""
    if not all(hasattr(module, name) for name in _DESCRIPTION):
        return "3-D weight of an unknown layout"
    if getattr(module, "_is_expert_parallel", False):
        return "experts spread over devices"
    first = "gate_up_proj" if module.has_gate else "up_proj"
    if sorted(fused_parameters(module)) != sorted([first, "down_proj"]):
        return "3-D weight of an unknown layout"
    return None


class SplitExperts(nn.Module):
    """Experts as linear layers: `gate_up_proj` (or `up_proj`) and `down_proj`, a list of each.

    Computes what the experts module that it is made from computes: for each token, the sum over
    its chosen experts of routing weight times down(act(gate) * up).
    """

    def __init__(self, shell: nn.Module, projections: dict[str, list[nn.Linear]]) -> None:
        super().__init__()
        self.shell = shell
        for name, linears in projections.items():
            setattr(self, name, nn.ModuleList(linears))
        self.first = "gate_up_proj" if "gate_up_proj" in projections else "up_proj"

    @classmethod
    def from_fused(cls, experts: nn.Module) -> SplitExperts:
        """Split `experts`, whose weights the new layers share until they are converted.

        Raises:
            ValueError: if the layout is unknown.
        """
        reason = why_not_split(experts)
        if reason is not None:
            raise ValueError(f"{type(experts).__name__} cannot be split: {reason}")
        # The shell keeps the class's own gating, activation and attributes, without the weights.
        shell = copy.copy(experts)
        weights = dict(experts._parameters)
        shell._parameters = {}
        shell._modules = dict(experts._modules)
        shell._buffers = dict(experts._buffers)
        projections = {}
        for name in _PROJECTIONS:
            fused = weights.pop(name, None)
            if fused is not None:
                bias = weights.pop(f"{name}_bias", None)
                projections[name] = [
                    _linear(fused, bias, i, bool(experts.is_transposed))
                    for i in range(fused.shape[0])
                ]
        if weights:
            raise ValueError(
                f"{type(experts).__name__} cannot be split: unknown parameters {sorted(weights)}"
            )
        split = cls(shell, projections)
        split.train(experts.training)
        return split

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mix experts: hidden_states [M, K], top_k_index and top_k_weights [M, k] to [M, K]."""
        shell: Any = self.shell
        first: Any = self._modules[self.first]
        down: Any = self._modules["down_proj"]
        y = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in torch.unique(top_k_index).tolist():
            if not 0 <= expert < shell.num_experts:
                continue
            token, choice = torch.where(top_k_index == expert)
            h = first[expert](hidden_states[token])
            h = shell._apply_gate(h) if shell.has_gate else shell.act_fn(h)
            h = down[expert](h)
            if getattr(shell, "has_post_expert_norm", False):
                h = shell.post_expert_norm(h)
            y.index_add_(0, token, (h * top_k_weights[token, choice, None]).float())
        return y.to(hidden_states.dtype)


def _linear(fused: Tensor, bias: Tensor | None, expert: int, transposed: bool) -> nn.Linear:
    weight = fused.detach()[expert]
    weight = weight.T if transposed else weight
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=fused.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach()[expert], requires_grad=bias.requires_grad)
    return linear


def own_weights(linear: nn.Linear) -> None:
    """Give a split linear layer that stays as it is storage of its own, so that it can be saved."""
    for parameter in linear.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def split_for(model: nn.Module, layer: str) -> None:
    """Split the fused experts that stand where layer `layer`, say `…experts.down_proj.3`, belongs.

    Used when a checkpoint of split experts is loaded into a model made from its configuration;
    does nothing where there are none.
    """
    parent, _, name = layer.rpartition(".")[0].rpartition(".")
    if name not in _PROJECTIONS:
        return
    try:
        experts = model.get_submodule(parent)
    except AttributeError:
        return
    if name in experts._parameters:
        grandparent, _, attribute = parent.rpartition(".")
        setattr(model.get_submodule(grandparent), attribute, SplitExperts.from_fused(experts))
