"""`QuantEmbedding`: an int8 embedding table, alone or tied to the output layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.formats import uniform
from llmq.nn.base import CompressedLayer, frozen
from llmq.nn.quant_linear import QuantLinear
from llmq.scheme import Scheme, resolve_scheme

if TYPE_CHECKING:
    from typing_extensions import Self


def embedding_factor(embedding: nn.Embedding) -> float | None:
    """Return what `embedding` multiplies its rows by, None if its class computes something else.

    Plain embeddings do not; `…ScaledWordEmbedding` of Gemma, BART and others in transformers do.
    """
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    factor = getattr(embedding, "embed_scale", None)
    if type(embedding).__name__.endswith("ScaledWordEmbedding") and factor is not None:
        return float(factor)
    return None


class QuantEmbedding(CompressedLayer):
    """An embedding table kept as int8 with one scale a row: ids [...] to vectors [..., K].

    `weight` is int8 [num_embeddings, K], `weight_scale` float32 [num_embeddings, 1]; vectors are of
    the dtype of the embedding that it replaces. `tied_linear` gives the output layer that shares
    its tensors. Ids out of range raise `IndexError`.

        >>> table = llmq.QuantEmbedding.from_embedding(torch.nn.Embedding(100, 64), "w8a8")
        >>> table(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        tensors: dict[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.scheme = scheme
        self.dtype = dtype
        self.padding_idx = padding_idx
        self.factor = factor
        self.register_parameter("weight", frozen(tensors["weight"]))
        self.register_parameter("weight_scale", frozen(tensors["weight_scale"]))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, scheme: Scheme | str) -> QuantEmbedding:
        """Quantize an embedding by row.

        Args:
            embedding: weight [num_embeddings, K]; rows may be multiplied by a factor on their way
                out (`embedding_factor`).
            scheme: uniform symmetric 8-bit, one scale a channel; its activations are those of the
                tied output layer.

        Raises:
            TypeError: if `embedding` is a subclass that may compute something else.
            ValueError: if the scheme is another, the weight not finite, or `max_norm` set.
        """
        scheme = resolve_scheme(scheme)
        factor = embedding_factor(embedding) if isinstance(embedding, nn.Embedding) else None
        if factor is None:
            raise TypeError(f"expected nn.Embedding itself, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError("an embedding with max_norm changes its weights as it runs")
        if (
            scheme.bits != 8
            or scheme.method != "uniform"
            or not scheme.symmetric
            or scheme.granularity != "channel"
            or scheme.activations == "static"
        ):
            raise ValueError(
                f"an embedding takes uniform symmetric 8-bit schemes by channel, its activations "
                f"dynamic or none, got {scheme.name}"
            )
        scheme.check_fits(embedding.num_embeddings, embedding.embedding_dim)
        encoded = uniform.encode(embedding.weight.detach(), bits=8, granularity="channel")
        return cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            scheme,
            {"weight": encoded.weight, "weight_scale": encoded.weight_scale},
            dtype=embedding.weight.dtype,
            padding_idx=embedding.padding_idx,
            factor=factor,
        )

    def tied_linear(self, bias: Tensor | None = None) -> QuantLinear:
        """Return the output layer K → num_embeddings that shares this table's Parameters."""
        tensors = {"weight": self.weight.data, "weight_scale": self.weight_scale.data}
        if bias is not None:
            tensors["bias"] = bias
        layer = QuantLinear(self.embedding_dim, self.num_embeddings, self.scheme, tensors)
        self.weight.data = layer.weight.data
        layer.weight, layer.weight_scale = self.weight, self.weight_scale
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        # First the scales: F.embedding refuses ids out of range, plain indexing would wrap them.
        scale = F.embedding(ids, self.weight_scale)
        if self.weight.dim() == 4:
            panels = self.weight[ids // 16, :, ids % 16, :]
            codes = torch.bitwise_xor(panels.flatten(-2)[..., : self.embedding_dim], -128)
        else:
            codes = F.embedding(ids, self.weight)
        rows = codes.float() * scale
        return (rows if self.factor == 1.0 else rows * self.factor).to(self.dtype)

    def dequantize(self) -> Tensor:
        """Return the table that the codes stand for, float32 [num_embeddings, K]."""
        tensors = self.canonical()
        return tensors["weight"].float() * tensors["weight_scale"]

    def canonical(self) -> dict[str, Tensor]:
        tensors = {"weight": self.weight.data, "weight_scale": self.weight_scale.data}
        if self.weight.dim() == 4:
            tensors["weight"] = torch.ops.llmq.unpack_panels(
                self.weight.data, 8, self.num_embeddings, self.embedding_dim
            )
        return tensors

    def _panels(self) -> dict[str, Tensor] | None:
        # Rows are what a look-up wants; a tied output layer packs the shared Parameter for both.
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def config(self) -> dict[str, Any]:
        """Return what `empty_layer` needs to make a layer of these shapes, ready for JSON."""
        return {
            "type": "QuantEmbedding",
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "factor": self.factor,
            "dtype": str(self.dtype).removeprefix("torch."),
            "scheme": asdict(self.scheme),
            "shapes": {name: list(t.shape) for name, t in self.canonical().items()},
        }

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"
