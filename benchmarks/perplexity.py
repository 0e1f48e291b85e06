"""Perplexity of SmolLM2-135M in every form that `model.py` times, written to `results/`.

    python -m benchmarks.perplexity

The text is the demo's: the first 4,096 tokens of `pydoc_data.topics` in windows of 512, by
`llmq.evaluate`. llama.cpp is given the same token ids in the same windows, and its logits are
judged alike, where `llama-cpp-python` is installed. Memory holds one model at a time. Forms that
the record has already are kept, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import llmq
from benchmarks import compare, llama, model, results
from llmq.commands import bench, demo, smollm2
from llmq.models.batches import WINDOW

LLAMA = tuple(f"llama.cpp {form}" for form in llama.FORMATS)
ORDER = (*model.models(), *LLAMA)  # of rows


def llama_nll(form: str, tokens: Tensor, threads: int) -> float:
    """Return llama.cpp's mean loss on windows of `tokens` [T], in one of `llama.FORMATS`."""
    other = llama.Model(llama.quantized(form), threads, WINDOW)
    total, count = 0.0, 0
    for window in tokens.split(WINDOW):
        logits = torch.from_numpy(other.logits(window.tolist()))
        log_likelihoods = torch.log_softmax(logits[:-1].double(), -1)
        total -= float(log_likelihoods.gather(1, window[1:, None]).sum())
        count += len(window) - 1
    return total / count


def measured(name: str, tokens: Tensor, threads: int) -> dict[str, Any]:
    """Return a form's row: its name, perplexity, loss, and bytes where they can be counted."""
    if name in LLAMA:
        form = name.removeprefix("llama.cpp ")
        nll = llama_nll(form, tokens, threads)
        size = llama.quantized(form).stat().st_size
        return {"name": name, "perplexity": math.exp(nll), "nll": nll, "bytes": size}
    found = llmq.evaluate(model.models()[name](), tokens)
    row = {"name": name, "perplexity": found.perplexity, "nll": found.nll}
    # torch's packed weights are no tensors of the module.
    return row if name == model.DYNAMIC else row | {"bytes": found.bytes}


def main() -> None:
    """Measure what the record lacks, write it after each form, and print it."""
    parser = argparse.ArgumentParser(description="perplexity of SmolLM2-135M in every form")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fresh", action="store_true", help="measure all forms again")
    parser.add_argument("--only", action="append", help="forms to measure, instead of all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record: dict[str, Any] = {
        "machine": bench.machine(),
        "versions": compare.versions(),
        "text": "pydoc_data.topics, first 4096 tokens, windows of 512",
        "rows": [],
    }
    file = results.file("perplexity", record)
    if file.exists() and not args.fresh:
        record["rows"] = json.loads(file.read_text())["rows"]
    forms = list(model.models())
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama.cpp is left out: pip install llama-cpp-python")
    else:
        forms += LLAMA
    tokens = demo.text_tokens(smollm2.load()[1])[0]
    known = {row["name"] for row in record["rows"]}
    for name in tqdm([f for f in args.only or forms if f not in known], desc="perplexity"):
        record["rows"].append(measured(name, tokens, args.threads))
        record["rows"].sort(key=lambda row: ORDER.index(row["name"]))
        results.write("perplexity", record)
    for row in record["rows"]:
        print(f"{row['name']:<36}{row['perplexity']:>10.3f}")
    print(file)


if __name__ == "__main__":
    main()
