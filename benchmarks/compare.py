"""Our layers beside other libraries': interleaved, one process each, with the machine's ceilings.

    taskset -c 1 python -m benchmarks.compare --threads 1
    python -m benchmarks.compare --show FILE [--plot FOLDER] [--against OLD]

`peers.py` says who takes part; what is not installed is left out with a line that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks import ceilings, results
from benchmarks.peers import PEERS, missing
from llmq.commands import bench

SHAPES = bench.SHAPES
TOKENS = (1, 4, 16, 64, 256, 1024)
_LIBRARIES = ("torch", "torchao", "onnxruntime", "openvino", "llama-cpp-python")
# What holds a library to an instruction set, and who obeys: FBGEMM and ONNX Runtime have no switch.
_AVX2 = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
_HELD = {
    "avx2": _AVX2 | {"LLMQ_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avxvnni": _AVX2 | {"LLMQ_ISA": "avxvnni", "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"},
}
_OBEDIENT = [
    *(name for name in PEERS if name.startswith("llmq")),
    "torch float32",
    "torch dynamic onednn",
]
_NOISE = 0.05  # a smaller change than this is none


class Worker:
    """A peer's process; `module` says which requests it answers."""

    def __init__(self, name: str, threads: int, module: str = "benchmarks.peers") -> None:
        self.name = name
        passive = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | passive,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; one with `error` if the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "its process ended"}

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def workers(
    names: Sequence[str], threads: int, module: str = "benchmarks.peers"
) -> Iterator[list[Worker]]:
    """Start a worker a peer, and stop all of them in the end."""
    started: list[Worker] = []
    try:
        for name in names:
            started += [
                Worker(name, threads, module)
            ]  # those before it are stopped if this one fails
        yield started
    finally:
        for worker in started:
            worker.stop()


