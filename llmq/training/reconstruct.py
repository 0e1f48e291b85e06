"""Lets compressed layers give the original's outputs again, by least squares and without labels.

Layer by layer, in the order in which they run: y [rows, N] is what the original's layer gives, x
[rows, K] what the compressed model now feeds its own, errors of the layers before included (as in
BRECQ, Li et al., arXiv:2102.05426, but solved, not trained). Then

    pruned layers     min Σ‖y − x Wᵀ‖² over the weights that the mask keeps, which are coded again
                      (the regression on a given mask of SparseGPT, arXiv:2301.00774, eq. 2)
    quantized layers  min over their scales, the codes kept: N small systems of as many unknowns as
                      a row has scales

A layer that would not come closer on this data stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.calibrate.blockwise import still
from llmq.calibrate.stages import Call, Stage, stages
from llmq.formats import uniform
from llmq.nn import QuantLinear, SparseLinear, linear_weight
from llmq.training.straight_through import Master

_STEPS = 50  # of conjugate gradients, at most
_DAMPING = 0.01  # of the mean of H's diagonal, towards the weight as it is


def reconstruct(model: nn.Module, teacher: nn.Module, calls: list[Call]) -> dict[str, float]:
    """Fit the compressed layers of `model`, in place, to what `teacher`'s give.

    Args:
        model: compressed; masks and schemes stay.
        teacher: the original, with layers of the same names.
        calls: what both are called with, a batch each.

    Returns:
        Σ‖y − ŷ‖² / Σ‖y‖² of each layer afterwards, by name; layers without a counterpart left out.

    Raises:
        ValueError: if the two models do not run the same blocks, or outputs are not finite.
    """
    errors: dict[str, float] = {}
    with still(model), still(teacher):
        pairs = zip(stages(model, calls, "reconstruct"), stages(teacher, calls), strict=True)
        for own, theirs in pairs:
            if own.name != theirs.name:
                raise ValueError(
                    f"the teacher runs {theirs.name or 'no further block'} where the model runs "
                    f"{own.name or 'none'}; reconstruction takes the model's own original"
                )
            for name in _order(own, errors):
                layer, counterpart = own.module.get_submodule(name), _counterpart(theirs, name)
                if counterpart is not None:
                    full = f"{own.name}.{name}" if own.name else name
                    moments = _moments(own, layer, theirs, counterpart)
                    if moments is not None and not math.isfinite(moments.total):
                        raise ValueError(f"{full} gives NaN or infinite outputs in the teacher")
                    errors[full] = _fit(layer, moments)
    return errors


def _order(stage: Stage, done: dict[str, float]) -> list[str]:
    """Return the names of a stage's compressed layers as they run."""
    names = {
        id(module): name
        for name, module in stage.module.named_modules()
        if isinstance(module, (QuantLinear, SparseLinear)) and name not in done
    }
    order: dict[str, None] = {}
    handles = [
        stage.module.get_submodule(name).register_forward_pre_hook(
            lambda module, _: order.setdefault(names[id(module)])
        )
        for name in names.values()
    ]
    try:
        next(stage.run())
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _counterpart(stage: Stage, name: str) -> nn.Module | None:
    try:
        module = stage.module.get_submodule(name)
        linear_weight(module)
    except (AttributeError, TypeError):
        return None
    return module


class Moments:
    """Of one layer: H = Σ xᵀx [K, K], C = Σ yᵀx [N, K] and Σ‖y‖²; x may end in a column of ones."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.H, self.C = x.T @ x, y.T @ x
        self.total = float(y.double().square().sum())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in further rows."""
        self.H.addmm_(x.T, x)
        self.C.addmm_(y.T, x)
        self.total += float(y.double().square().sum())

    def error(self, weight: Tensor) -> float:
        """Return Σ‖y − x Wᵀ‖² / Σ‖y‖² of a weight [N, K]."""
        W, C = weight.double(), self.C.double()
        gone = float(((W @ self.H.double() - 2 * C) * W).sum())
        return max(0.0, 1 + gone / self.total) if self.total else 0.0


def _moments(own: Stage, layer: nn.Module, theirs: Stage, counterpart: nn.Module) -> Moments | None:
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    found: Moments | None = None
    with _watched(layer, inputs, None), _watched(counterpart, None, outputs):
        for _ in zip(own.run(), theirs.run(), strict=True):
            for x, y in zip(inputs, outputs, strict=True):
                if layer.bias is not None:
                    x = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)
                if found is None:
                    found = Moments(x, y)
                else:
                    found.add(x, y)
            inputs.clear()
            outputs.clear()
    return found


