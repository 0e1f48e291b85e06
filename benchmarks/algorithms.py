"""What calibrated algorithms keep of SmolLM2-135M (perplexity) and MiniLM (cosine), case by case.

    python -m benchmarks.algorithms                        # the table of what was measured
    python -m benchmarks.algorithms w8a8-smoothquant       # measures a case, seed 0
    python -m benchmarks.algorithms all --seed 1           # every case of calibration, seed 1

Judged on the first 4,096 tokens of `pydoc_data.topics` in windows of 512; calibrated on 16 windows
that the seed draws from what comes 4,096 tokens later. MiniLM is judged on its first 200 sentences
and calibrated on 128 drawn from the rest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmq
from benchmarks import results
from benchmarks.recovery import minilm
from llmq.commands import bench, smollm2
from llmq.pruning import depth
from llmq.scheme import resolve_scheme

WINDOW, JUDGED, APART, WINDOWS = 512, 4096, 4096, 16

Verb = Callable[[Any, Any], Any]


def _quantize(scheme: str, algorithm: str = "rtn") -> Verb:
    def run(model: Any, data: Any) -> Any:
        static = resolve_scheme(scheme).activations == "static"
        given = data if static or algorithm != "rtn" else None
        return llmq.quantize(model, scheme=scheme, algorithm=algorithm, data=given)

    return run


def _prune(pattern: str, method: str, rate: float = 0.5, **options: Any) -> Verb:
    def run(model: Any, data: Any) -> Any:
        given = None if method == "magnitude" else data
        return llmq.prune(model, rate, pattern=pattern, method=method, data=given, **options)

    return run


def _keep(layers: list[int]) -> Verb:
    return lambda model, data: depth.keep(model, {"model.layers": layers})


def _joint(model: Any, data: Any) -> Any:
    llmq.prune(model, 0.5, method="sparsegpt", data=data)
    return llmq.quantize(model, scheme="w8a8", algorithm="gptq", data=data)


CASES: dict[str, Verb] = {
    "float32": lambda model, data: model,
    "w8a8": _quantize("w8a8"),
    "w8a8-smoothquant": _quantize("w8a8", "smoothquant"),
    "w8a8-smoothquant+gptq": _quantize("w8a8", "smoothquant+gptq"),
    "w8a8-static": _quantize("w8a8-static"),
    "w8a8-static-clip": _quantize("w8a8-static", "clip"),
    "w8a8-static-smoothquant": _quantize("w8a8-static", "smoothquant"),
    "w8a8-static-smoothquant+clip": _quantize("w8a8-static", "smoothquant+clip"),
    "w8a8-static-smoothquant+gptq": _quantize("w8a8-static", "smoothquant+gptq"),
    "w4a16-g32": _quantize("w4a16-g32"),
    "w4a16-g32-clip": _quantize("w4a16-g32", "clip"),
    "w4a16-g32-awq": _quantize("w4a16-g32", "awq"),
    "w4a16-g32-gptq": _quantize("w4a16-g32", "gptq"),
    "w4a16-g64": _quantize("w4a16-g64"),
    "w4a16-g64-gptq": _quantize("w4a16-g64", "gptq"),
    "w4a16-quantile-g32": _quantize("w4a16-quantile-g32"),
    "w4a16-quantile-g32-gptq": _quantize("w4a16-quantile-g32", "gptq"),
    "50%-magnitude": _prune("unstructured", "magnitude"),
    "50%-wanda": _prune("unstructured", "wanda"),
    "50%-sparsegpt": _prune("unstructured", "sparsegpt"),
    "2:4-magnitude": _prune("2:4", "magnitude"),
    "2:4-wanda": _prune("2:4", "wanda"),
    "2:4-sparsegpt": _prune("2:4", "sparsegpt"),
    "50%-sparsegpt,w8a8-gptq": _joint,
    "structured-10%-magnitude": _prune("structured", "magnitude", 0.1),
    "structured-10%-wanda": _prune("structured", "wanda", 0.1),
    "structured-10%-sparsegpt": _prune("structured", "sparsegpt", 0.1),
    "50%-wanda-allocated": _prune("unstructured", "wanda", allocation="sensitivity"),
    "50%-sparsegpt-allocated": _prune("unstructured", "sparsegpt", allocation="sensitivity"),
    "70%-wanda": _prune("unstructured", "wanda", 0.7),
    "70%-wanda-allocated": _prune("unstructured", "wanda", 0.7, allocation="sensitivity"),
    "70%-sparsegpt": _prune("unstructured", "sparsegpt", 0.7),
    "70%-sparsegpt-allocated": _prune("unstructured", "sparsegpt", 0.7, allocation="sensitivity"),
    "layers-10%-influence": _prune("layers", "influence", 0.1),
    "layers-10%-even": _keep([i for i in range(30) if i not in (7, 15, 22)]),
    "layers-10%-last": _keep(list(range(27))),
}
MINILM: dict[str, Verb] = {
    f"minilm-{name}": CASES[name]
    for name in (
        *("w8a8", "w8a8-smoothquant", "w8a8-smoothquant+gptq"),
        *("w8a8-static", "w8a8-static-clip", "w8a8-static-smoothquant"),
        *("w8a8-static-smoothquant+gptq", "w4a16-g32", "w4a16-g32-gptq"),
    )
}


def _text() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def _drawn(count: int, of: int, seed: int) -> list[int]:
    order = torch.randperm(of, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


def smollm2_text(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return token ids [T] to judge on and, apart from them, to calibrate with."""
    ids = torch.tensor(tokenizer(_text(), verbose=False)["input_ids"])
    return ids[:JUDGED], ids[JUDGED + APART :]


