"""How long calls take on a GPU: captured in a graph, replayed, medians, in turn with others."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import results

_MILLISECONDS = 2.0  # of one replay: long beside what starting it takes
_ROUNDS = 7
_MOST_CALLS = 400  # of a graph


def results_folder(gpu: str) -> Path:
    """Return where records of a GPU of that name are kept."""
    return results.FOLDER / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def medians(
    calls: dict[str, list[Callable[[], Any]]],
    device: torch.device,
    fail: Callable[[str, BaseException], None] | None = None,
) -> dict[str, float]:
    """Return the median seconds of one call of each, measured in turn (A B A B …).

    Args:
        calls: by name; the calls of one name are equal, and rotated among.
        device: on the CPU, calls are timed one by one, which tells nothing of GPUs.
        fail: told what cannot be captured; without it that raises.
    """
    replays: dict[str, tuple[Callable[[], float], int]] = {}
    for name, equal in calls.items():
        try:
            replays[name] = _capture(equal) if device.type == "cuda" else (_once(equal), 1)
        except Exception as error:  # noqa: PERF203  (the other calls go on)
            if fail is None:
                raise
            fail(f"{name} in a graph", error)
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(_ROUNDS if device.type == "cuda" else 1):
        for name, (replay, count) in replays.items():
            samples[name].append(replay() / count)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _once(equal: list[Callable[[], Any]]) -> Callable[[], float]:
    def replay() -> float:
        started = time.perf_counter()
        equal[0]()
        return time.perf_counter() - started

    return replay


def _capture(equal: list[Callable[[], Any]]) -> tuple[Callable[[], float], int]:
    """Return what replays a graph of some calls and gives its seconds, and their number."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets libraries allocate what they need
        for call in equal[:3]:
            call()
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        for call in equal[:3]:
            call()
        ended.record()
        ended.synchronize()
    torch.cuda.current_stream().wait_stream(side)
    once = max(started.elapsed_time(ended) / len(equal[:3]), 1e-4)
    # Whole rotations, so that every copy is read as often.
    turns = max(1, min(round(_MILLISECONDS / once), _MOST_CALLS) // len(equal))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in equal:
                call()
    graph.replay()

    def replay() -> float:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        return started.elapsed_time(ended) * 1e-3

    return replay, turns * len(equal)
