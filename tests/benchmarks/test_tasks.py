"""The harness of classification and retrieval: figures that are known beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks import tasks
from tests.helpers import generator


def test_classify_learns_what_can_be_learned() -> None:
    g = generator(0)
    centres = torch.randn(3, 16, generator=g) * 3
    labels, wanted = (torch.randint(3, (n,), generator=g) for n in (120, 60))
    train, test = (torch.randn(len(y), 16, generator=g) + centres[y] for y in (labels, wanted))
    assert sum(tasks.classify(train, labels, test, wanted)) == 60
    noise = tasks.classify(torch.randn(120, 16, generator=g), labels, test, wanted)
    assert sum(noise) < 40
    assert set(noise) == {0.0, 1.0}


def test_retrieve_finds_the_nearest() -> None:
    documents = nn.functional.normalize(torch.randn(20, 8, generator=generator(1)), dim=-1)
    assert tasks.retrieve(documents, documents) == [1.0] * 20
    assert sum(tasks.retrieve(documents.roll(1, 0), documents)) == 0


def test_sentences_are_split_into_documents_and_queries() -> None:
    first, last = "The first sentence. " * 8, "And this is the last sentence of the whole text."
    documents, queries = tasks.split_sentences(["short. text", first + last, first + last], 1)
    assert documents == [first.strip()]
    assert queries == [last.rstrip(".")]


class _Tokenizer:
    """A token a letter, padded with zeros."""

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, Any]:
        return {"input_ids": [[ord(c) - 96 for c in text][:max_length] for text in texts]}

    def pad(self, rows: dict[str, Any], return_tensors: str) -> dict[str, torch.Tensor]:
        longest = max(map(len, rows["input_ids"]))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows["input_ids"]])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(27, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        class Output:
            last_hidden_state = self.table(input_ids)

        return Output


def test_embed_keeps_the_order_and_leaves_padding_out() -> None:
    torch.manual_seed(0)
    model, texts = _Encoder(), ["abc" * 9, "b", "cab", "b" * 5] * 20
    found = tasks.embed(model, _Tokenizer(), texts)
    with torch.no_grad():
        for text, row in zip(texts[:4], found, strict=False):
            mean = model.table(torch.tensor([ord(c) - 96 for c in text])).mean(0)
            torch.testing.assert_close(row, nn.functional.normalize(mean, dim=0))
