"""y = x Wᵀ of weights coded by a codebook: `_weight_only_gemm` with levels looked up.

    y[m, n] = Σ_groups (Σ_k x[m, k] · codebook[n, code[n, k]]) · weight_scale + bias

Storage is canonical: codes unsigned 8 bits [N, K] or nibbles [N, ceil(K/2)], codebook float32
[N or 1, 2^bits]. Levels are read from L1, where a table of 16 takes one line and one of 256 eight.

Bound: the look-ups, up to 8 lines a warp and load at 8 bits. Not yet measured.
"""

from __future__ import annotations

from torch import Tensor

from llmq_kernels.weight_only_gemm import float_gemm


def codebook_linear(
    x: Tensor,
    weight: Tensor,
    weight_codebook: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    """Compute `torch.ops.llmq.codebook_linear` of x [..., K]."""
    return float_gemm(x, weight, weight_scale, None, weight_codebook, bias, bits)
