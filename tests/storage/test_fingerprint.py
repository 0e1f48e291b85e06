"""What tells runs apart: any of the data's bits, and the weights by their sums."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from llmq.storage.fingerprint import fingerprint
from tests.helpers import generator

WEIGHT = torch.randn(64, 32, generator=generator(0))
DATA: dict[str, Any] = {"input_ids": torch.arange(6), "scale": torch.ones(2).bfloat16(), "n": 1}


def of(weight: torch.Tensor = WEIGHT, name: str = "w", **data: Any) -> str:
    return fingerprint([(name, weight)], {**DATA, **data})


@pytest.mark.parametrize(
    "other",
    [
        {"weight": WEIGHT + 1e-4},
        {"weight": WEIGHT.T},
        {"name": "v"},
        {"input_ids": torch.arange(6).flip(0)},
        {"input_ids": torch.arange(6).int()},
        {"input_ids": torch.arange(6).view(2, 3)},
        {"scale": torch.tensor([1, 1.0078125]).bfloat16()},
        {"n": 2},
        {"n": None},
        {"more": ()},
    ],
    ids=str,
)
def test_what_differs_is_told_apart(other: dict[str, Any]) -> None:
    assert of(**other) != of()


def test_what_is_the_same_is_not() -> None:
    assert of(WEIGHT.clone(), scale=torch.ones(2).bfloat16()) == of()
    assert fingerprint([("w", WEIGHT)], UserDict(DATA)) == of()
    # Sums in another order, as with another number of threads, differ in their last bits.
    assert of(WEIGHT.flip(0)) == of()
    assert fingerprint([], object()) == fingerprint([], object())
    assert fingerprint([], [1], [2]) != fingerprint([], [1, 2])
