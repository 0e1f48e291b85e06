"""This machine's ceilings: read bandwidth of memory and caches, peak int8 and float32 rates.

python -m benchmarks.ceilings --threads 1
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "ceilings.cpp"
PROGRAM = Path(__file__).parent.parent / "build" / "ceilings"


def measure(threads: int) -> dict[str, float]:
    """Return GB/s read from 256 KiB, 8 MiB and memory, and int8 and float32 rates in GOPS.

    Args:
        threads: all at once, each on data of its own.

    Raises:
        FileNotFoundError, subprocess.CalledProcessError: without a C++ compiler that works.
    """
    if not PROGRAM.exists() or PROGRAM.stat().st_mtime < SOURCE.stat().st_mtime:
        PROGRAM.parent.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        flags = ["-std=c++20", "-O3", "-march=native", "-pthread"]
        subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(PROGRAM)], check=True)
    done = subprocess.run([str(PROGRAM), str(threads)], check=True, capture_output=True, text=True)
    ceilings: dict[str, float] = json.loads(done.stdout)
    return ceilings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="read bandwidth and peak rates of this machine")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in measure(parser.parse_args().threads).items():
        print(f"{name:<18}{value:>10.1f}")


if __name__ == "__main__":
    main()
