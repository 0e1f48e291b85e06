"""What an encoder's embeddings are good for: telling classes apart, and finding texts again.

Each gives one outcome a test example (1 right, 0 wrong), so that two models are compared example by
example (`llmq/evaluation/intervals.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.evaluation.evaluate import inference, progress

_DECAY = 1e-4  # of the logistic regression, on normalized inputs


def batches(
    tokenizer: Any, texts: list[str], *, size: int = 32, longest: int = 64, sort: bool = True
) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Return (indices, model arguments) of texts, those of like length together if `sort`."""
    rows = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
    order = (
        sorted(range(len(texts)), key=lambda i: len(rows[i])) if sort else list(range(len(rows)))
    )
    made = []
    for start in range(0, len(order), size):
        picked = order[start : start + size]
        padded = tokenizer.pad({"input_ids": [rows[i] for i in picked]}, return_tensors="pt")
        made.append((picked, dict(padded)))
    return made


def embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return the mean of each text's last hidden states, normalized: float32 [texts, K]."""
    rows: dict[int, Tensor] = {}
    with inference(model):
        for picked, batch in progress(batches(tokenizer, texts), "embed"):
            states = model(**batch).last_hidden_state.float()
            kept = batch["attention_mask"][..., None].float()
            means = F.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)
            rows.update(zip(picked, means, strict=True))
    return torch.stack([rows[i] for i in range(len(texts))])


def classify(train: Tensor, labels: Tensor, test: Tensor, wanted: Tensor) -> list[float]:
    """Return which test rows a logistic regression on the training rows gets right.

    Args:
        train, test: embeddings [n, K]; labels, wanted: classes int64 [n].
    """
    torch.manual_seed(0)
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    head = nn.Linear(train.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    x = (train - mean) / deviation
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + _DECAY * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (head((test - mean) / deviation).argmax(-1) == wanted).float().tolist()


def retrieve(queries: Tensor, documents: Tensor) -> list[float]:
    """Return for which query its own document is the nearest by cosine; both [n, K], normalized."""
    nearest = (queries @ documents.T).argmax(-1)
    return (nearest == torch.arange(len(queries))).float().tolist()


def split_sentences(texts: list[str], count: int) -> tuple[list[str], list[str]]:
    """Return `count` texts without their last sentence, and those sentences: documents, queries."""
    documents, queries = [], []
    for text in texts:
        head, stop, last = text.strip().rstrip(".").rpartition(". ")
        if stop and len(head) > 100 and len(last) > 40:
            documents.append(head + ".")
            queries.append(last)
        if len(queries) == count:
            break
    return documents, queries