def calibration(ids: Tensor, seed: int) -> list[Tensor]:
    """Return windows [1, T] drawn from all of `ids`."""
    windows = ids.split(WINDOW)[:-1]
    return [windows[i][None] for i in _drawn(WINDOWS, len(windows), seed)]


def smollm2_case(case: str, seed: int) -> dict[str, Any]:
    """Return perplexity, seconds and memory of one case."""
    model, tokenizer = smollm2.load()
    judged, rest = smollm2_text(tokenizer)
    data = calibration(rest, seed)
    started, before = time.perf_counter(), _memory(fresh=True)
    CASES[case](model, data)
    seconds, peak = time.perf_counter() - started, _memory()
    perplexity = llmq.evaluate(model, judged).perplexity
    return {"perplexity": perplexity, "seconds": seconds, "gib_before": before, "gib_peak": peak}


def minilm_case(case: str, seed: int) -> dict[str, Any]:
    """Return the mean and least cosine of sentences' embeddings with the original's."""
    model, tokenizer = minilm()
    sentences = [s.strip() for s in _text().split(".\n") if 60 < len(s.strip()) < 400]
    judged, rest = sentences[:200], sentences[200:]
    chosen = [rest[i] for i in _drawn(128, len(rest), seed)]
    data = [dict(_tokens(tokenizer, chosen[i : i + 8])) for i in range(0, len(chosen), 8)]
    original = _embed(model, tokenizer, judged)
    started = time.perf_counter()
    MINILM[case](model, data)
    seconds = time.perf_counter() - started
    cosine = torch.cosine_similarity(_embed(model, tokenizer, judged), original)
    return {"cosine": float(cosine.mean()), "least": float(cosine.min()), "seconds": seconds}


def _tokens(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")


@torch.no_grad()
def _embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    parts = []
    for start in range(0, len(texts), 20):
        batch = _tokens(tokenizer, texts[start : start + 20])
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


def _memory(*, fresh: bool = False) -> float:
    """Return the most memory that this process has held, GiB; from now on if `fresh`."""
    if fresh:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def measure(case: str, seed: int) -> None:
    """Measure a case and keep it in the results of this machine."""
    found = (minilm_case if case in MINILM else smollm2_case)(case, seed)
    row = {"case": case, "seed": seed, **{k: round(v, 6) for k, v in found.items()}}
    print(row, flush=True)
    record: dict[str, Any] = {"machine": bench.machine(), "windows": WINDOWS, "rows": []}
    file = results.file("algorithms", record)
    if file.exists():
        record["rows"] = json.loads(file.read_text())["rows"]
    rows = [r for r in record["rows"] if (r["case"], r["seed"]) != (case, seed)] + [row]
    order = {name: i for i, name in enumerate((*CASES, *MINILM))}
    record["rows"] = sorted(rows, key=lambda r: (order[r["case"]], r["seed"]))
    results.write("algorithms", record)


def table(record: dict[str, Any]) -> str:
    """Return a row a case: the mean over seeds, their span, and what that is to float32."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        by_case.setdefault(row["case"], []).append(row)
    base = by_case["float32"][0]["perplexity"] if "float32" in by_case else None
    lines = ["| case | perplexity or cosine | to float32 | seeds |", "| --- | ---: | ---: | ---: |"]
    for case, rows in by_case.items():
        key = "cosine" if "cosine" in rows[0] else "perplexity"
        values = [row[key] for row in rows]
        mean = sum(values) / len(values)
        digits = 5 if key == "cosine" else 3
        text = f"{mean:.{digits}f}"
        if len(values) > 1:
            text += f" ({min(values):.{digits}f} … {max(values):.{digits}f})"
        change = f"{100 * (mean / base - 1):+.1f} %" if base and key == "perplexity" else ""
        lines.append(f"| {case} | {text} | {change} | {len(values)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the cases that are named, or show what was measured."""
    parser = argparse.ArgumentParser(description="measure calibrated algorithms")
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=", ".join((*CASES, *MINILM)).replace("%", "%%")
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cases = [*CASES, *MINILM] if args.cases == ["all"] else args.cases
    for case in cases:
        if case not in CASES and case not in MINILM:
            parser.error(f"unknown case {case!r}; there is {', '.join((*CASES, *MINILM))}")
    for case in cases:
        measure(case, args.seed)
    if not cases:
        file = results.file("algorithms", {"machine": bench.machine()})
        print(table(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
