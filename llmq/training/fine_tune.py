"""The verb `fine_tune`: trains a compressed model to recover, while it stays compressed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sized
from typing import Any, NamedTuple

import torch
from torch import nn

from llmq.models.targets import find
from llmq.nn import QuantLinear, SparseLinear
from llmq.training.loop import History, Settings, train
from llmq.training.losses import Teacher, arguments, unlabelled
from llmq.training.reconstruct import reconstruct
from llmq.training.straight_through import Master

DEFAULT_LR = 3e-4
_LRS = {"full": DEFAULT_LR, "lora": 2e-3}
_METHODS = (*_LRS, "reconstruct")


class _Trained(NamedTuple):
    """A layer and what trains in its place."""

    layer: QuantLinear | SparseLinear | nn.Linear
    master: Master


def fine_tune(
    model: nn.Module,
    train_data: Iterable[Any],
    epochs: int = 1,
    *,
    steps: int | None = None,
    lr: float | None = None,
    teacher: nn.Module | None = None,
    method: str = "full",
    teacher_weight: float = 0.5,
    hidden_weight: float = 0.0,
    rank: int = 16,
    learn_scales: bool = False,
    validation: Iterable[Any] | None = None,
    validate_every: int | None = None,
    accumulate: int = 1,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    checkpoint_dir: str | os.PathLike[str] | None = None,
) -> History:
    """Train a compressed model in place, to recover what compression lost.

    The model stays compressed: pruned weights stay exactly zero, and quantized weights stay
    quantized. Each compressed linear layer trains a float32 copy of its weight through the rounding
    of its scheme (a straight-through estimator). At the end the weight is quantized again, with the
    same scheme and mask. Other parameters with `requires_grad` train as they are. Quantized
    embeddings do not change, nor do layers tied to them. The optimizer is AdamW, with linear
    warm-up over 5 % of the steps, cosine decay, and gradients clipped to norm 1.

    Args:
        model: compressed or not, on any device.
        train_data: batches, iterated once an epoch. A batch is token ids [T] or [B, T] (a causal
            model's own labels), a dict of the model's arguments with `labels`, or a pair
            (inputs, targets). Data without `len()` is read into a list first.
        epochs: passes over the data.
        steps: how many optimizer steps to train, instead of `epochs`.
        lr: peak learning rate. None stands for 3e-4, or 2e-3 with `"lora"`.
        teacher: a model of the same vocabulary, usually the original, whose outputs the model
            learns from. Labels are then optional (`llmq/training/losses.py` has the formula).
        method: `"full"` trains all weights. `"lora"` trains a low-rank update of each linear
            layer, compressed or not, and nothing else, so the optimizer needs little memory. The
            update is added before mask and rounding, and merged at the end. `"reconstruct"` does
            not train: it fits each compressed layer by least squares to the outputs of the
            teacher's layer of the same name, on all batches at once and without labels
            (`llmq/training/reconstruct.py`). It uses `train_data` and `teacher` only.
        teacher_weight: share of the distance from the teacher in the loss, in [0, 1].
        hidden_weight: weight of the distance from the teacher's hidden states, added to the loss.
        rank: of the update with `"lora"`.
        learn_scales: True trains the scales of uniform schemes too. False computes them from the
            weights at each step.
        validation: batches like `train_data`. Their loss is measured before training, every
            `validate_every` steps and at the end. The parameters with the lowest loss are kept; if
            training never lowers it, the model is as before.
        validate_every: optimizer steps; None stands for a tenth of all.
        accumulate: batches whose mean gradient makes one step.
        dtype: `torch.bfloat16` computes matrix products in bfloat16 (autocast). Trained parameters
            stay float32.
        gradient_checkpointing: True computes each block again in its backward pass. Memory is then
            needed for one block and the inputs of all, and training takes a third longer.
        checkpoint_dir: a directory that keeps the state of training, once a minute. If training is
            interrupted, the same call goes on from there. The data must come in the same order.

    Returns:
        The loss and learning rate of every step, and the validation losses. With `"reconstruct"`,
        the losses are the squared errors of the layers' outputs, each as a share of the output.

    Raises:
        TypeError: if an argument or a batch is of another type than those above.
        ValueError: if an argument or a batch cannot be used, if nothing can be trained, if
            `checkpoint_dir` holds the state of another training, or if the loss is not finite.

    After any exception the model is as it was before the call.

    Example:
        >>> llmq.fine_tune(model, windows, steps=100, teacher=original)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if method not in _METHODS:
        raise ValueError(f"unknown method {method!r}; there is {', '.join(_METHODS)}")
    for name, value in (
        ("epochs", epochs),
        ("steps", steps),
        ("rank", rank),
        ("accumulate", accumulate),
        ("validate_every", validate_every),
    ):
        _check_count(name, value)
    for name, weight, most in (
        ("teacher_weight", teacher_weight, 1.0),
        ("hidden_weight", hidden_weight, math.inf),
    ):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
            raise ValueError(f"{name} must be a number of 0 or more, got {weight!r}")
        if not weight <= most:
            raise ValueError(f"{name} must be at most {most:g}, got {weight!r}")
    if hidden_weight and teacher is None:
        raise ValueError("hidden_weight needs a teacher whose hidden states to come close to")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype must be None or torch.bfloat16, got {dtype!r}")
    batches = _batches("train_data", train_data)
    if method == "reconstruct":
        return _reconstructed(model, batches, teacher)
    checks = None if validation is None else list(_batches("validation", validation))
    peak = _LRS[method] if lr is None else lr
    if not (isinstance(peak, (int, float)) and math.isfinite(peak) and peak > 0):
        raise ValueError(f"lr must be a positive number, got {lr!r}")
    settings = Settings(
        steps=steps or epochs * math.ceil(len(batches) / accumulate),  # type: ignore[arg-type]
        lr=peak,
        accumulate=accumulate,
        validate_every=validate_every or 0,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
    )
    of = None if teacher is None else Teacher(teacher, float(teacher_weight), float(hidden_weight))
    return _trained(
        model, batches, settings, of, checks, checkpoint_dir, method, rank, learn_scales
    )


def _reconstructed(model: nn.Module, batches: Iterable[Any], teacher: nn.Module | None) -> History:
    """Fit the layers of `model`; it is as it was if that fails."""
    if teacher is None:
        raise ValueError('method="reconstruct" needs the original as teacher')
    started = time.monotonic()
    device = next(model.parameters()).device
    calls = []
    for batch in batches:
        args, kwargs, _ = arguments(batch, device)
        calls.append((args, unlabelled(model, kwargs)))
    layers = [m for m in model.modules() if isinstance(m, (QuantLinear, SparseLinear))]
    if not layers:
        raise ValueError("nothing to reconstruct: no compressed layer")
    before = [(layer, {n: t.clone() for n, t in layer.state_dict().items()}) for layer in layers]
    try:
        errors = reconstruct(model, teacher, calls)
    except BaseException:
        for layer, tensors in before:
            layer.load_state_dict(tensors)
        raise
    return History(losses=list(errors.values()), seconds=time.monotonic() - started)


def _trained(
    model: nn.Module,
    batches: Iterable[Any],
    settings: Settings,
    teacher: Teacher | None,
    validation: list[Any] | None,
    folder: str | os.PathLike[str] | None,
    method: str,
    rank: int,
    learn_scales: bool,
) -> History:
    """Train with masters in the layers' places, and put the layers back, trained or as before."""
    lora = method == "lora"
    trained = _masters(model, rank if lora else None, learn_scales)
    wanted = {p: p.requires_grad for p in model.parameters()}
    if not trained and (lora or not any(wanted.values())):
        raise ValueError("nothing to train: no compressed layer, no parameter with requires_grad")
    modes = {module: module.training for module in model.modules()}
    backup = {p: p.detach().clone() for p, wants in wanted.items() if wants and not lora}
    try:
        if lora:
            model.requires_grad_(False)
        _swap(model, {id(layer): master for layer, master in trained})
        model.train()
        if teacher is not None:
            teacher.model.eval()
        history = train(model, batches, settings, teacher, validation, folder)
    except BaseException:
        with torch.no_grad():
            for parameter, before in backup.items():
                parameter.copy_(before)
        raise
    else:
        for layer, master in trained:
            master.write(layer)
    finally:
        _swap(model, {id(master): layer for layer, master in trained})
        for module, training in modes.items():
            module.training = training
        for parameter, wants in wanted.items():
            parameter.requires_grad_(wants)
            parameter.grad = None
    return history


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _batches(name: str, data: Iterable[Any]) -> Iterable[Any]:
    if isinstance(data, (str, bytes, dict)) or not isinstance(data, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches, got {type(data).__name__}; tokenize text first"
        )
    batches = data if isinstance(data, Sized) else list(data)
    if len(batches) == 0:  # type: ignore[arg-type]
        raise ValueError(f"{name} is empty")
    return batches


def _masters(model: nn.Module, rank: int | None, learn_scales: bool) -> list[_Trained]:
    """Make a master of each layer that shares its weight with no other."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers: list[Any] = [m for m in model.modules() if isinstance(m, (QuantLinear, SparseLinear))]
    if rank is not None:
        groups = find(model, None, embeddings=False).groups
        layers += [t.module for group in groups for t in group if type(t.module) is nn.Linear]
        layers = [layer for layer in model.modules() if any(layer is one for one in layers)]
    generator = torch.Generator().manual_seed(0)
    return [
        _Trained(layer, Master(layer, rank, learn_scales=learn_scales, generator=generator))
        for layer in layers
        if owners[id(layer.weight)] == 1
    ]


def _swap(model: nn.Module, replacements: dict[int, Any]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
