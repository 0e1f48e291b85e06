"""What training minimizes: a batch's own loss, and the distance from a teacher."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.models.batches import unpack

_IGNORED = -100  # transformers' label for positions that do not count


@dataclass(frozen=True)
class Teacher:
    """A model to learn from, and how much its outputs count.

    The loss is (1 − weight) · own + weight · KL + hidden_weight · hidden: own is the batch's loss
    from its labels (left out, with its share, where there are none); KL that of the student's
    distribution from the teacher's (Hinton et al., arXiv:1503.02531, at temperature 1; mean squared
    distance of last hidden states for bare encoders); hidden the mean over layers of
    ‖h − h′‖² / ‖h‖² of hidden states h of the teacher, h′ of the student (Jiao et al.,
    arXiv:1909.10351, eq. 8, made free of scale). Layers are matched evenly where the student has
    fewer.
    """

    model: nn.Module
    weight: float = 0.5
    hidden_weight: float = 0.0


def loss_of(model: nn.Module, batch: Any, teacher: Teacher | None) -> Tensor:
    """Return the mean loss of one batch, part of it from the teacher where there is one.

    Raises:
        TypeError: if the batch is of no known form.
        ValueError: if it gives no loss, or the models' outputs do not belong together.
    """
    device = next(model.parameters()).device
    args, kwargs, targets = arguments(batch, device)
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = (
            False  # nothing is decoded, and a block computed twice would add twice
        )
    if teacher is not None and teacher.hidden_weight:
        kwargs["output_hidden_states"] = True
    output = model(*args, **kwargs)
    loss = own_loss(output, targets)
    if teacher is None:
        if loss is None:
            raise ValueError(
                "the model returns no loss for this batch: give it labels, pairs of inputs and "
                "targets, or a teacher"
            )
        return loss
    with torch.no_grad():
        wanted = teacher.model(*args, **unlabelled(teacher.model, kwargs))
    total = _distance(output, wanted, kwargs)
    if loss is not None:
        total = (1 - teacher.weight) * loss + teacher.weight * total
    if teacher.hidden_weight:
        total = total + teacher.hidden_weight * _hidden_distance(output, wanted, kwargs)
    return total


def arguments(
    batch: Any, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Return (positional, keyword arguments, targets) of one batch, on the model's device.

    Labels that the model itself makes a loss of are among the arguments, and no targets.
    """
    if isinstance(batch, Tensor) and (batch.is_floating_point() or batch.dim() not in (1, 2)):
        raise ValueError(
            f"a batch that is one tensor must be token ids [T] or [B, T], got {batch.dtype} "
            f"{list(batch.shape)}"
        )
    args, kwargs, labels = unpack(batch, device)
    if isinstance(batch, Tensor):
        kwargs["labels"] = labels
    return args, kwargs, labels if isinstance(batch, (tuple, list)) else None


def unlabelled(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments without labels, of which `model` would only make a loss.

    An encoder-decoder makes of them what its decoder reads.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return kwargs
    return {name: value for name, value in kwargs.items() if name != "labels"}


def own_loss(output: Any, targets: Tensor | None) -> Tensor | None:
    """Return the loss that a model gives itself, or that of its prediction of `targets`."""
    if targets is None:
        loss = getattr(output, "loss", None)
        return loss if isinstance(loss, Tensor) else None
    prediction = _prediction(output)
    if targets.is_floating_point():
        return F.mse_loss(prediction, targets)
    return F.cross_entropy(prediction.flatten(0, -2), targets.flatten())


def _logits(output: Any) -> Tensor | None:
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _prediction(output: Any) -> Tensor:
    for value in (_logits(output), getattr(output, "last_hidden_state", None), output):
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"found neither logits nor a tensor in the model's {type(output).__name__}")


def _distance(output: Any, wanted: Any, kwargs: dict[str, Any]) -> Tensor:
    given, asked = _prediction(output), _prediction(wanted)
    if given.shape != asked.shape:
        raise ValueError(
            f"teacher's output {list(asked.shape)} and model's {list(given.shape)} differ"
        )
    if _logits(output) is None:
        given, asked = _counted(given, asked, kwargs.get("attention_mask"))
        return F.mse_loss(given.float(), asked.float())
    labels = kwargs.get("labels")
    given, asked = given.flatten(0, -2), asked.flatten(0, -2)
    if labels is not None and labels.numel() == given.shape[0]:
        counted = labels.flatten() != _IGNORED  # what pads a batch teaches nothing
        if not counted.all():
            given, asked = given[counted], asked[counted]
    return F.kl_div(
        given.float().log_softmax(-1),
        asked.float().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )


def _hidden_distance(output: Any, wanted: Any, kwargs: dict[str, Any]) -> Tensor:
    total: list[Tensor] = []
    for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        given, asked = (getattr(o, name, None) for o in (output, wanted))
        if given is None or asked is None:
            continue
        mask = kwargs.get("attention_mask") if name != "decoder_hidden_states" else None
        for i, h in enumerate(given):
            of = asked[round(i * (len(asked) - 1) / max(len(given) - 1, 1))]
            if h.shape != of.shape:
                raise ValueError(
                    f"hidden states of teacher {list(of.shape)} and model {list(h.shape)} differ: "
                    f"hidden_weight takes models of one hidden size"
                )
            total.append(_relative(*_counted(h.float(), of.float(), mask)))
    if not total:
        raise ValueError(f"{type(output).__name__} has no hidden states; leave hidden_weight=0")
    return torch.stack(total).mean()


def _counted(given: Tensor, asked: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return hidden states [B, T, K] where a mask [B, T] has ones, all if it has another shape."""
    if mask is not None and mask.shape == given.shape[:2]:
        return given[mask.bool()], asked[mask.bool()]
    return given, asked


def _relative(given: Tensor, asked: Tensor) -> Tensor:
    return (given - asked).square().sum() / asked.square().sum().clamp(min=1e-12)
