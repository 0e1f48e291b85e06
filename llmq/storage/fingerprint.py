"""Tells runs apart, so that what an interrupted one left is taken up by no other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(weights: Iterable[tuple[str, Tensor]], *others: Any) -> str:
    """Return a hash of weights, by name, shape and sum, and of all else to the last bit.

    Args:
        weights: sums of which tell a model from others in a moment.
        others: tensors, text and numbers, alone or in lists, tuples and mappings; of any other
            object its class counts.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        # Ten digits: the last of sixteen depend on the number of threads that add.
        total = float(weight.detach().sum(dtype=torch.float64))
        digest.update(f"{name} {list(weight.shape)} {total:.9e}\n".encode())
    _add(digest, others)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}\n".encode())
        numbers = value.detach().cpu()
        # numpy has no bfloat16, and float32 holds all of it.
        numbers = numbers.float() if numbers.is_floating_point() else numbers
        digest.update(numbers.contiguous().numpy().tobytes())
    elif isinstance(value, Mapping):
        for entry in value.items():
            _add(digest, entry)
    elif isinstance(value, (tuple, list)):
        digest.update(f"{len(value)}\n".encode())
        for entry in value:
            _add(digest, entry)
    elif value is None or isinstance(value, (str, int, float)):
        digest.update(f"{value!r}\n".encode())
    else:
        digest.update(f"{type(value).__qualname__}\n".encode())
