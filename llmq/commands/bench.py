"""`llmq bench`: the kernels of this machine against torch's float32, side by side in one run."""

from __future__ import annotations

import copy
import functools
import json
import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.models.accelerate import accelerate
from llmq.planner.layer_format import fits
from llmq.planner.timing import caller, rotating, time_interleaved
from llmq.quantization.quantize import quantize
from llmq.runtime import dispatch

# SmolLM2-135M, BERT-base, Llama-7B, and one that divides by nothing: (N, K).
SHAPES = (
    (576, 576),
    (1536, 576),
    (576, 1536),
    (768, 3072),
    (4096, 4096),
    (11008, 4096),
    (1009, 251),
)
TOKENS = (1, 4, 16, 64, 256)
SCHEMES = (
    "w8a8",
    "w8a8-g64",
    "w8a16",
    "w4a16-g32",
    "w4a8-g32",
    "w8a16-quantile",
    "w4a16-quantile-g32",
    "sparse 50 % w8a8",
)


MODEL_SCHEMES = ("w8a8", "w8a8-g64", "w8a16", "w4a16-g32", "w4a8-g32")


def main(args: Namespace) -> None:
    """Run the command."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.what == "linear":
        shapes, tokens = args.shape or SHAPES, args.tokens or TOKENS
        records = linear(tuple(shapes), tuple(tokens), tuple(args.scheme or SCHEMES))
        whole: dict[str, Any] = {"machine": machine(), "records": records}
        print(json.dumps(whole, indent=1) if args.json else linear_table(records))
        return
    from llmq.commands import smollm2

    original, _ = smollm2.load()
    models: dict[str, Any] = {"float32": original}
    for scheme in args.scheme or MODEL_SCHEMES:
        models[scheme] = quantize(copy.deepcopy(original), scheme=scheme)
        fast = accelerate(copy.deepcopy(models[scheme]))
        if fast.llmq_acceleration.fused:
            models[f"{scheme}, accelerated"] = fast
    speeds = model_speeds(models)
    whole = {"machine": machine(), "tokens_per_second": speeds}
    print(json.dumps(whole, indent=1) if args.json else f"SmolLM2-135M\n{speed_table(speeds)}")


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": dispatch.cpu_isa() or "reference",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def linear(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    schemes: tuple[str, ...] = SCHEMES,
) -> list[dict[str, Any]]:
    """Measure single layers; one record a shape, M and scheme, with torch's float32 beside it.

    Time is of a call from Python and includes everything: activation quantization, bias, output.
    """
    records = []
    torch.manual_seed(0)
    for N, K in tqdm(shapes, desc="bench linear", unit="shape", leave=False):
        dense = nn.Linear(K, N)
        layers: dict[str, list[nn.Module]] = {}
        fitting = [s for s in schemes if fits(s, N, K)]
        for scheme in ("float32", *fitting):
            layers[scheme] = rotating(dense, "float" if scheme == "float32" else scheme)
        for M in tokens:
            x = torch.randn(M, K)
            with torch.inference_mode():
                calls = {name: caller(equal, x) for name, equal in layers.items()}
                medians = time_interleaved(calls)
            for scheme, seconds in medians.items():
                first: Any = layers[scheme][0]
                records.append(
                    {
                        "N": N,
                        "K": K,
                        "M": M,
                        "scheme": scheme,
                        "kernel": "torch" if scheme == "float32" else first.kernel(M).name,
                        "microseconds": seconds * 1e6,
                        "gops": 2e-9 * M * N * K / seconds,
                        "times_float32": medians["float32"] / seconds,
                    }
                )
    return records


def linear_table(records: list[dict[str, Any]]) -> str:
    """Return the records as a table: microseconds and, in brackets, times as fast as float32."""
    tokens = sorted({r["M"] for r in records})
    lines = [f"{'N×K':<12}{'':<20}" + "".join(f"{f'M={M}':>18}" for M in tokens)]
    rows: dict[tuple[int, int, str], dict[int, str]] = {}
    for r in records:
        cell = f"{r['microseconds']:.0f} ({r['times_float32']:.2f})"
        rows.setdefault((r["N"], r["K"], r["scheme"]), {})[r["M"]] = cell
    for (N, K, scheme), cells in rows.items():
        lines.append(f"{f'{N}×{K}':<12}{scheme:<20}" + "".join(f"{cells[M]:>18}" for M in tokens))
    lines.append("microseconds a call (times as fast as torch float32), medians, interleaved")
    return "\n".join(lines)


def model_speeds(
    models: dict[str, Any],
    *,
    prompt: int = 512,
    decode: int = 32,
    rounds: int = 3,
    vocab: int = 0,
    others: dict[str, Callable[[], dict[str, float]]] | None = None,
) -> dict[str, dict[str, float]]:
    """Measure causal models: prefill and decode tokens/s at batch 1, interleaved medians.

    Args:
        models: by name; all of one vocabulary.
        prompt: tokens of the prefill.
        decode: tokens decoded one by one after a prompt of 16, with a cache.
        rounds: each measures every model once.
        vocab: token ids are drawn below this; 0 takes it from the first model's configuration.
        others: what measures itself, in turn with the models: tokens/s by `"prefill"`, `"decode"`.
    """
    first = next(iter(models.values()))
    ids = torch.randint(
        vocab or first.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0)
    )
    takers: dict[str, Callable[[], dict[str, float]]] = {
        name: functools.partial(_model_speed, model, ids, decode) for name, model in models.items()
    }
    takers |= others or {}
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in takers}
    with torch.no_grad():
        for round_ in tqdm(
            range(rounds + 1), desc="measure speed", unit="round", delay=1, leave=False
        ):
            for name, take in takers.items():
                speeds = take()
                for what in speeds if round_ else ():  # the first one warms up
                    samples[name].setdefault(what, []).append(speeds[what])
    return {
        name: {what: statistics.median(values) for what, values in of.items()}
        for name, of in samples.items()
    }


@torch.inference_mode()
def _model_speed(model: Any, ids: Tensor, decode: int) -> dict[str, float]:
    started = time.perf_counter()
    model(ids, logits_to_keep=1)
    prefill = time.perf_counter() - started
    output = model(ids[:, :16], use_cache=True, logits_to_keep=1)
    started = time.perf_counter()
    for _ in range(decode):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    seconds = time.perf_counter() - started
    return {"prefill": ids.shape[1] / prefill, "decode": decode / seconds}


def speed_table(speeds: dict[str, dict[str, float]]) -> str:
    """Return what `model_speeds` measured as a table; in brackets, times as fast as the first."""
    base = next(iter(speeds.values()))
    lines = [f"{'':<30}{'prefill tok/s':>20}{'decode tok/s':>20}"]
    for name, speed in speeds.items():
        both = [
            f"{speed[w]:.1f} ({speed[w] / base[w]:.2f})" if w in speed else ""
            for w in ("prefill", "decode")
        ]
        lines.append(f"{name:<30}{both[0]:>20}{both[1]:>20}")
    return "\n".join(lines)
