"""`LowRankLinear`: a linear layer as two thin ones, each in any format of the library."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.nn.base import CompressedLayer, dense_weight, linear_weight
from llmq.nn.quant_linear import QuantLinear
from llmq.scheme import Scheme


class LowRankLinear(nn.Module):
    """y = up(down(x)): x [..., K], y [..., N], with rank (N + K) numbers in place of N K.

    `down` (K → rank, no bias) and `up` (rank → N) are layers like others: verbs find, quantize,
    prune and train them by their names.
    """

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down = down
        self.up = up

    @classmethod
    def from_factors(
        cls, linear: nn.Module, up: Tensor, down: Tensor, scheme: Scheme | None = None
    ) -> LowRankLinear:
        """Put factors up [N, rank] and down [rank, K] in the place of a `Linear` or `Conv1D`.

        Args:
            linear: whose bias and dtype stay.
            up, down: whose product stands for its weight.
            scheme: codes both; None leaves them in floating point.
        """
        weight, bias = linear_weight(linear)
        layers: list[nn.Module] = []
        for factor, own in ((down, None), (up, bias)):
            N, K = factor.shape
            plain = nn.Linear(K, N, bias=own is not None, device="meta")
            plain.weight = nn.Parameter(factor.to(weight.dtype))
            if own is not None:
                plain.bias = nn.Parameter(own.clone())
            layers.append(plain if scheme is None else QuantLinear.from_linear(plain, scheme))
        return cls(*layers).train(linear.training)

    @classmethod
    def empty(cls, linear: nn.Module, rank: int) -> LowRankLinear:
        """Return a layer of this rank in the place of `linear`, on the meta device."""
        weight, bias = linear_weight(linear)
        N, K = weight.shape
        shape = {"device": "meta", "dtype": weight.dtype}
        up = nn.Linear(rank, N, bias=bias is not None, **shape)  # type: ignore[arg-type]
        return cls(nn.Linear(K, rank, bias=False, **shape), up)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        """Numbers between the two layers."""
        return int(self.down.out_features)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The weight of `up`, whose dtype and device model code reads."""
        return self.up.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y

    def dequantize(self) -> Tensor:
        """Return the weight that the product stands for, float32 [N, K]."""
        up, down = (dense_weight(layer) for layer in (self.up, self.down))
        return torch.mm(up.float(), down.float())

    def bytes(self) -> int:
        """Bytes of both layers in a checkpoint."""
        return sum(
            layer.bytes()
            if isinstance(layer, CompressedLayer)
            else sum(p.numel() * p.element_size() for p in layer.parameters())
            for layer in (self.down, self.up)
        )
