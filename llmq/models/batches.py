"""Turns each form of data that the verbs take into batches, and matches logits with labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

WINDOW = 512  # tokens a window of running text is cut into
_IGNORED = -100  # transformers' label for positions that do not count


def batches_of(data: Any) -> Iterable[Any]:
    """Return `data` as a list of batches; text and long token sequences in windows of 512."""
    if isinstance(data, tuple) and len(data) == 2 and callable(data[1]):
        texts, tokenizer = data
        joined = texts if isinstance(texts, str) else "\n".join(texts)
        data = torch.tensor(tokenizer(joined)["input_ids"], dtype=torch.int64)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.dim() not in (1, 2):
            raise TypeError(f"token ids must be integers [T] or [B, T], got {data.dtype}")
        if data.dim() == 1:
            windows = data.split(WINDOW)
            data = [window for window in windows if window.numel() > 1]
        else:
            data = list(data)
        if not data:
            raise ValueError("data is empty; give at least two tokens")
        return [window[None] for window in data]
    if isinstance(data, (str, bytes, dict)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be token ids, a pair (text, tokenizer) or batches, got "
            f"{type(data).__name__}"
        )
    return data


def unpack(
    batch: Any, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Return (positional, keyword arguments, labels) of one batch, on the model's device."""
    if isinstance(batch, Tensor):
        ids = batch.reshape(-1, batch.shape[-1]).to(device)
        return (), {"input_ids": ids}, ids
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
        if isinstance(inputs, tuple) and isinstance(labels, dict):  # a call, as calibration has it
            kwargs = {k: _move(v, device) for k, v in labels.items()}
            return tuple(_move(v, device) for v in inputs), kwargs, kwargs.get("labels")
        labels = labels.to(device)
        if isinstance(inputs, dict):
            return (), {k: _move(v, device) for k, v in inputs.items()}, labels
        return (_move(inputs, device),), {}, labels
    if hasattr(batch, "items"):
        kwargs = {k: _move(v, device) for k, v in batch.items()}
        return (), kwargs, kwargs.get("labels")
    raise TypeError(
        f"a batch must be token ids, a dict of the model's arguments or a pair (inputs, targets), "
        f"got {type(batch).__name__}"
    )


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def logits_of(output: Any) -> Tensor | None:
    """Return the logits in a model's output, None where it has none (a bare encoder)."""
    logits = getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) else None


def aligned(model: nn.Module, output: Any, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return logits and labels that belong together: a causal model predicts the next token."""
    logits = logits_of(output)
    if logits is None or labels is None:
        missing = "labels" if logits is not None else "logits"
        raise ValueError(f"cannot measure {type(model).__name__} on this batch: no {missing}")
    if logits.dim() == 3 and is_causal(model):
        return logits[:, :-1], labels[:, 1:]
    return logits, labels


def is_causal(model: nn.Module) -> bool:
    """Whether the logits at a position are of the next token rather than of its own label."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    name = type(model).__name__
    return not any(part in name for part in ("MaskedLM", "TokenClassification"))


def counted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [labels, classes], labels that count, and the row of the batch of each."""
    flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if flat.shape[0] != targets.shape[0]:
        raise ValueError(f"logits {list(logits.shape)} and labels {list(labels.shape)} differ")
    kept = (targets != _IGNORED).nonzero()[:, 0]
    return flat[kept], targets[kept], kept // max(flat.shape[0] // max(logits.shape[0], 1), 1)


def by_row(values: Tensor, rows: Tensor) -> list[float]:
    """Return the sum of `values` over each row of a batch that `rows` names."""
    names, place = rows.unique(return_inverse=True)
    sums = torch.zeros(names.numel(), dtype=torch.float64, device=values.device)
    return sums.index_add_(0, place, values.double()).tolist()
