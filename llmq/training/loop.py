"""The loop of `fine_tune`: steps, schedule, validation, a state that survives an interruption."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from llmq.models.blocks import blocks, running
from llmq.storage.fingerprint import fingerprint
from llmq.storage.resume import Store
from llmq.training.losses import Teacher, loss_of

_WARMUP = 0.05  # of all steps
_SAVE_EVERY = 60.0  # seconds between two states on disk
_KEY = "training"  # of the entry that keeps the state


@dataclass
class History:
    """What happened in training: one entry an optimizer step.

    Args:
        losses: mean loss of each step's batches.
        learning_rates: of each step.
        validation: (steps done, mean loss on the validation data), the first before training.
        best_step: whose parameters were kept, where there was validation data; else the last.
        seconds: of wall-clock time, in this call.
        resumed_at: the step at which an interrupted training was taken up, else 0.
    """

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    seconds: float = 0.0
    resumed_at: int = 0

    def __str__(self) -> str:
        if not self.losses:
            return "no steps"
        tail = self.losses[-min(10, len(self.losses)) :]
        text = (
            f"{len(self.losses)} steps in {self.seconds:.0f} s, loss {self.losses[0]:.3f} -> "
            f"{sum(tail) / len(tail):.3f}"
        )
        if self.validation:
            best = min(loss for _, loss in self.validation)
            text += f", validation {self.validation[0][1]:.3f} -> {best:.3f} at {self.best_step}"
        return text + (f", taken up at {self.resumed_at}" if self.resumed_at else "")


@dataclass(frozen=True)
class Settings:
    """How to train: see `llmq.fine_tune`, whose arguments these are."""

    steps: int
    lr: float
    accumulate: int = 1
    validate_every: int = 0  # 0 for a tenth of all steps
    dtype: torch.dtype | None = None
    gradient_checkpointing: bool = False


def train(
    model: nn.Module,
    batches: Iterable[Any],
    settings: Settings,
    teacher: Teacher | None,
    validation: list[Any] | None,
    folder: str | os.PathLike[str] | None,
) -> History:
    """Train the parameters of `model` that require gradients; keep the best, if validated."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    total, history = settings.steps, History()
    best = Best(parameters)
    state = (parameters, optimizer, history, best)
    store = None if folder is None else _store(folder, settings, parameters)
    if store is not None:
        _restore(store, *state)
    started = saved = time.monotonic()
    first = len(history.losses)
    every = settings.validate_every or max(1, total // 10)
    # At the start, or where an interruption came between a step and its validation.
    due = first % every == 0 and (not history.validation or history.validation[-1][0] < first)
    if validation is not None and due:
        best.offer(history, first, _validate(model, validation, settings, teacher))
    given = _cycle(batches, total * settings.accumulate)
    whole = True  # whether parameters and history are of the same step
    try:
        with tqdm(total=total, initial=first, desc="fine-tune", unit="step", delay=1) as progress:
            for step in range(total):
                group = [next(given) for _ in range(settings.accumulate)]
                if step < first:
                    continue
                rate = settings.lr * schedule(step, total)
                for entry in optimizer.param_groups:
                    entry["lr"] = rate
                value = _step(model, group, settings, teacher)
                if not math.isfinite(value):
                    raise ValueError(
                        f"loss is {value} at step {step + 1} of {total}; try a smaller lr than "
                        f"{settings.lr:g}, or check the data; the model is unchanged"
                    )
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                whole = False
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                history.losses.append(value)
                history.learning_rates.append(rate)
                whole = True
                done = step + 1
                if validation is not None and (done % every == 0 or done == total):
                    best.offer(history, done, _validate(model, validation, settings, teacher))
                progress.set_postfix(loss=f"{value:.3f}", lr=f"{rate:.1e}", refresh=False)
                progress.update()
                if store is not None and time.monotonic() - saved > _SAVE_EVERY:
                    _save(store, *state)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        if store is not None and whole and history.losses:
            _save(store, *state)
        raise
    if validation is None:
        history.best_step = total
    else:
        best.take()
    history.seconds = time.monotonic() - started
    if store is not None:
        store.remove(_KEY)
    return history


def _step(model: nn.Module, group: list[Any], settings: Settings, teacher: Teacher | None) -> float:
    """Add the gradients of a group of batches, and return their mean loss."""
    value = 0.0
    for batch in group:
        with _precision(model, settings), _recomputing(model, settings.gradient_checkpointing):
            loss = loss_of(model, batch, teacher) / len(group)
            value += float(loss.detach())
            if not math.isfinite(value):
                return value
            loss.backward()
    return value


@torch.no_grad()
def _validate(
    model: nn.Module, batches: list[Any], settings: Settings, teacher: Teacher | None
) -> float:
    model.eval()
    try:
        with _precision(model, settings):
            losses = [float(loss_of(model, batch, teacher)) for batch in batches]
    finally:
        model.train()
    return sum(losses) / len(losses)


@contextmanager
def _precision(model: nn.Module, settings: Settings) -> Iterator[None]:
    if settings.dtype is None:
        yield
        return
    device = next(model.parameters()).device
    with torch.autocast(device.type, settings.dtype):
        yield


@contextmanager
def _recomputing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let each block forget what its backward needs, and compute it again when it comes to that.

    Chen et al., arXiv:1604.06174: memory for one block and the inputs of all, a third more time.
    """
    with ExitStack() as stack:
        for block in blocks(model).values() if wanted else ():
            forward = block.forward

            def again(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)

            stack.enter_context(running(block, again))
        yield


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


def schedule(step: int, total: int) -> float:
    """Return the share of the peak rate at `step`: a linear rise over 5 %, then a cosine to 0."""
    warmup = max(1, round(_WARMUP * total))
    rise = min(1.0, (step + 1) / warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * step / total))


class Best:
    """The parameters with the least validation loss so far."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.values: list[Tensor] | None = None

    def offer(self, history: History, step: int, loss: float) -> None:
        """Note a validation loss, and keep the parameters if it is the least."""
        if self.values is None or loss < min(value for _, value in history.validation):
            self.values = [p.detach().clone() for p in self.parameters]
            history.best_step = step
        history.validation.append((step, loss))

    @torch.no_grad()
    def take(self) -> None:
        """Give the parameters the values that were kept."""
        for parameter, value in zip(self.parameters, self.values or [], strict=True):
            parameter.copy_(value)


def _store(
    folder: str | os.PathLike[str], settings: Settings, parameters: list[nn.Parameter]
) -> Store:
    """Return the store of this training's state: it starts from these parameters."""
    start = ((str(i), p) for i, p in enumerate(parameters))
    how = (settings.steps, settings.lr, settings.accumulate, str(settings.dtype))
    return Store(folder, fingerprint(start, *how))


def _save(
    store: Store,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: History,
    best: Best,
) -> None:
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}.value"] = parameter
        if best.values is not None:
            tensors[f"{i}.best"] = best.values[i]
        for name, value in optimizer.state[parameter].items():
            tensors[f"{i}.state.{name}"] = value
    past = ("losses", "learning_rates", "validation", "best_step")
    store.put(_KEY, tensors, {name: getattr(history, name) for name in past})


def _restore(
    store: Store,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: History,
    best: Best,
) -> None:
    entry = store.get(_KEY)
    if entry is None:
        return
    tensors, past = entry
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"{i}.value"])
            prefix = f"{i}.state."
            optimizer.state[parameter] = {
                name.removeprefix(prefix): tensor.to(
                    "cpu" if name.endswith(".step") else parameter.device
                )
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
        if "0.best" in tensors:
            best.values = [
                tensors[f"{i}.best"].to(parameter.device) for i, parameter in enumerate(parameters)
            ]
    torch.set_rng_state(tensors["rng"])
    history.losses, history.learning_rates = past["losses"], past["learning_rates"]
    history.validation = [(step, loss) for step, loss in past["validation"]]
    history.best_step = past["best_step"]
    history.resumed_at = len(history.losses)
