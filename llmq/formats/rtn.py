"""Rounds a weight to the nearest codes of its scheme, uniform or quantile.

The one place that knows which format and which arguments a `Scheme` stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq.formats import codebook, uniform
from llmq.scheme import Scheme

Encoded = uniform.UniformWeight | codebook.CodebookWeight


def encode(
    weight: Tensor,
    scheme: Scheme,
    *,
    importance: Tensor | None = None,
    table: Tensor | None = None,
) -> Encoded:
    """Return the codes of a weight.

    Args:
        weight: [N, K] in floating point, finite.
        scheme: whose group size divides K.
        importance: what an error in each input counts, float32 [K], to fit codebooks; None is 1.
        table: the codebook [1 or N, levels] of a quantile scheme; None fits one.

    Raises:
        ValueError: if the weight is not finite or a group size does not divide K.
    """
    shape: Any = {"granularity": scheme.granularity, "group_size": scheme.group_size}
    if scheme.method == "quantile":
        return codebook.encode(
            weight, bits=scheme.bits, **shape, importance=importance, weight_codebook=table
        )
    return uniform.encode(weight, bits=scheme.bits, **shape, symmetric=scheme.symmetric)


def fake_quantize(weight: Tensor, scheme: Scheme, table: Tensor | None = None) -> Tensor:
    """Return float32 weight [N, K] as its codes give it: `decode(encode(weight))`.

    `table` is the codebook of a quantile scheme, which stays as it is.
    """
    quantile = scheme.method == "quantile"
    if scheme.bits == 8 and scheme.symmetric and scheme.granularity == "channel" and not quantile:
        # The same in 6 passes over memory instead of 12.
        scale = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True)) / 127
        scale = torch.where(scale == 0, 1.0, scale.clamp(min=torch.finfo(torch.float32).tiny))
        return (weight / scale).round_().clamp_(-127, 127).mul_(scale)
    encoded = encode(weight, scheme, table=table)
    decode = codebook.decode if quantile else uniform.decode
    return decode(*encoded, bits=scheme.bits, K=weight.shape[1])  # type: ignore[arg-type]
