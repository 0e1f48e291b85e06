"""What tests share: shapes that hurt, wide weights, comparisons that say where, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import llmq

PACKAGE = Path(llmq.__file__).parent

# N, K of a weight: empty, one, odd, prime, and one below and above 16 outputs, 4, 8 and 64 inputs.
SHAPES = ((0, 0), (0, 5), (5, 0), (1, 1), (1, 4), (3, 7), (2, 8), (15, 9), (17, 63), (16, 65))
# Cases of misuse by name: what is called, what it raises, and words of the message.
Errors = dict[str, tuple[Callable[[], object], type[Exception], str]]
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(0, 40)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wide_weight(N: int, K: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signed weights whose rows span 8 orders of magnitude; every fifth row or so is all zeros."""
    g = generator(seed)
    rows = 10.0 ** (torch.rand(N, 1, generator=g) * 8 - 5)
    weight = torch.randn(N, K, generator=g) * rows
    return (weight * (torch.rand(N, 1, generator=g) > 0.2)).to(dtype)


def random_mask(N: int, K: int, seed: int = 0, kept: float = 0.5) -> Tensor:
    return torch.rand(N, K, generator=generator(seed)) < kept


def assert_equal(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Fail with the first place where two tensors differ; NaN equals NaN, 0.0 equals -0.0."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    assert_within(actual, expected, torch.zeros_like(expected, dtype=torch.float64), what)


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    """Fail with the first place where two tensors differ by more than `tolerance`."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    a, e = actual.double(), expected.double()
    wrong = ~((a == e) | ((a - e).abs() <= tolerance) | (a.isnan() & e.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        allowed = tolerance.expand(wrong.shape)[at].item()
        pytest.fail(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first {list(at)}: "
            f"{actual[at].item()}, expected {expected[at].item()} ± {allowed}"
        )


def assert_raises(call: Callable[[], object], error: type[Exception], message: str) -> None:
    """Fail unless `call` raises `error` with `message` in its words."""
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value), f"{caught.value} does not say {message!r}"


def run_python(
    code: str, folder: Path = PACKAGE.parent, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that imports llmq from `folder`; `check` that it succeeds."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done
