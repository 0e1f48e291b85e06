"""The verb `fine_tune`: trains a compressed model to recover, while it stays compressed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.algorithms.straight_through import Master
from llmq.nn import CompressedLayer, QuantLinear, SparseLinear

_METHODS = ("full",)
DEFAULT_LR = 3e-4
_WARMUP = 0.05  # of all steps
_SAVE_EVERY = 60.0  # seconds between two states on disk


@dataclass
class History:
    """What happened in training: one entry an optimizer step.

    Args:
        losses: mean loss of each step's batch.
        learning_rates: of each step.
        seconds: of wall-clock time, in this call.
        resumed_at: the step at which an interrupted training was taken up, else 0.
    """

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    seconds: float = 0.0
    resumed_at: int = 0

    def __str__(self) -> str:
        if not self.losses:
            return "no steps"
        tail = self.losses[-min(10, len(self.losses)) :]
        return (
            f"{len(self.losses)} steps in {self.seconds:.0f} s, loss {self.losses[0]:.3f} -> "
            f"{sum(tail) / len(tail):.3f}"
        )


def fine_tune(
    model: nn.Module,
    train_data: Iterable[Any],
    epochs: int = 1,
    *,
    steps: int | None = None,
    lr: float | None = None,
    teacher: nn.Module | None = None,
    method: str = "full",
    checkpoint_dir: str | os.PathLike[str] | None = None,
) -> History:
    """Train `model` in place; pruned weights stay exactly zero and codes stay codes.

    Each compressed linear layer trains a float32 master of its weight (and its bias) through the
    rounding of its scheme by a straight-through estimator, and is coded again at the end with the
    same scheme and mask. All other parameters with `requires_grad` train as they are. Quantized
    embeddings, and layers tied to them, stay as they are. AdamW, linear warm-up over 5 % of the
    steps, cosine decay, gradients clipped to norm 1.

    Args:
        model: compressed or not, on any device.
        train_data: batches, iterated once an epoch. A batch is token ids [T] or [B, T] (a causal
            model's own labels), a dict of the model's arguments with `labels`, or a pair
            (inputs, targets). Without `len()` it is read into a list first.
        epochs: passes over the data.
        steps: stops after that many optimizer steps, however many passes that takes.
        lr: peak learning rate; 3e-4 if None.
        teacher: a model of the same vocabulary; half of the loss is then the KL divergence of the
            student's distribution from the teacher's (Hinton et al., arXiv:1503.02531).
        method: `"full"`.
        checkpoint_dir: where the state of training is kept, each minute. If a state of the same
            training lies there, it goes on from it; the data must come in the same order.

    Returns:
        The loss and learning rate of every step.

    Raises:
        ValueError: if an argument or a batch is unusable, nothing can be trained, a state in
            `checkpoint_dir` belongs to another training, or the loss is not finite. The model is
            then as it was, as it is after any other exception.

    Example:
        >>> llmq.fine_tune(model, windows, steps=100, teacher=original)
    """
    batches, total = _plan(model, train_data, epochs, steps, method)
    peak = DEFAULT_LR if lr is None else lr
    if not (isinstance(peak, (int, float)) and math.isfinite(peak) and peak > 0):
        raise ValueError(f"lr must be a positive number, got {lr!r}")
    masters = _masters(model)
    if not masters and not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing to train: no compressed layer, no parameter with requires_grad")
    modes = {module: module.training for module in model.modules()}
    backup = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    forward = {id(layer): master for layer, master in masters}
    _swap(model, forward)
    try:
        model.train()
        if teacher is not None:
            teacher.eval()
        history = _train(model, batches, total, peak, teacher, checkpoint_dir)
    except BaseException:
        with torch.no_grad():
            for parameter, before in backup.items():
                parameter.copy_(before)
        raise
    else:
        for layer, master in masters:
            layer.load_state_dict(master.encoded().state_dict())
    finally:
        _swap(model, {id(master): layer for layer, master in masters})
        for module, training in modes.items():
            module.training = training
        for parameter in model.parameters():
            parameter.grad = None
    return history


def _plan(
    model: nn.Module, train_data: Iterable[Any], epochs: int, steps: int | None, method: str
) -> tuple[Iterable[Any], int]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if method not in _METHODS:
        raise ValueError(f"unknown method {method!r}; there is {', '.join(_METHODS)}")
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(train_data, (str, bytes, dict)) or not isinstance(train_data, Iterable):
        raise TypeError(
            f"train_data must be an iterable of batches, got {type(train_data).__name__}; "
            f"tokenize text first"
        )
    batches = train_data if isinstance(train_data, Sized) else list(train_data)
    if len(batches) == 0:  # type: ignore[arg-type]
        raise ValueError("train_data is empty")
    return batches, steps or epochs * len(batches)  # type: ignore[arg-type]


def _masters(model: nn.Module) -> list[tuple[QuantLinear | SparseLinear, Master]]:
    owners: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, CompressedLayer):
            owners[id(module.weight)] = owners.get(id(module.weight), 0) + 1
    return [
        (module, Master(module))
        for module in model.modules()
        if isinstance(module, (QuantLinear, SparseLinear)) and owners[id(module.weight)] == 1
    ]


def _swap(model: nn.Module, replacements: dict[int, Any]) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]


def _train(
    model: nn.Module,
    batches: Iterable[Any],
    total: int,
    peak: float,
    teacher: nn.Module | None,
    checkpoint_dir: str | os.PathLike[str] | None,
) -> History:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    history = History()
    state = None if checkpoint_dir is None else _State(Path(checkpoint_dir), total, peak)
    if state is not None:
        state.restore(parameters, optimizer, history)
    started = saved = time.monotonic()
    first = len(history.losses)
    with tqdm(total=total, initial=first, desc="fine-tune", unit="step", delay=1) as progress:
        for step, batch in enumerate(_cycle(batches, total)):
            if step < first:
                continue
            rate = peak * _schedule(step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _loss(model, batch, teacher)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(
                    f"loss is {value} at step {step + 1} of {total}; a smaller lr than {peak:g} "
                    f"or other data would do; the model is as it was"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.losses.append(value)
            history.learning_rates.append(rate)
            progress.set_postfix(loss=f"{value:.3f}", lr=f"{rate:.1e}", refresh=False)
            progress.update()
            if state is not None and time.monotonic() - saved > _SAVE_EVERY:
                state.save(parameters, optimizer, history)
                saved = time.monotonic()
    history.seconds = time.monotonic() - started
    if state is not None:
        state.file.unlink(missing_ok=True)
    return history


def _cycle(batches: Iterable[Any], total: int) -> Iterator[Any]:
    given = 0
    while given < total:
        before = given
        for batch in batches:
            if given == total:
                return
            yield batch
            given += 1
        if given == before:
            raise ValueError("train_data gave no batch when iterated again; pass a list")


def _schedule(step: int, total: int) -> float:
    warmup = max(1, round(_WARMUP * total))
    rise = min(1.0, (step + 1) / warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * step / total))


def _loss(model: nn.Module, batch: Any, teacher: nn.Module | None) -> Tensor:
    """Return the mean loss of one batch, half of it from the teacher where there is one."""
    device = next(model.parameters()).device
    args, kwargs, targets = _arguments(batch, device)
    output = model(*args, **kwargs)
    loss = _own_loss(output, targets)
    if teacher is None:
        if loss is None:
            raise ValueError(
                "the model returns no loss for this batch: give it labels, pairs of inputs and "
                "targets, or a teacher"
            )
        return loss
    with torch.no_grad():
        wanted = _prediction(teacher(*args, **kwargs))
    given = _prediction(output)
    if given.shape != wanted.shape:
        raise ValueError(
            f"teacher's output {list(wanted.shape)} and model's {list(given.shape)} differ"
        )
    if _logits(output) is None:
        distance = F.mse_loss(given.float(), wanted.float())
    else:
        distance = F.kl_div(
            given.float().log_softmax(-1).flatten(0, -2),
            wanted.float().log_softmax(-1).flatten(0, -2),
            log_target=True,
            reduction="batchmean",
        )
    return distance if loss is None else 0.5 * loss + 0.5 * distance


def _arguments(
    batch: Any, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    if isinstance(batch, Tensor):
        if batch.is_floating_point() or batch.dim() not in (1, 2):
            raise ValueError(
                f"a batch that is one tensor must be token ids [T] or [B, T], got {batch.dtype} "
                f"{list(batch.shape)}"
            )
        ids = batch.reshape(-1, batch.shape[-1]).to(device)
        return (), {"input_ids": ids, "labels": ids}, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
        targets = targets.to(device)
        if isinstance(inputs, dict):
            return (), {k: _to(v, device) for k, v in inputs.items()}, targets
        return (_to(inputs, device),), {}, targets
    if hasattr(batch, "items"):
        return (), {k: _to(v, device) for k, v in batch.items()}, None
    raise ValueError(
        f"a batch must be token ids, a dict of the model's arguments or a pair (inputs, targets), "
        f"got {type(batch).__name__}"
    )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _logits(output: Any) -> Tensor | None:
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _prediction(output: Any) -> Tensor:
    for value in (_logits(output), getattr(output, "last_hidden_state", None), output):
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"found neither logits nor a tensor in the model's {type(output).__name__}")


def _own_loss(output: Any, targets: Tensor | None) -> Tensor | None:
    if targets is None:
        loss = getattr(output, "loss", None)
        return loss if isinstance(loss, Tensor) else None
    prediction = _prediction(output)
    if targets.is_floating_point():
        return F.mse_loss(prediction, targets)
    return F.cross_entropy(prediction.flatten(0, -2), targets.flatten())


class _State:
    """The state of an interrupted training, one safetensors file that replaces itself whole."""

    def __init__(self, folder: Path, total: int, lr: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "training.safetensors"
        self.plan = {"steps": total, "lr": lr}

    def save(
        self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, history: History
    ) -> None:
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
        for i, parameter in enumerate(parameters):
            tensors[f"{i}.value"] = parameter.detach()
            for name, value in optimizer.state[parameter].items():
                tensors[f"{i}.{name}"] = value
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        record = {"losses": history.losses, "learning_rates": history.learning_rates}
        metadata = {"llmq": json.dumps({"plan": self.plan, "history": record})}
        partial = self.file.with_suffix(".partial")
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, self.file)

    def restore(
        self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, history: History
    ) -> None:
        if not self.file.exists():
            return
        try:
            with safe_open(self.file, framework="pt") as file:
                record = json.loads((file.metadata() or {})["llmq"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shapes = [tuple(tensors[f"{i}.value"].shape) for i in range(len(parameters))]
            matches = record["plan"] == self.plan and shapes == [tuple(p.shape) for p in parameters]
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.file} is no state of a training: {error!r}") from error
        if not matches:
            raise ValueError(
                f"{self.file} belongs to another training ({record['plan']}, not {self.plan}); "
                f"delete it or name another checkpoint_dir"
            )
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                parameter.copy_(tensors[f"{i}.value"])
                prefix = f"{i}."
                optimizer.state[parameter] = {
                    name.removeprefix(prefix): tensor.to(
                        "cpu" if name.endswith(".step") else parameter.device
                    )
                    for name, tensor in tensors.items()
                    if name.startswith(prefix) and not name.endswith(".value")
                }
        torch.set_rng_state(tensors["rng"])
        history.losses = record["history"]["losses"]
        history.learning_rates = record["history"]["learning_rates"]
        history.resumed_at = len(history.losses)