def measure(
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    *,
    threads: int,
    seconds: float = 0.03,
    rounds: int = 7,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return (records, complaints): one record a peer, shape and M.

    Args:
        names: of `PEERS`.
        shapes: (N, K).
        tokens: M.
        threads: of each worker.
        seconds: at least, of a sample.
        rounds: samples of each worker, taken in turn (A B A B …); at least 2.

    Returns:
        Records with `seconds` (the median), `low` and `high` (the quartiles), and what failed.
    """
    if rounds < 2:
        raise ValueError(f"quartiles take at least 2 rounds, got {rounds}")
    records: list[dict[str, Any]] = []
    absent = {name: text for name in names if (text := missing(name))}
    complaints = list(absent.values())
    total = len(shapes) * len(tokens)
    with (
        workers([name for name in names if name not in absent], threads) as running,
        tqdm(total=total, desc="compare", unit="case", leave=False) as progress,
    ):
        for N, K in shapes:
            kernels: dict[Worker, str] = {}
            for worker in running:
                answer = worker.ask(prepare=[N, K])
                if "error" in answer:
                    complaints.append(f"{worker.name}, {N}×{K}: {answer['error']}")
                else:
                    kernels[worker] = answer["kernel"]
            for M in tokens:
                samples, errors = _sample(list(kernels), M, seconds, rounds)
                complaints += [f"{w.name}, {N}×{K}, M={M}: {text}" for w, text in errors.items()]
                for worker, times in samples.items():
                    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
                    case = {"peer": worker.name, "kernel": kernels[worker], "N": N, "K": K, "M": M}
                    records.append(case | {"seconds": middle, "low": low, "high": high})
                progress.update()
    return records, complaints


def _sample(
    running: Sequence[Worker], M: int, seconds: float, rounds: int
) -> tuple[dict[Worker, list[float]], dict[Worker, str]]:
    """Return (seconds of a call, errors); a worker that fails once is asked no more."""
    samples: dict[Worker, list[float]] = {worker: [] for worker in running}
    errors: dict[Worker, str] = {}
    for round_ in range(rounds + 1):
        for worker in list(samples):
            answer = worker.ask(sample=M, seconds=seconds)
            if "error" in answer:
                errors[worker] = answer["error"]
                del samples[worker]
            elif round_:  # the first one warms up
                samples[worker].append(answer["seconds"])
    return samples, errors


# -- reading records -----------------------------------------------------------------------------


def limit(record: dict[str, Any], ceiling: dict[str, float]) -> float:
    """Return the seconds that the machine needs at least: weights read, products computed."""
    N, K, M = record["N"], record["K"], record["M"]
    peer = PEERS[record["peer"]]
    size = N * K * peer.bits / 8
    read = "read_memory_gbs" if size >= 4e6 else "read_8m_gbs"
    reads = (size + 4 * M * (N + K)) / (ceiling[read] * 1e9)
    # Whoever quantizes inputs multiplies integers; the rest is held to float32.
    integers = peer.family == "int8" or "a8" in record["peer"] or "onnxruntime" in record["peer"]
    rate = ceiling["int8_gops" if integers else "float32_gops"]
    return max(reads, 2 * M * N * K / (rate * 1e9) if rate else 0.0)


def cases(records: Sequence[dict[str, Any]]) -> dict[tuple[int, int], dict[str, dict[int, Any]]]:
    """Return records by (N, K), peer and M."""
    found: dict[tuple[int, int], dict[str, dict[int, Any]]] = {}
    for r in records:
        found.setdefault((r["N"], r["K"]), {}).setdefault(r["peer"], {})[r["M"]] = r
    return found


def best_peer(rows: dict[str, dict[int, Any]], family: str, M: int) -> dict[str, Any] | None:
    """Return the fastest record of another library in a family at M, or None."""
    others = [
        row[M]
        for name, row in rows.items()
        if not name.startswith("llmq") and PEERS[name].family == family and M in row
    ]
    return min(others, key=lambda r: r["seconds"], default=None)


def table(record: dict[str, Any]) -> str:
    """Return microseconds of every case; for ours, times the best peer's speed and the limit's."""
    records, ceiling = record["records"], record["ceilings"]
    tokens = sorted({r["M"] for r in records})
    lines = ["  ".join(f"{name} {value:.0f}" for name, value in ceiling.items())]
    for (N, K), rows in cases(records).items():
        lines += ["", f"{f'{N}×{K}':<26}" + "".join(f"{f'M={M}':>22}" for M in tokens)]
        for name, row in rows.items():
            cells = []
            for M in tokens:
                if M not in row:
                    cells.append("")
                    continue
                text = f"{1e6 * row[M]['seconds']:.0f}"
                if name.startswith("llmq"):
                    best = best_peer(rows, PEERS[name].family, M)
                    ratio = f"{best['seconds'] / row[M]['seconds']:.2f}×" if best else "-"
                    share = 100 * limit(row[M], ceiling) / row[M]["seconds"]
                    text += f" ({ratio}, {share:.0f} %)"
                cells.append(text)
            lines.append(f"{name:<26}" + "".join(f"{cell:>22}" for cell in cells))
    lines += [
        "",
        "microseconds a call; in brackets: times as fast as the best peer of the same family, and",
        "the share of what this machine's bandwidth and arithmetic allow",
    ]
    return "\n".join(lines)


def moved(new: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each case that changed beyond noise.

    A case counts if its quartiles do not overlap with the old ones and its median moved by more
    than 5 %. Both runs must be of one machine; a peer that moved alike tells that the machine did.
    """
    keys = ("peer", "N", "K", "M")
    before = {tuple(r[k] for k in keys): r for r in old}
    lines = []
    for r in new:
        was = before.get(tuple(r[k] for k in keys))
        if was is None:
            continue
        ratio = r["seconds"] / was["seconds"]
        apart = r["low"] > was["high"] or r["high"] < was["low"]
        if apart and abs(ratio - 1) > _NOISE:
            lines.append(
                f"{r['peer']:<26}{r['N']}×{r['K']} M={r['M']}: {1e6 * was['seconds']:.0f} -> "
                f"{1e6 * r['seconds']:.0f} us ({ratio:.2f}×)"
            )
    return lines


def updated(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `old` with every (N, K, M) that `new` has replaced whole: peers stay side by side."""
    replaced = {(r["N"], r["K"], r["M"]) for r in new}
    kept = [r for r in old if (r["N"], r["K"], r["M"]) not in replaced]
    return sorted([*kept, *new], key=lambda r: (r["N"] * r["K"], r["N"], r["M"]))


def plot(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draw achieved against limit, and our speed against the best peer's, as SVG files."""
    from matplotlib.figure import Figure

    records, ceiling = record["records"], record["ceilings"]
    folder.mkdir(parents=True, exist_ok=True)
    found = cases(records)
    ours = [name for name in PEERS if name.startswith("llmq")]
    roofline = Figure(figsize=(8, 5), layout="constrained")
    axes = roofline.subplots()
    for name in ours:
        points = [r for r in records if r["peer"] == name]
        if points:
            axes.scatter(
                [1e6 * limit(r, ceiling) for r in points],
                [1e6 * r["seconds"] for r in points],
                s=12,
                label=name,
            )
    ends = [1.0, 1e6]
    axes.plot(ends, ends, color="black", linewidth=0.6, label="limit")
    axes.set(xscale="log", yscale="log", xlabel="least time, µs", ylabel="time taken, µs")
    axes.legend(fontsize=7)
    ratios = Figure(figsize=(8, 2 + 1.6 * len(found)), layout="constrained")
    grid = ratios.subplots(len(found), 1, squeeze=False)
    for row_axes, ((N, K), rows) in zip(grid[:, 0], found.items(), strict=True):
        for name in ours:
            pairs = [
                (M, best["seconds"] / r["seconds"])
                for M, r in sorted(rows.get(name, {}).items())
                if (best := best_peer(rows, PEERS[name].family, M))
            ]
            if pairs:
                row_axes.plot(*zip(*pairs, strict=True), marker="o", markersize=3, label=name)
        row_axes.axhline(1, color="black", linewidth=0.6)
        row_axes.set(xscale="log", title=f"{N}×{K}", ylabel="× best peer")
    grid[0, 0].legend(fontsize=6)
    grid[-1, 0].set_xlabel("tokens")
    files = []
    for name, figure in (("roofline", roofline), ("ratio", ratios)):
        files.append(folder / f"{name}.svg")
        figure.savefig(files[-1])
    return files


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are installed."""
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    """Measure and write a record, or show one."""
    parser = argparse.ArgumentParser(description="our linear layers beside other libraries'")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=_HELD, help="only who can be held to it")
    parser.add_argument("--peer", action="append", choices=PEERS, metavar="NAME")
    parser.add_argument("--shape", action="append", metavar="NxK")
    parser.add_argument("--tokens", action="append", type=int, metavar="M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.03, help="of a sample")
    parser.add_argument("--update", type=Path, help="a record of whose cases the others stay")
    parser.add_argument("--show", type=Path, help="a record to show instead of measuring")
    parser.add_argument("--against", type=Path, help="an older record: prints what moved")
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.show:
        record = json.loads(args.show.read_text())
    else:
        shapes = [tuple(map(int, s.split("x"))) for s in args.shape] if args.shape else SHAPES
        if args.isa:
            os.environ.update(_HELD[args.isa])  # of the workers to come
        before = ceilings.measure(args.threads)
        records, complaints = measure(
            args.peer or (_OBEDIENT if args.isa else list(PEERS)),
            shapes,
            args.tokens or TOKENS,
            threads=args.threads,
            seconds=args.seconds,
            rounds=args.rounds,
        )
        after = ceilings.measure(args.threads)
        print(*complaints, sep="\n")
        machine = bench.machine() | {"threads": args.threads}
        if args.isa:
            machine["isa"] = args.isa
        record = {
            "machine": machine,
            "versions": versions(),
            "ceilings": {name: max(before[name], after[name]) for name in before},
            "records": records,
        }
        if args.update:
            record["records"] = updated(json.loads(args.update.read_text())["records"], records)
    print(table(record))
    if not args.show:
        print(results.write(f"peers_{args.threads}_threads", record))
    if args.against:
        old = json.loads(args.against.read_text())["records"]
        print(*(moved(record["records"], old) or ["nothing moved beyond noise"]), sep="\n")
    if args.plot:
        print(*plot(record, args.plot), sep="\n")


if __name__ == "__main__":
    main()
