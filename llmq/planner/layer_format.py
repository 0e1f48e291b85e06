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
from typing import Any, NamedTuple

import torch
from torch import nn

from llmq.formats import low_rank
from llmq.nn import LowRankLinear, QuantLinear, SparseLinear, linear_weight
from llmq.pruning import magnitude
from llmq.quantization.algorithm import ROUNDINGS, SCALINGS
from llmq.scheme import PRESETS, Pattern, Scheme, resolve_scheme

_ROTATED = 200e6  # bytes of weights among which large shapes rotate, so that M = 1 reads memory
_CACHED = 4e6  # weights below this many bytes stay in cache, as the layers of a small model do
_SECONDS = 0.2  # of measuring a layer, in all rounds


class Format(NamedTuple):
    """What a format's name says: `scheme` of the values, None for floating point; what of the
    weight there is: all but a share that is `sparse`, or factors with a share of its numbers; and
    how codes are found, by a `scaling` of the inputs, if any, and a `rounding`.
    """

    scheme: Scheme | None
    sparse: float = 0.0
    low_rank: float = 0.0
    scaling: str | None = None
    rounding: str = "rtn"

    @property
    def algorithm(self) -> str:
        """As `llmq.quantize` takes it."""
        if self.scaling is None:
            return self.rounding
        return self.scaling if self.rounding == "rtn" else f"{self.scaling}+{self.rounding}"

    @property
    def calibrated(self) -> bool:
        """Whether codes are found with data."""
        return self.algorithm != "rtn"


def parse(name: str) -> Format:
    """Read a scheme's name, alone or with an algorithm of `llmq.quantize` (`"w4a16-g32 gptq"`), or
    `"sparse N % SCHEME"` or `"low-rank N % SCHEME"`, or `… float`.

    Raises:
        ValueError: if it is none of these.
    """
    words = name.split()
    if len(words) < 2:
        return Format(_dynamic(name))
    if len(words) == 2:
        scaling, how = _algorithm(words[1])
        return Format(_dynamic(words[0]), scaling=scaling, rounding=how)
    kind, number, *rest = words
    if (
        kind not in ("sparse", "low-rank")
        or len(rest) != 2
        or rest[0] != "%"
        or not number.isdigit()
        or not 0 < int(number) < 100
    ):
        raise ValueError(
            f"unknown format {name!r}; use 'sparse N % SCHEME' or 'low-rank N % SCHEME' with N of "
            f"1 … 99 (and 'float' for no scheme), or one of {', '.join(PRESETS)}"
        )
    scheme = None if rest[1] == "float" else _dynamic(rest[1])
    share = int(number) / 100
    return Format(scheme, low_rank=share) if kind == "low-rank" else Format(scheme, sparse=share)


def _algorithm(name: str) -> tuple[str | None, str]:
    parts = name.split("+")
    scaling = parts.pop(0) if parts[0] in SCALINGS else None
    how = parts.pop(0) if parts else "rtn"
    if parts or how not in ROUNDINGS or (scaling is None and how == "rtn"):
        raise ValueError(
            f"unknown algorithm {name!r} of a format; there is clip, gptq, and "
            f"{' or '.join(SCALINGS)}, alone or before one of those"
        )
    return scaling, how


def _dynamic(name: str) -> Scheme:
    scheme = resolve_scheme(name)
    if scheme.activations == "static":
        raise ValueError(f"{name} needs calibrated input scales, which llmq.quantize measures")
    return scheme


def fits(name: str, N: int, K: int) -> bool:
    """Whether a weight [N, K] can be of format `name`: its groups divide K, its rank is smaller."""
    wanted = parse(name)
    try:
        if wanted.low_rank:
            rank = low_rank.rank_of(N, K, wanted.low_rank)
            if rank >= min(N, K):
                return False
            if wanted.scheme is not None:
                wanted.scheme.check_fits(rank, K)
                wanted.scheme.check_fits(N, rank)
        elif wanted.scheme is not None:
            wanted.scheme.check_fits(N, K)
    except ValueError:
        return False
    return True


def make_layer(
    linear: nn.Module, name: str, moments: torch.Tensor | None = None
) -> QuantLinear | SparseLinear | LowRankLinear:
    """Return a `Linear` or `Conv1D` in format `name`.

    Codes are rounded to nearest, and weights pruned by magnitude; low-rank factors are those that
    lose least for inputs of second `moments` [K, K], up to a factor (None: all inputs alike).
    """
    wanted = parse(name)
    if wanted.calibrated:
        raise ValueError(f"{name} needs the inputs of a layer; llmq.quantize and llmq.plan make it")
    weight = linear_weight(linear)[0]
    if wanted.low_rank:
        rank = low_rank.rank_of(weight.shape[0], weight.shape[1], wanted.low_rank)
        up, down = low_rank.factors(weight, rank, moments)
        return LowRankLinear.from_factors(linear, up, down, wanted.scheme)
    if wanted.sparse:
        kept = magnitude.mask(weight, Pattern("unstructured"), wanted.sparse)
        return SparseLinear.from_linear(linear, scheme=wanted.scheme, mask=kept)
    assert wanted.scheme is not None
    return QuantLinear.from_linear(linear, wanted.scheme)


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
    wanted = Format(None) if name == "float" else parse(name)
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
        not hang on what else the machine was doing, which medians of a busy one show. Many short
        rounds: where a busy Xeon gave 21 of 10 ms, leasts of one format differed by half.
    """
    with torch.random.fork_rng(devices=[]):  # whoever asks has drawn no numbers
        dense = nn.Linear(K, N, bias=False, device=device, dtype=dtype)
        x = torch.randn(M, K).to(device, dtype)
    count = max(1, min(layers, int(_ROTATED / max(dense.weight.nbytes, 1))))
    with torch.inference_mode():
        calls = {name: caller(rotating(dense, name, count), x) for name in ("float", *names)}
        return time_interleaved(calls, rounds=81, pick=min)
