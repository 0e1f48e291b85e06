"""How the codes of a weight are chosen, by name: to nearest, in a clipped range, or by GPTQ."""

from __future__ import annotations

from torch import Tensor

from llmq.formats import rtn, uniform
from llmq.quantization import clip, gptq
from llmq.scheme import Scheme


def encode(
    weight: Tensor,
    scheme: Scheme,
    rounding: str = "rtn",
    moments: Tensor | None = None,
    *,
    kept: Tensor | None = None,
) -> rtn.Encoded:
    """Code a weight [N, K].

    Args:
        weight: in floating point, finite.
        scheme: whose group size divides K.
        rounding: one of `algorithm.ROUNDINGS`.
        moments: Σ xᵀx of the inputs, float32 [K, K], or its diagonal [K], which is enough for
            all but `"gptq"`; None where no data came: GPTQ then rounds to nearest.
        kept: bool [N, K], which weights are not zero and stay so; None for all.
    """
    if rounding == "gptq" and moments is not None:
        return gptq.encode(weight, moments, scheme, kept=kept)
    importance = None
    if moments is not None:
        importance = moments.diagonal() if moments.dim() == 2 else moments
    if scheme.method == "quantile" or rounding == "rtn":
        return rtn.encode(weight, scheme, importance=importance)
    scale, zero_point = clip.clipped_grid(weight, scheme, importance)
    return uniform.on_grid(weight, scale, zero_point, bits=scheme.bits)
