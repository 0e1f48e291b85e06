"""Text files as tokens: to measure on, to calibrate with, and to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.models.batches import WINDOW


def tokens(file: Path | None, tokenizer: Any) -> Tensor:
    """Return the token ids of a file's text; without a file, of Python's documentation."""
    if tokenizer is None:
        raise ValueError("the model's directory has no tokenizer; copy its tokenizer.json there")
    if file is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    else:
        text = file.read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def windows(file: Path, tokenizer: Any, count: int) -> list[Tensor]:
    """Return at most `count` windows [1, 512] of a file's text, evenly from all of it."""
    whole = [w for w in tokens(file, tokenizer).split(WINDOW) if len(w) == WINDOW]
    if not whole:
        raise ValueError(
            f"{file} is too short to calibrate with: it needs at least {WINDOW} tokens"
        )
    count = min(count, len(whole))
    return [whole[i * len(whole) // count][None] for i in range(count)]


def training_batches(
    ids: Tensor, steps: int, *, sequences: int = 2, length: int = 256
) -> list[Tensor]:
    """Return a batch [sequences, length] for each step, drawn from all of the token ids."""
    if ids.numel() < length:
        raise ValueError(
            f"{ids.numel()} tokens are too few to train on: at least {length} are needed"
        )
    rows = ids[: ids.numel() // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(0)
    order: list[Tensor] = []
    while sum(o.numel() for o in order) < steps * sequences:
        order.append(torch.randperm(rows.shape[0], generator=generator))
    picked = torch.cat(order)[: steps * sequences]
    return list(rows[picked].view(steps, sequences, length))
