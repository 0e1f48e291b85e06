"""A linear layer in any of the library's formats, by name, and what it costs on this machine.

What `bench` measures and `plan` chooses among.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmq.algorithms import magnitude
from llmq.nn import QuantLinear, SparseLinear, linear_weight
from llmq.scheme import PRESETS, Pattern, Scheme, resolve_scheme

_ROTATED = 200e6  # bytes of weights among which large shapes rotate, so that M = 1 reads memory
_CACHED = 4e6  # weights below this many bytes stay in cache, as the layers of a small model do
_SECONDS = 0.2  # of measuring a layer, in all rounds


def parse(name: str) -> tuple[float, Scheme]:
    """Return (share of weights dropped, scheme) of a scheme's name or of `"sparse N % <scheme>"`.

    Raises:
        ValueError: if it is neither.
    """
    if not name.startswith("sparse "):
        return 0.0, resolve_scheme(name)
    words = name.split()
    if len(words) != 4 or words[2] != "%" or not words[1].isdigit() or not 0 < int(words[1]) < 100:
        raise ValueError(
            f"unknown format {name!r}; use 'sparse N % SCHEME' with N of 1 … 99, or one of "
            f"{', '.join(PRESETS)}"
        )
    return int(words[1]) / 100, resolve_scheme(words[3])


def fits(name: str, N: int, K: int) -> bool:
    """Whether a weight [N, K] can be of format `name`: its groups divide K."""
    try:
        parse(name)[1].check_fits(N, K)
    except ValueError:
        return False
    return True


def make_layer(linear: nn.Module, name: str) -> nn.Module:
    """Return a `Linear` or `Conv1D` in format `name`, rounded to nearest, pruned by magnitude."""
    rate, scheme = parse(name)
    if not rate:
        return QuantLinear.from_linear(linear, scheme)
    kept = magnitude.mask(linear_weight(linear)[0], Pattern("unstructured"), rate)
    return SparseLinear.from_linear(linear, scheme=scheme, mask=kept)


def time_interleaved(
    calls: dict[str, Callable[[], Any]], seconds: float = _SECONDS, rounds: int = 7
) -> dict[str, float]:
    """Return the median seconds of one call of each, measured in turn (A B A B …)."""
    repeats = {}
    for name, call in calls.items():
        call()
        started = time.perf_counter()
        call()
        once = max(time.perf_counter() - started, 1e-7)
        repeats[name] = max(1, int(seconds / rounds / once))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - started) / repeats[name])
    return {name: statistics.median(values) for name, values in samples.items()}


def copies(size: float) -> int:
    """Return among how many equal layers of `size` bytes calls rotate to read them from memory."""
    return 1 if size < _CACHED else math.ceil(_ROTATED / size)


def rotating(dense: nn.Linear, name: str, count: int | None = None) -> list[nn.Module]:
    """Return `count` equal layers of a format, or of `"float"`; None for `copies` of its bytes."""
    N, K = dense.weight.shape
    if count is None:
        bits = 8 * dense.weight.element_size() if name == "float" else parse(name)[1].bits
        count = copies(N * K * bits / 8)
    first = dense if name == "float" else make_layer(dense, name)
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def caller(layers: list[nn.Module], x: torch.Tensor) -> Callable[[], Any]:
    """Return what calls the layers in turn with x."""
    turn = iter(range(1 << 62))
    if x.device.type != "cuda":
        return lambda: layers[next(turn) % len(layers)](x)

    def call() -> None:
        layers[next(turn) % len(layers)](x)
        torch.cuda.synchronize(x.device)

    return call


@functools.lru_cache(maxsize=256)
def seconds_a_call(
    N: int,
    K: int,
    names: tuple[str, ...],
    M: int,
    dtype: torch.dtype,
    device: torch.device,
    layers: int,
) -> dict[str, float]:
    """Measure layers [N, K] in each format for M tokens of `dtype`, interleaved, from Python.

    Calls rotate among `layers` equal ones, as many as a model has, or 200 MB of them: what one
    token's pass leaves in cache is what the next finds. A single layer measured again and again
    would read its weight from the nearest cache, where no model's weights are (SmolLM2-135M's
    w4a8-g32 took 1.4 times as long as its w8a8 so, and 0.86 times in a model; one Xeon core).

    Returns:
        Median seconds by format, and by `"float"` for `nn.Linear` in `dtype`.
    """
    with torch.random.fork_rng(devices=[]):  # whoever asks has drawn no numbers
        dense = nn.Linear(K, N, bias=False, device=device, dtype=dtype)
        x = torch.randn(M, K).to(device, dtype)
    count = max(1, min(layers, int(_ROTATED / max(dense.weight.nbytes, 1))))
    with torch.inference_mode():
        calls = {name: caller(rotating(dense, name, count), x) for name in ("float", *names)}
        return time_interleaved(calls)