@contextmanager
def _watched(
    module: nn.Module, inputs: list[Tensor] | None, outputs: list[Tensor] | None
) -> Iterator[None]:
    def note(_m: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        if inputs is not None:
            x = (*args, *kwargs.values())[0]
            inputs.append(x.reshape(-1, x.shape[-1]).float())
        if outputs is not None:
            outputs.append(output.reshape(-1, output.shape[-1]).float())

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _fit(layer: nn.Module, moments: Moments | None) -> float:
    """Change `layer` if that lowers its error; return the error that it has then."""
    assert isinstance(layer, (QuantLinear, SparseLinear))
    if moments is None:
        return 0.0
    before = moments.error(_with_bias(layer))
    if isinstance(layer, SparseLinear):
        fitted = _refitted(layer, moments)
    elif layer.scheme.method == "uniform" and layer.scheme.granularity != "tensor":
        fitted = _rescaled(layer, moments)
    else:
        return before
    after = moments.error(_with_bias(fitted))
    if after < before:
        layer.load_state_dict(fitted.state_dict())
    return min(after, before)


def _with_bias(layer: QuantLinear | SparseLinear) -> Tensor:
    weight = layer.dequantize()
    return weight if layer.bias is None else torch.cat([weight, layer.bias.float()[:, None]], 1)


def _refitted(layer: SparseLinear, moments: Moments) -> QuantLinear | SparseLinear:
    master = Master(layer)
    assert master.mask is not None
    start, mask = _with_bias(layer), master.mask
    if master.bias is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    found = masked_least_squares(start, mask, moments.H, moments.C)
    with torch.no_grad():
        master.weight.copy_(found[:, : master.weight.shape[1]])
        if master.bias is not None:
            master.bias.copy_(found[:, -1])
    return master.encoded()


def masked_least_squares(
    start: Tensor, mask: Tensor, H: Tensor, C: Tensor, *, steps: int = _STEPS
) -> Tensor:
    """Return W [N, K] of least tr(W H Wᵀ) − 2 tr(W Cᵀ), plus a little ‖W − start‖², on `mask`.

    By conjugate gradients with the diagonal as preconditioner (Saad, Iterative Methods, 2003,
    algorithm 9.1), all rows at once: each is a system of its own, of as many unknowns as it keeps.

    Args:
        start: float32 [N, K], zero where the mask is False.
        mask: bool [N, K].
        H: [K, K]. C: [N, K].
        steps: at most.
    """
    damping = _DAMPING * float(H.diagonal().mean())
    scale = H.diagonal() + damping

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1, keepdim=True)

    W = start.clone()
    residual = (C - W @ H) * mask
    direction = z = residual / scale
    rz = first = dot(residual, z)
    for _ in range(steps):
        image = (direction @ H + damping * direction) * mask
        step = rz / dot(direction, image).clamp(min=1e-30)
        W = W + step * direction
        residual = residual - step * image
        z = residual / scale
        rz, before = dot(residual, z), rz
        if bool((rz <= 1e-10 * first).all()):
            break
        direction = z + rz / before.clamp(min=1e-30) * direction
    return W


def _rescaled(layer: QuantLinear, moments: Moments) -> QuantLinear:
    """Return the layer with the factors of its scales, and the bias, that fit best."""
    tensors = dict(layer.canonical())
    N, K, G = layer.out_features, layer.in_features, tensors["weight_scale"].shape[1]
    parts = layer.dequantize().unflatten(1, (G, K // G))
    unknowns = G + (layer.bias is not None)
    # Of each row n, what one unit of each factor adds to y: A f = b with A [G, G].
    A = moments.H.new_zeros(N, unknowns, unknowns)
    b = moments.H.new_zeros(N, unknowns)
    for g in range(unknowns):
        if g < G:
            inside = slice(g * (K // G), (g + 1) * (K // G))
            image = parts[:, g] @ moments.H[inside]
            b[:, g] = (parts[:, g] * moments.C[:, inside]).sum(1)
        else:
            image = moments.H[-1:].expand(N, -1)
            b[:, g] = moments.C[:, -1]
        A[:, g, :G] = (image[:, :K].unflatten(1, (G, K // G)) * parts).sum(2)
        if unknowns > G:
            A[:, g, G] = image[:, -1]
    target = torch.ones_like(b)  # what it is damped towards: factors of one, the bias as it is
    if layer.bias is not None:
        target[:, -1] = layer.bias.float()
    damping = _DAMPING * A.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    A = A + torch.diag_embed(damping)
    factor = torch.linalg.solve(A, b + damping * target)
    scale = tensors["weight_scale"] * factor[:, :G].clamp(0.5, 2.0)  # a scale stays positive
    coded = uniform.UniformWeight(tensors["weight"], scale, tensors.get("weight_zero_point"))
    bias = None if layer.bias is None else factor[:, -1].to(layer.bias.dtype)
    return QuantLinear.from_encoded(
        coded, bias, layer.scheme, in_features=K, input_scale=layer.input_scale
    )
