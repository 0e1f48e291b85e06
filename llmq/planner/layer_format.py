"""A linear layer in any of the library's formats: how its name is read, and the layer made.

What `plan` chooses among, and `bench` measures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from llmq.formats import low_rank
from llmq.nn import LowRankLinear, QuantLinear, SparseLinear, linear_weight
from llmq.pruning import magnitude
from llmq.quantization.algorithm import split_algorithm
from llmq.scheme import PRESETS, Pattern, Scheme, resolve_scheme


class LayerFormat(NamedTuple):
    """What a format's name says.

    Args:
        scheme: of the values; None for floating point.
        sparse: share of the weights that are pruned.
        low_rank: how many numbers two factors have, as a share of the weight's; 0 for no factors.
        scaling: of the inputs, before codes are found: `"smoothquant"` or `"awq"`.
        rounding: how codes are found: `"rtn"`, `"clip"` or `"gptq"`.
    """

    scheme: Scheme | None
    sparse: float = 0.0
    low_rank: float = 0.0
    scaling: str | None = None
    rounding: str = "rtn"

    @property
    def algorithm(self) -> str:
        """As `llmq.quantize` takes it."""
        if self.scaling is None:
            return self.rounding
        return self.scaling if self.rounding == "rtn" else f"{self.scaling}+{self.rounding}"

    @property
    def calibrated(self) -> bool:
        """Whether codes are found with data."""
        return self.algorithm != "rtn"


def parse(name: str) -> LayerFormat:
    """Read a scheme's name, alone or with an algorithm of `llmq.quantize` (`"w4a16-g32 gptq"`), or
    `"sparse N % SCHEME"` or `"low-rank N % SCHEME"`, or `… float`.

    Raises:
        ValueError: if it is none of these.
    """
    words = name.split()
    if len(words) < 2:
        return LayerFormat(_dynamic(name))
    if len(words) == 2:
        scaling, how = split_algorithm(words[1])
        if scaling is None and how == "rtn":
            raise ValueError(f"{name!r} is {words[0]!r} itself; leave out the algorithm")
        return LayerFormat(_dynamic(words[0]), scaling=scaling, rounding=how)
    kind, number, *rest = words
    if (
        kind not in ("sparse", "low-rank")
        or len(rest) != 2
        or rest[0] != "%"
        or not number.isdigit()
        or not 0 < int(number) < 100
    ):
        raise ValueError(
            f"unknown format {name!r}; use 'sparse N % SCHEME' or 'low-rank N % SCHEME' with N of "
            f"1 … 99 (and 'float' for no scheme), or one of {', '.join(PRESETS)}"
        )
    scheme = None if rest[1] == "float" else _dynamic(rest[1])
    share = int(number) / 100
    if kind == "low-rank":
        return LayerFormat(scheme, low_rank=share)
    return LayerFormat(scheme, sparse=share)


def _dynamic(name: str) -> Scheme:
    scheme = resolve_scheme(name)
    if scheme.activations == "static":
        raise ValueError(f"{name} needs calibrated input scales, which llmq.quantize measures")
    return scheme


def fits(name: str, N: int, K: int) -> bool:
    """Whether a weight [N, K] can be of format `name`: its groups divide K, its rank is smaller."""
    wanted = parse(name)
    try:
        if wanted.low_rank:
            rank = low_rank.rank_of(N, K, wanted.low_rank)
            if rank >= min(N, K):
                return False
            if wanted.scheme is not None:
                wanted.scheme.check_fits(rank, K)
                wanted.scheme.check_fits(N, rank)
        elif wanted.scheme is not None:
            wanted.scheme.check_fits(N, K)
    except ValueError:
        return False
    return True


def make_layer(
    linear: nn.Module, name: str, moments: torch.Tensor | None = None
) -> QuantLinear | SparseLinear | LowRankLinear:
    """Return a `Linear` or `Conv1D` in format `name`.

    Codes are rounded to nearest, and weights pruned by magnitude; low-rank factors are those that
    lose least for inputs of second `moments` [K, K], up to a factor (None: all inputs alike).
    """
    wanted = parse(name)
    if wanted.calibrated:
        raise ValueError(f"{name} needs the inputs of a layer; llmq.quantize and llmq.plan make it")
    weight = linear_weight(linear)[0]
    if wanted.low_rank:
        rank = low_rank.rank_of(weight.shape[0], weight.shape[1], wanted.low_rank)
        up, down = low_rank.factors(weight, rank, moments)
        return LowRankLinear.from_factors(linear, up, down, wanted.scheme)
    if wanted.sparse:
        kept = magnitude.mask(weight, Pattern("unstructured"), wanted.sparse)
        return SparseLinear.from_linear(linear, scheme=wanted.scheme, mask=kept)
    assert wanted.scheme is not None
    return QuantLinear.from_linear(linear, wanted.scheme)
