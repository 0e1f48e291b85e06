"""GPTQ of llm-compressor on the model, text and windows of `benchmarks.algorithms`, beside ours.

    pip install --no-deps llmcompressor compressed-tensors loguru nvidia-ml-py
    pip install datasets
    python -m benchmarks.gptq_peer                # w4a16-g32 and -g64, seed 0

In an environment of its own: llm-compressor wants older versions of transformers than the pinned
one. Writes `gptq_peer.json`, whose rows are those of `benchmarks.algorithms`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from typing import Any

import torch

import llmq
from benchmarks import results
from benchmarks.algorithms import calibration, smollm2_text
from llmq.commands import bench, smollm2


def measure(group: int, seed: int, order: str) -> dict[str, Any]:
    """Return the perplexity of 4-bit weights with a scale and zero point for `group` inputs."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    model, tokenizer = smollm2.load()
    judged, rest = smollm2_text(tokenizer)
    windows = [window[0].tolist() for window in calibration(rest, seed)]
    masks = [[1] * len(window) for window in windows]
    weights = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=False,
        strategy="group",
        group_size=group,
        actorder=order,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    started = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": masks}),
        recipe=GPTQModifier(config_groups={"weights": scheme}, ignore=["lm_head"]),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    return {
        "case": f"w4a16-g{group}-gptq",
        "library": "llm-compressor",
        "order": order,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "perplexity": llmq.evaluate(model, judged).perplexity,
    }


def main() -> None:
    """Measure the groups that are asked for, write and print the record."""
    parser = argparse.ArgumentParser(description="GPTQ of llm-compressor on SmolLM2-135M")
    parser.add_argument("--group", type=int, action="append", help="32 and 64 if none is named")
    parser.add_argument("--order", default="static", help="of activations: static, group or weight")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rows = [measure(group, args.seed, args.order) for group in args.group or (32, 64)]
    names = ("llmcompressor", "compressed-tensors", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    record = {"machine": bench.machine(), "versions": versions, "rows": rows}
    print(*rows, results.write("gptq_peer", record), sep="\n")


if __name__ == "__main__":
    main()
