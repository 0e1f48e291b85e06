"""Linear layers on a GPU, ours and other libraries': how each is made from one in bfloat16.

To add a peer: a function that makes its layer, and a row in `PEERS`.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.nn import QuantLinear, SparseLinear
from llmq.pruning import magnitude
from llmq.scheme import parse_pattern

_ROTATED = 200e6  # bytes of weights among which calls rotate: several L2 caches
Layer = Callable[[Tensor], Tensor]


class Peer(NamedTuple):
    """How a layer is made, and what may be expected of it."""

    make: Callable[[nn.Linear], Any]
    bits: float  # of a weight in memory
    # Of the result, relative to bfloat16's: int8 inputs lose 0.9 %, 4-bit weights of normal
    # distribution 10 % (g128), and pruned ones are compared with the dense weight that they keep.
    loss: float = 0.02
    least_tokens: int = 1
    needs: str = ""  # a module, or "cuda" for what torch has on GPUs alone


def _ours(scheme: str) -> Callable[[nn.Linear], Any]:
    return lambda linear: QuantLinear.from_linear(linear, scheme)


def _sparse(pattern: str, rate: float, scheme: str = "w8a8") -> Callable[[nn.Linear], Any]:
    def make(linear: nn.Linear) -> Any:
        parsed = parse_pattern(pattern)
        mask = magnitude.mask(linear.weight.detach(), parsed, rate)
        return SparseLinear.from_linear(linear, parsed, scheme=scheme, mask=mask)

    return make


def _int_mm(linear: nn.Linear) -> Layer:
    layer = QuantLinear.from_linear(linear, "w8a8")
    weight, scale = (
        t.to(linear.weight.device) for t in (layer.canonical()["weight"], layer.weight_scale.data)
    )

    def call(x: Tensor) -> Tensor:
        codes, x_scale = torch.ops.llmq.quantize_activation(x)
        return (torch._int_mm(codes, weight.T).float() * x_scale * scale.T).to(x.dtype)

    return call


def _torch_2_4(linear: nn.Linear) -> Layer:
    from torch.sparse import to_sparse_semi_structured

    mask = magnitude.mask(linear.weight.detach(), parse_pattern("2:4"), 0.5)
    weight = to_sparse_semi_structured((linear.weight.detach() * mask).contiguous())
    return lambda x: F.linear(x, weight)


def _cusparselt_int8(linear: nn.Linear) -> Layer:
    """2:4 in int8 by cuSPARSELt: Wᵀ's product, scaled by us as torch gives no row scales."""
    mask = magnitude.mask(linear.weight.detach(), parse_pattern("2:4"), 0.5)
    pruned = copy.deepcopy(linear)
    pruned.weight.data *= mask
    layer = QuantLinear.from_linear(pruned, "w8a8")
    packed = torch._cslt_compress(layer.canonical()["weight"])
    scale = layer.weight_scale.data

    def call(x: Tensor) -> Tensor:
        codes, x_scale = torch.ops.llmq.quantize_activation(x)
        y = torch._cslt_sparse_mm(packed, codes.T, out_dtype=torch.int32)
        return (y.T.float() * x_scale * scale.T).to(x.dtype)

    return call


def _gemlite(name: str, **options: Any) -> Callable[[nn.Linear], Layer]:
    def make(linear: nn.Linear) -> Layer:
        from gemlite import helper

        made = getattr(helper, name)(device=str(linear.weight.device), dtype=linear.weight.dtype)
        return made.from_linear(copy.deepcopy(linear), del_orig=False, **options)

    return make


def _torchao(config: str, **options: Any) -> Callable[[nn.Linear], Layer]:
    def make(linear: nn.Linear) -> Layer:
        from torchao import quantization

        holder = nn.Sequential(copy.deepcopy(linear))
        quantization.quantize_(holder, getattr(quantization, config)(**options))
        return holder[0]

    return make


PEERS = {
    "bfloat16": Peer(lambda linear: linear, 16),
    "w8a8": Peer(_ours("w8a8"), 8),
    "w8a8-g64": Peer(_ours("w8a8-g64"), 8),
    "w8a16": Peer(_ours("w8a16"), 8),
    "w4a16-g128": Peer(_ours("w4a16-g128"), 4.3, 0.2),
    "w4a8-g128": Peer(_ours("w4a8-g128"), 4.3, 0.2),
    "w8a16-quantile": Peer(_ours("w8a16-quantile"), 8),
    "block 50 % w8a8": Peer(_sparse("block-128x128", 0.5), 4, math.inf),
    "bitmap 50 % w8a8": Peer(_sparse("unstructured", 0.5), 5.1, math.inf),
    "bitmap 70 % w8a8": Peer(_sparse("unstructured", 0.7), 3.5, math.inf),
    "bitmap 50 % w8a16": Peer(_sparse("unstructured", 0.5, "w8a16"), 5.1, math.inf),
    "bitmap 70 % w8a16": Peer(_sparse("unstructured", 0.7, "w8a16"), 3.5, math.inf),
    "2:4 w8a8": Peer(_sparse("2:4", 0.5), 5, math.inf),
    "torch._int_mm": Peer(_int_mm, 8, least_tokens=17),
    "torch 2:4 bfloat16": Peer(_torch_2_4, 9, math.inf, needs="cuda"),
    "cuSPARSELt 2:4 int8": Peer(_cusparselt_int8, 5, math.inf, 32, "cuda"),
    "gemlite A16W8": Peer(_gemlite("A16W8"), 8, needs="gemlite"),
    "gemlite A8W8": Peer(_gemlite("A8W8_dynamic"), 8, needs="gemlite"),
    "torchao int8 weights": Peer(_torchao("Int8WeightOnlyConfig"), 8, needs="torchao"),
    "torchao int8": Peer(_torchao("Int8DynamicActivationInt8WeightConfig"), 8, needs="torchao"),
}


def missing(peer: Peer, device: torch.device) -> str | None:
    """Say what a peer lacks here, or return None."""
    if peer.needs == "cuda":
        return None if device.type == "cuda" else "a GPU"
    found = not peer.needs or importlib.util.find_spec(peer.needs)
    return None if found else peer.needs


def copies(peer: Peer, dense: nn.Linear, dry: bool) -> list[Any]:
    """Return equal layers, as many as a call must rotate among to read its weight from memory."""
    first = peer.make(dense)
    size = dense.weight.numel() * peer.bits / 8
    count = 2 if dry else math.ceil(_ROTATED / size)
    if isinstance(first, nn.Module):
        return [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    return [first, *(peer.make(dense) for _ in range(count - 1))]


def check(peer: Peer, dense: nn.Linear, layer: Any, x: Tensor) -> None:
    """Raise unless the layer's first tokens are what its weight (or the dense one) gives.

    Raises:
        ValueError: if it is farther from it than the peer may be.
    """
    y = layer(x)[:16].float()
    weight = layer.dequantize() if hasattr(layer, "dequantize") else dense.weight
    loss = 0.02 if hasattr(layer, "dequantize") else peer.loss
    expected = x[:16].float() @ weight.detach().float().T
    off = float((y - expected).norm() / expected.norm())
    if not off <= loss:
        raise ValueError(f"off by {off:.3f} of the result, {loss} allowed")
