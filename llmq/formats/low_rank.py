"""Low-rank factors of a weight that lose least of its outputs, by a singular value decomposition.

For inputs x with second moments H = E[xxᵀ] = LLᵀ, the weight W′ of rank r with the least
E‖Wx − W′x‖² is U_r S_r V_rᵀ L⁻¹ where U S Vᵀ = WL, and what it loses is the sum of the squares of
the singular values left out (Eckart and Young, Psychometrika 1, 1936; truncation-aware whitening of
Wang et al., SVD-LLM, arXiv:2403.07378, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 0.01  # of the mean of the diagonal: inputs that the data hardly shows count a little


def rank_of(N: int, K: int, share: float) -> int:
    """Return the rank at which both factors hold `share` of a weight's [N, K] numbers.

    A multiple of 32 from there on, so that groups of inputs fit the factors too.
    """
    rank = max(1, int(share * N * K / max(N + K, 1)))
    return rank - rank % 32 if rank > 32 else rank


def factors(weight: Tensor, rank: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (up [N, rank], down [rank, K]) whose product stands for `weight`.

    Args:
        weight: [N, K] in floating point, finite.
        rank: 1 … min(N, K).
        moments: Σ xᵀx of its inputs up to a factor, [K, K]; None takes all inputs for alike.

    Raises:
        ValueError: if the rank is out of range or the moments are not finite or of another shape.
    """
    N, K = weight.shape
    if not 1 <= rank <= min(N, K):
        raise ValueError(f"rank must be in 1 … {min(N, K)} for a weight {[N, K]}, got {rank}")
    whitened, lower = weight.float(), None
    if moments is not None:
        if moments.shape != (K, K) or not bool(torch.isfinite(moments).all()):
            raise ValueError(f"moments must be finite {[K, K]}, got {list(moments.shape)}")
        H = moments.double()
        mean = H.diagonal().mean().clamp(min=1e-30)
        eye = torch.eye(K, dtype=H.dtype, device=H.device)
        lower = torch.linalg.cholesky(H / mean + _DAMPING * eye)
        whitened = (weight.double() @ lower).float()
    left, singular, right = torch.linalg.svd(whitened, full_matrices=False)
    root = singular[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    if lower is not None:
        down = torch.linalg.solve_triangular(lower, down.double(), upper=False, left=False).float()
    return up.contiguous(), down.contiguous()
