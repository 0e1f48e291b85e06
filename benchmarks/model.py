"""SmolLM2-135M end to end: prefill and decode tokens/s of each scheme, written to `results/`.

    taskset -c 1 python -m benchmarks.model --threads 1

Decoding is measured as users write it (eager), after `accelerate`, and with `--compile` also by
`torch.compile` with a static cache for a few schemes, which takes minutes; llama.cpp is measured in
turn with them where `llama-cpp-python` is installed. Where a token's time goes is told by kind of
layer: all linear layers of the model run once more in its order, each on its own weight; what a
token takes beyond them is attention, norms, and Python.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import llmq
from benchmarks import ceilings, compare, llama, results
from llmq.commands import bench, smollm2
from llmq.models.accelerate import accelerate
from llmq.nn import CompressedLayer, QuantEmbedding

SCHEMES = ("w8a8", "w8a8-g64", "w8a16", "w4a16-g32", "w4a8-g32", "w4a16-quantile-g32")
SPARSE = "50 % sparse w8a8"
BFLOAT16 = "bfloat16"
DYNAMIC = "torch dynamic int8"  # one activation scale a tensor, and lm_head too
WHOLE = "w8a8, lm_head too"
WHOLE_G64 = "w8a8-g64, lm_head too"
WHOLE_4 = "w4a8-g32, lm_head too"  # which is int8
COMPILED = ("float32", WHOLE, WHOLE_4)
ACCELERATED = (WHOLE, WHOLE_G64, WHOLE_4, "w8a8-g64")
_PROMPT, _DECODE = 16, 32  # tokens, as `bench.model_speeds` decodes


def models() -> dict[str, Callable[[], Any]]:
    """Return what makes the float32 original and its other forms, by name."""

    def made(scheme: str, **options: Any) -> Any:
        return llmq.quantize(smollm2.load()[0], scheme=scheme, **options)

    def sparse() -> Any:
        return llmq.quantize(llmq.prune(smollm2.load()[0], 0.5), scheme="w8a8")

    makers: dict[str, Callable[[], Any]] = {
        "float32": lambda: smollm2.load()[0],
        BFLOAT16: lambda: smollm2.load()[0].to(torch.bfloat16),
        DYNAMIC: lambda: torch.ao.quantization.quantize_dynamic(smollm2.load()[0], {nn.Linear}),
    }
    makers |= {scheme: functools.partial(made, scheme) for scheme in SCHEMES}
    for name in (WHOLE, WHOLE_G64, WHOLE_4):
        makers[name] = functools.partial(made, name.split(",")[0], skip=())
    makers[SPARSE] = sparse
    for name in ACCELERATED:
        makers[f"{name}, accelerated"] = lambda make=makers[name]: accelerate(make())
    return makers


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


class CompiledDecoder:
    """A model whose decoding step is compiled whole, with a static cache of the length in use.

    Inductor's C++ wrapper is not used: it takes a tenth off a step and minutes to compile.
    """

    def __init__(self, model: Any, decode: int) -> None:
        from transformers import StaticCache

        self._model = model
        self._decode = decode
        self._cache = StaticCache(config=model.config, max_cache_len=_PROMPT + decode)
        self._compiled = torch.compile(self._step, fullgraph=True)
        self._run()

    def _step(self, token: Tensor, position: Tensor) -> Tensor:
        output = self._model(
            token, position_ids=position, past_key_values=self._cache, use_cache=True
        )
        next_token: Tensor = output.logits[:, -1:].argmax(-1)
        return next_token

    @torch.no_grad()
    def _run(self) -> float:
        """Return the seconds that decoding takes after a prompt of 16."""
        self._cache.reset()
        ids = torch.arange(1, _PROMPT + 1)[None]
        self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        token, position = ids[:, -1:], torch.tensor([[_PROMPT]])
        started = time.perf_counter()
        for _ in range(self._decode):
            token = self._compiled(token, position)
            position = position + 1
        return time.perf_counter() - started

    def speed(self) -> dict[str, float]:
        """Return decoded tokens/s, for `bench.model_speeds`."""
        return {"decode": self._decode / self._run()}


def llama_cpp(threads: int, stack: contextlib.ExitStack) -> dict[str, Callable[[], Any]]:
    """Return what measures llama.cpp, by name; nothing where it is not installed.

    Its processes end with `stack`.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is left out: pip install llama-cpp-python")
        return {}
    running = stack.enter_context(compare.workers(llama.FORMATS, threads, "benchmarks.llama"))
    return {
        f"llama.cpp {worker.name}": functools.partial(worker.ask, prompt=512, decode=_DECODE)
        for worker in running
    }


def table(record: dict[str, Any]) -> str:
    """Return the record as text."""
    speeds = record["tokens_per_second"]
    kinds = list(next(iter(record["milliseconds"].values())))
    lines = [bench.speed_table(speeds)]
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
    parser.add_argument(
        "--only", action="append", help="models to measure (all); may be given several times"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    makers = models()
    chosen = [name for name in makers if not args.only or name in args.only]
    made = {name: makers[name]() for name in tqdm(chosen, desc="make models", leave=False)}
    with contextlib.ExitStack() as stack:
        others = llama_cpp(args.threads, stack)
        compiled = [name for name in COMPILED if args.compile and name in made]
        for name in tqdm(compiled, desc="compile", leave=False):
            others[f"{name}, compiled"] = CompiledDecoder(made[name], _DECODE).speed
        speeds = bench.model_speeds(made, decode=_DECODE, rounds=args.rounds, others=others)
    record = {
        "machine": bench.machine(),
        "versions": compare.versions(),
        "tokens_per_second": speeds,
        "milliseconds": {name: breakdown(made[name]) for name in chosen if name != DYNAMIC},
        "ceilings": ceilings.measure(args.threads),
    }
    print(table(record))
    print(results.write(f"model_{args.threads}_threads", record))


if __name__ == "__main__":
    main()
