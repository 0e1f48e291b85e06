"""SmolLM2-135M end to end: prefill and decode tokens/s of each scheme, written to `results/`.

    taskset -c 1 python -m benchmarks.model --threads 1

Decoding is measured as users write it (eager), and compiled by `torch.compile` with a static cache
for a few schemes, which takes minutes. Where a token's time goes is told by kind of layer: all
linear layers of the model run once more in its order, each on its own weight; what a token takes
beyond them is attention, norms, and Python.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import llmq
from benchmarks import results
from llmq import bench
from llmq.integrations import smollm2
from llmq.nn import CompressedLayer, QuantEmbedding

SCHEMES = ("w8a8", "w8a8-g64", "w8a16", "w4a16-g32", "w4a8-g32", "w4a16-quantile-g32")
SPARSE = "50 % sparse w8a8"
BFLOAT16 = "bfloat16"
WHOLE = "w8a8, lm_head too"
COMPILED = ("float32", BFLOAT16, "w8a8", WHOLE)
_CACHE = 256  # tokens of the static cache


def models() -> dict[str, Any]:
    """Return the float32 original, its bfloat16 copy and its compressed forms, by name."""
    original, _ = smollm2.load()
    made: dict[str, Any] = {"float32": original}
    made[BFLOAT16] = copy.deepcopy(original).to(torch.bfloat16)
    for scheme in SCHEMES:
        made[scheme] = llmq.quantize(copy.deepcopy(original), scheme=scheme)
    made[WHOLE] = llmq.quantize(copy.deepcopy(original), scheme="w8a8", skip=())
    made[SPARSE] = llmq.quantize(llmq.prune(copy.deepcopy(original), 0.5), scheme="w8a8")
    return made


def breakdown(model: Any, *, rounds: int = 9) -> dict[str, float]:
    """Return milliseconds that each kind of linear layer takes of one decoded token.

    Args:
        model: causal; its linear layers are called in the order of the model.
        rounds: of which the median is taken.

    Returns:
        Milliseconds by the last part of the layers' names (`"q_proj"`, `"lm_head"`).
    """
    kinds = (nn.Linear, CompressedLayer)
    found = [
        (name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not isinstance(module, QuantEmbedding)
    ]
    dtype = next(model.parameters()).dtype
    dtype = dtype if dtype.is_floating_point else torch.float32
    inputs = {m.in_features: torch.randn(1, 1, m.in_features, dtype=dtype) for _, m in found}
    samples: dict[str, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for round_ in range(rounds + 1):
            spent: dict[str, float] = defaultdict(float)
            for kind, module in found:
                x = inputs[module.in_features]
                started = time.perf_counter()
                module(x)
                spent[kind] += time.perf_counter() - started
            if round_:
                for kind, seconds in spent.items():
                    samples[kind].append(1e3 * seconds)
    return {kind: statistics.median(values) for kind, values in samples.items()}


def compiled_step(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a compiled function from a token [1, 1] and its position [1] to the next token."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=_CACHE)

    def step(token: Tensor, position: Tensor) -> Tensor:
        output = model(
            token,
            past_key_values=cache,
            use_cache=True,
            cache_position=position,
            position_ids=position[None],
        )
        next_token: Tensor = output.logits[:, -1:].argmax(-1)
        return next_token

    with torch.no_grad():
        model(torch.ones(1, 16, dtype=torch.int64), past_key_values=cache, use_cache=True)
    return torch.compile(step)


def compiled_speeds(made: dict[str, Any], *, decode: int = 32, rounds: int = 5) -> dict[str, float]:
    """Return decoded tokens/s of compiled models, interleaved medians."""
    steps = {}
    for name, model in tqdm(made.items(), desc="compile", unit="model", leave=False):
        torch._dynamo.reset()  # each model's code is its own; limits on recompiling are not
        steps[name] = compiled_step(model)
        _decode(steps[name], 4)
    samples: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(_decode(step, decode))
    return {name: statistics.median(values) for name, values in samples.items()}


def _decode(step: Callable[[Tensor, Tensor], Tensor], count: int) -> float:
    token, position = torch.tensor([[5]]), torch.tensor([16])
    with torch.no_grad():
        started = time.perf_counter()
        for _ in range(count):
            token = step(token, position)
            position = position + 1
        return count / (time.perf_counter() - started)


def table(record: dict[str, Any]) -> str:
    """Return the record as text."""
    speeds = record["tokens_per_second"]
    kinds = list(next(iter(record["milliseconds"].values())))
    lines = [bench.speed_table(speeds)]
    if record["compiled"]:
        lines += ["", f"{'torch.compile, static cache':<30}{'decode tok/s':>14}"]
        lines += [f"{name:<30}{speed:>14.1f}" for name, speed in record["compiled"].items()]
    head = "".join(f"{kind:>10}" for kind in (*kinds, "rest"))
    lines += ["", f"{'ms of a decoded token':<22}{head}"]
    for name, spent in record["milliseconds"].items():
        rest = 1e3 / speeds[name]["decode"] - sum(spent.values())
        cells = "".join(f"{spent.get(kind, 0):>10.2f}" for kind in kinds)
        lines.append(f"{name:<22}{cells}{rest:>10.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the record and print it as a table."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M end to end")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = models()
    record = {
        "machine": bench.machine(),
        "tokens_per_second": bench.model_speeds(made, rounds=args.rounds),
        "milliseconds": {name: breakdown(model) for name, model in made.items()},
        "compiled": {},
    }
    if args.compile:
        record["compiled"] = compiled_speeds({n: made[n] for n in COMPILED}, rounds=args.rounds)
    print(table(record))
    print(results.write(f"model_{args.threads}_threads", record))


if __name__ == "__main__":
    main()
