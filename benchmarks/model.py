"""SmolLM2-135M end to end: prefill and decode tokens/s of each scheme, written to `results/`.

taskset -c 1 python -m benchmarks.model --threads 1
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch

import llmq
from benchmarks import results
from llmq import bench
from llmq.integrations import smollm2

SCHEMES = ("w8a8", "w8a8-g64", "w8a16", "w4a16-g32", "w4a8-g32", "w4a16-quantile-g32")
SPARSE = "50 % sparse w8a8"
BFLOAT16 = "bfloat16"


def models() -> dict[str, Any]:
    """Return the float32 original, its bfloat16 copy and its compressed forms, by name."""
    original, _ = smollm2.load()
    made: dict[str, Any] = {"float32": original}
    made[BFLOAT16] = copy.deepcopy(original).to(torch.bfloat16)
    for scheme in SCHEMES:
        made[scheme] = llmq.quantize(copy.deepcopy(original), scheme=scheme)
    made[SPARSE] = llmq.quantize(llmq.prune(copy.deepcopy(original), 0.5), scheme="w8a8")
    return made


def main() -> None:
    """Measure, write the record and print it as a table."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M end to end")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    speeds = bench.model_speeds(models(), rounds=args.rounds)
    print(bench.speed_table(speeds))
    record = {"machine": bench.machine(), "tokens_per_second": speeds}
    print(results.write(f"model_{args.threads}_threads", record))


if __name__ == "__main__":
    main()
