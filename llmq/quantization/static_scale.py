"""Static activation scales: one step for all inputs of a layer, measured on calibration data.

The largest input makes the step, max|x| / 127, or the part of that range which loses least of the
layer's outputs: inputs beyond it saturate, all others get finer codes. The loss

    Σ_x Σ_k (Σ_n W_nk²) (x_k − x̂_k)²

is the squared error of the outputs if those of inputs are independent; what saturates is mostly one
channel, of which it is exact. (The ranges that TensorRT, Migacz, GTC 2017, and Nagel et al.,
arXiv:2106.08295, section 3.2, search by other losses.)
"""

from __future__ import annotations

from torch import Tensor

from llmq.calibrate.statistics import Statistics
from llmq.formats import activation

_PARTS = tuple(2 ** (-step / 4) for step in range(25))  # of the range that are tried, down to 1/64


def whole_range(largest: Tensor) -> Tensor | None:
    """Return max|x| / 127 [1] of the largest |x| of each channel [K]; None where x was always 0."""
    scale = largest.float().amax().reshape(1) / 127 if largest.numel() else largest.new_zeros(1)
    return scale if float(scale) > activation.SMALLEST else None


def least_loss(statistics: Statistics, weight: Tensor) -> Tensor | None:
    """Return the scale [1] of the part of the range that loses least on the sampled inputs.

    Args:
        statistics: of the layer's inputs, some of which are kept as they are.
        weight: [N, K] in floating point.
    """
    whole = whole_range(statistics.largest)
    if whole is None:
        return None
    x, importance = statistics.inputs(), weight.float().square().sum(0)

    def loss(scale: Tensor) -> float:
        error = decoded(x, scale).sub_(x).square_()
        return float((error * importance).sum())

    scales = [whole * part for part in _PARTS if float(whole) * part > activation.SMALLEST]
    return min(scales, key=loss)


def decoded(x: Tensor, scale: Tensor) -> Tensor:
    """Return inputs x [rows, K] as the codes on a scale [1] give them."""
    codes, x_scale = activation.quantize_activation(x, 0, scale)
    return codes.float() * x_scale
