"""Scales the inputs of linear layers so that codes fit them better: SmoothQuant and AWQ.

Both move the size of a channel from the input to the weight, x / s and W s, which changes nothing
until they are rounded. SmoothQuant (Xiao et al., arXiv:2211.10438, equation 4) takes

    s_j = max|x_j|^α / max|W_j|^(1 - α)

so that inputs of one token need fewer codes; AWQ (Lin et al., arXiv:2306.00978, equations 4 and 5)

    s_j = (mean|x_j|)^α

so that weights of large inputs get finer steps. α is the one that loses least of the layers' own
outputs on calibration inputs, input and weight coded as the layer will; s = 1 is tried too.
`folding.py` puts s where the model multiplies anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.calibrate.folding import Fold, Journal, find_folds
from llmq.calibrate.stages import Stage
from llmq.calibrate.statistics import Statistics
from llmq.formats import activation, rtn
from llmq.models.targets import Target
from llmq.nn import linear_weight
from llmq.quantization import static_scale
from llmq.scheme import Scheme

_STEPS = 20  # of α from 0 to 1, as AWQ searches


class Scaling:
    """Scales a model block by block; keeps what it changed, and names what it could scale.

    Args:
        kind: one of `algorithm.SCALINGS`.
        schemes: how each layer, by name, will be coded.
    """

    def __init__(self, kind: str, schemes: dict[str, Scheme]) -> None:
        self.kind = kind
        self.schemes = schemes
        self.journal = Journal()
        self.folded: list[str] = []

    def prepare(
        self, stage: Stage, groups: list[list[Target]], statistics: list[Statistics]
    ) -> None:
        """Scale what can be in one block, and `statistics` with it."""
        if not groups:
            return
        known = {g[0].name: s for g, s in zip(groups, statistics, strict=True)}
        folds = find_folds(stage.module, stage.calls[0], groups)
        for fold in folds:
            stats = known[fold.readers[0].name]
            if not stats.rows:
                continue
            scale = self.choose_scales(fold, stats)
            self.folded += [target.name for target in fold.readers]
            if scale is not None:
                fold.apply(scale, self.journal)
                stats.scale(scale)

    def choose_scales(self, fold: Fold, stats: Statistics) -> Tensor | None:
        """Return the scales [K] that lose least, None if it is those of 1."""
        x = stats.inputs()
        layers = [
            (linear_weight(target.module)[0].float(), self.schemes[target.name])
            for target in fold.readers
        ]
        wanted = [F.linear(x, weight) for weight, _ in layers]

        def loss(scale: Tensor | None) -> float:
            total = 0.0
            for (weight, scheme), y in zip(layers, wanted, strict=True):
                inputs = x if scale is None else x / scale
                largest = stats.largest if scale is None else stats.largest / scale
                inputs = _coded_inputs(inputs, scheme, largest)
                coded = rtn.fake_quantize(weight if scale is None else weight * scale, scheme)
                total += float((F.linear(inputs, coded) - y).square().sum())
            return total

        best, kept = loss(None), None
        for scale in self._candidates(stats, [weight for weight, _ in layers]):
            shared = fold.shared(scale)
            found = loss(shared)
            if found < best:
                best, kept = found, shared
        return kept

    def _candidates(self, stats: Statistics, weights: list[Tensor]) -> Iterator[Tensor]:
        largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        for step in range(1, _STEPS + 1):
            alpha = step / _STEPS
            if self.kind == "awq":
                scale = (stats.absolute / stats.rows).clamp(min=1e-4) ** alpha
            else:
                scale = stats.largest.clamp(min=1e-5) ** alpha
                scale = scale / largest.clamp(min=1e-5) ** (1 - alpha)
            # What all channels share cancels; this keeps folded weights about as large as before.
            scale = scale / (scale.log().mean().exp())
            # An input that never came has no size of its own.
            yield torch.where(stats.largest > 0, scale, 1.0).clamp(1e-3, 1e3)


def _coded_inputs(x: Tensor, scheme: Scheme, largest: Tensor) -> Tensor:
    """Return inputs as their codes give them; `largest` [K] is of all, of which x is a sample."""
    if scheme.activations is None:
        return x
    if scheme.activations == "static":
        static = static_scale.whole_range(largest)
        return x if static is None else static_scale.decoded(x, static)
    codes, scale = activation.quantize_activation(x, scheme.activation_group_size or 0)
    values: Any = codes.view(*scale.shape, -1).float() * scale[..., None]
    return values.view(x.shape)
