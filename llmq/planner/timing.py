"""How long a linear layer in each format takes on this machine.

What `bench` prints and `plan` adds up.
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

from llmq.formats import low_rank
from llmq.nn import LowRankLinear
from llmq.planner.layer_format import LayerFormat, make_layer, parse

_ROTATED = 200e6  # bytes of weights among which large shapes rotate, so that M = 1 reads memory
_CACHED = 4e6  # weights below this many bytes stay in cache, as the layers of a small model do
_SECONDS = 0.2  # of measuring a layer, in all rounds


def time_interleaved(
    calls: dict[str, Callable[[], Any]],
    seconds: float = _SECONDS,
    rounds: int = 7,
    pick: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Return `pick` of all rounds of the seconds of a call of each, measured in turn (A B A …)."""
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
    return {name: pick(values) for name, values in samples.items()}


def copies(size: float) -> int:
    """Return among how many equal layers of `size` bytes calls rotate to read them from memory."""
    return 1 if size < _CACHED else math.ceil(_ROTATED / size)


def rotating(dense: nn.Linear, name: str, count: int | None = None) -> list[nn.Module]:
    """Return `count` equal layers of a format, or of `"float"`; None for `copies` of its bytes."""
    N, K = dense.weight.shape
    wanted = LayerFormat(None) if name == "float" else parse(name)
    if count is None:
        bits = 8 * dense.weight.element_size() if wanted.scheme is None else wanted.scheme.bits
        count = copies(N * K * bits / 8)
    first: nn.Module = dense
    if wanted.low_rank:  # of whatever numbers: decomposing a large weight takes minutes
        rank = low_rank.rank_of(N, K, wanted.low_rank)
        first = LowRankLinear.from_factors(
            dense, dense.weight.detach()[:, :rank], dense.weight.detach()[:rank], wanted.scheme
        )
    elif name != "float":
        first = make_layer(dense, name)
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
        Least seconds by format, and by `"float"` for `nn.Linear` in `dtype`: a choice should
        not depend on what else the machine was doing, which medians of a busy one show. Many short
        rounds: where a busy Xeon gave 21 of 10 ms, leasts of one format differed by half.
    """
    with torch.random.fork_rng(devices=[]):  # whoever asks has drawn no numbers
        dense = nn.Linear(K, N, bias=False, device=device, dtype=dtype)
        x = torch.randn(M, K).to(device, dtype)
    count = max(1, min(layers, int(_ROTATED / max(dense.weight.nbytes, 1))))
    with torch.inference_mode():
        calls = {name: caller(rotating(dense, name, count), x) for name in ("float", *names)}
        return time_interleaved(calls, rounds=81, pick=min)
