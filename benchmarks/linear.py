"""Single layers of every scheme against torch's float32, interleaved, written to `results/`.

taskset -c 1 python -m benchmarks.linear --threads 1
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import results
from llmq.commands import bench


def main() -> None:
    """Measure all shapes of `llmq.bench`, write the records and print them as a table."""
    parser = argparse.ArgumentParser(description="single layers against torch's float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    records = bench.linear()
    print(bench.linear_table(records))
    record = {"machine": bench.machine(), "records": records}
    print(results.write(f"linear_{threads}_threads", record))


if __name__ == "__main__":
    main()
