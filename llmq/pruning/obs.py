"""Changes a weight one input at a time, the inputs after it making up for each change.

The solver that GPTQ and SparseGPT share. Of a weight W [N, K] and the second moments H [K, K] of
its inputs, it lowers the error of the outputs, tr(ΔW H ΔWᵀ). With U upper triangular and UᵀU = H⁻¹,
input j takes the value q that it is given, and what is right of it takes up the error:

    e = (w_j - q) / U_jj        W[:, j:] -= e U[j, j:]

(Frantar et al., arXiv:2210.17323, equations 2 and 3 and the Cholesky form of section 3.3; Frantar
and Alistarh, arXiv:2301.00774, equation 3.) Rows are independent. Blocks of 128 columns update what
is right of them at once, so that memory is read once a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 128
DAMPING = 0.01  # of the mean of the diagonal, as in both papers

Round = Callable[[Tensor, int], Tensor]  # (values [N] of an input, which input) → what they become
# (values [N, columns], diagonal of U there, first column) → which of them stay, bool
Choose = Callable[[Tensor, Tensor, int], Tensor]


def inverse_factor(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Return U upper triangular with UᵀU = (H + λ)⁻¹, float32 [K, K].

    λ is `damping` times the mean of H's diagonal, and ten times as much each time that H is still
    not positive definite. An input that was always zero gets that mean on its diagonal and so
    stands alone: its weights are rounded to nearest, and none is lost to data without it.

    Args:
        moments: H, Σ xᵀx up to a factor, float32 [K, K], finite.
        damping: positive.

    Raises:
        ValueError: if no damping helps: H is not finite.
    """
    H = moments.double()
    if H.data_ptr() == moments.data_ptr():
        H = H.clone()
    diagonal = H.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    diagonal[dead] = mean
    while damping < 1e3:
        diagonal += damping * mean
        # With the order reversed, L Lᵀ = H becomes V Vᵀ = H with V upper, and U = V⁻¹.
        lower, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not int(failed):
            eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
            upper = lower.flip(0, 1)
            return torch.linalg.solve_triangular(upper, eye, upper=True).float()
        damping *= 10
    raise ValueError("second moments of the inputs are not finite")


def solve(
    weight: Tensor,
    upper: Tensor,
    *,
    round_to: Round | None = None,
    kept: Tensor | None = None,
    choose: Choose | None = None,
    step: int = _BLOCK,
) -> tuple[Tensor, Tensor | None]:
    """Return the changed weight float32 [N, K], and which of its values stay, bool [N, K] or None.

    Args:
        weight: [N, K] in floating point.
        upper: U [K, K] of `inverse_factor`.
        round_to: what values become; None leaves them in floating point.
        kept: bool [N, K]; what is False becomes 0.
        choose: picks what stays among the next `step` columns, once those before have changed.
        step: divides 128, or is a multiple of it.
    """
    W = weight.float().clone()
    K = W.shape[1]
    mask = None if kept is None and choose is None else torch.ones_like(W, dtype=torch.bool)
    if mask is not None and kept is not None:
        mask &= kept
    block = max(step, _BLOCK)
    for start in range(0, K, block):
        end = min(start + block, K)
        part, U = W[:, start:end], upper[start:end, start:end]
        errors = torch.zeros_like(part)
        for j in range(end - start):
            if choose is not None and j % step == 0:
                assert mask is not None
                stop = min(j + step, end - start)
                chosen = choose(part[:, j:stop], U.diagonal()[j:stop], start + j)
                mask[:, start + j : start + stop] = chosen
            value = part[:, j]
            wanted = value if round_to is None else round_to(value, start + j)
            if mask is not None:
                wanted = torch.where(mask[:, start + j], wanted, 0.0)
            errors[:, j] = (value - wanted) / U[j, j]
            part[:, j + 1 :].addr_(errors[:, j], U[j, j + 1 :], alpha=-1)
            part[:, j] = wanted
        W[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    return W, mask
