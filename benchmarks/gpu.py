"""One run on a GPU: tests, ceilings, kernels beside peers, whole models; JSON and tables.

    python -m benchmarks.gpu                # all of it, under ten minutes on an H100
    python -m benchmarks.gpu --only kernels --scheme w8a16
    python -m benchmarks.gpu --dry-run      # the whole flow on CPU tensors, in seconds

A section that fails is told in a line and kept in the record; the others go on, and the exit status
is 1. Times are of the GPU alone: calls are captured in a graph, which rotates among copies of the
weight larger than the L2, and replayed; medians, all rows of a shape in turn. A kernel whose result
is off is left out: no speed of what is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What is not installed here: kernels under their import name, and packages that came along.
LINKS = ROOT / "build" / "imports"
PACKAGES = ROOT / "build" / "gpu_packages"
DRY = "--dry-run" in sys.argv


def _prepare() -> None:
    """Make llmq_kernels importable without an installation, here and in processes of ours."""
    LINKS.mkdir(parents=True, exist_ok=True)
    link = LINKS / "llmq_kernels"
    if not link.exists():
        link.symlink_to(ROOT / "kernels", target_is_directory=True)
    folders = [str(ROOT), str(LINKS), *([str(PACKAGES)] if PACKAGES.exists() else [])]
    sys.path += [folder for folder in folders if folder not in sys.path]
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *([inherited] if inherited else [])])
    if DRY:
        os.environ["TRITON_INTERPRET"] = "1"


_prepare()

import torch  # noqa: E402

from benchmarks import gpu_model, gpu_peers, gpu_timing  # noqa: E402
from llmq.runtime import dispatch  # noqa: E402

# (N, K): Llama-2-7B, Llama-3-8B, Llama-3-70B, BERT-large.
SHAPES = (
    *((4096, 4096), (11008, 4096), (4096, 11008), (6144, 4096), (28672, 4096), (4096, 14336)),
    *((8192, 8192), (57344, 8192), (8192, 28672), (1024, 1024), (4096, 1024), (1024, 4096)),
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# Enough to tell whether the targets are met; `--full` takes all shapes and tokens.
FEW_SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (1024, 1024))
FEW_TOKENS = (1, 8, 16, 64, 512, 2048, 8192)


class Run:
    """What was measured so far, what failed, and how long there is."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cpu" if args.dry_run else "cuda")
        self.deadline = time.monotonic() + args.seconds
        args.output.mkdir(parents=True, exist_ok=True)
        self.record: dict[str, Any] = {"machine": machine(self.device), "errors": []}

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def section(self, name: str, measure: Callable[[Run], Any]) -> None:
        """Measure one part, unless another was asked for; a failure is told and kept."""
        if self.args.only and name not in self.args.only:
            return
        started = time.monotonic()
        print(f"-- {name}", flush=True)
        try:
            self.record[name] = measure(self)
        except Exception as error:
            self.fail(name, error)
        print(f"   {time.monotonic() - started:.0f} s", flush=True)
        self.write()

    def fail(self, what: str, error: BaseException) -> None:
        line = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"!! {line}", flush=True)
        self.record["errors"].append({"line": line, "traceback": traceback.format_exc()})

    def write(self) -> None:
        """Keep what there is, after every section: a run may be cut off."""
        file = self.args.output / f"gpu{'_dry_run' if self.args.dry_run else ''}.json"
        file.write_text(json.dumps(self.record, indent=1) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures are of."""
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    found["cuda_ops"] = [op for op in dispatch.GPU_KERNELS if dispatch.has_cuda(op)]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", 0),
            "cuda": torch.version.cuda,
        }
    return found


# -- sections ------------------------------------------------------------------------------------


def build(run: Run) -> dict[str, Any]:
    """Build the native extension where it is missing and can be; without it Triton runs alone."""
    from llmq.runtime import extension

    if extension.load().loaded or run.args.dry_run or shutil.which("nvcc") is None:
        return {"loaded": str(extension.load().path), "nvcc": shutil.which("nvcc")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    major, minor = torch.cuda.get_device_capability()
    arch = {"LLMQ_CUDA_ARCHS": f"sm_{major}{minor}{'a' if major >= 9 else ''}"} | os.environ
    done = subprocess.run(command, cwd=ROOT, env=arch, capture_output=True, text=True, timeout=300)
    extension.load.cache_clear()
    dispatch.has_cuda.cache_clear()
    dispatch.choose_gpu.cache_clear()
    loaded = extension.load()
    run.record["machine"] = machine(run.device)
    if not loaded.loaded:
        raise RuntimeError(f"no extension: {loaded.error}; {done.stderr[-1000:]}")
    return {"loaded": str(loaded.path)}


def tests(run: Run) -> dict[str, Any]:
    """Run the GPU tests in several processes, as compiling kernels takes most of the time."""
    tests_of_gpus = ("tests/triton", "tests/runtime/test_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests_of_gpus]
    # A plain pytest will do: without plugins its options of ours are unknown.
    command += ["-o", "addopts=--import-mode=importlib"]
    command += ["--collect-only"] if run.args.dry_run else ["--maxfail=20"]
    shards = 1 if run.args.dry_run else max(1, min(12, (os.cpu_count() or 2) - 2))
    running = []
    for shard in range(shards):
        log = run.args.output / f"gpu_tests_{shard}.log"
        environment = {**os.environ, "LLMQ_SHARD": f"{shard}/{shards}"}
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        running.append((process, log))
    until = time.monotonic() + min(240, max(run.left() - 60, 30))
    summaries, failures = [], []
    for process, log in running:
        try:
            status = process.wait(max(until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            status = "killed: no time left"
        lines = log.read_text(errors="replace").strip().splitlines()
        summaries.append(lines[-1] if lines else "")
        if status:
            told = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
            failures.append(f"{log.name} ({status}): {' | '.join(told[:8] or lines[-3:])}")
        else:
            log.unlink()
    print("\n".join(f"   {summary}" for summary in summaries))
    for failure in failures:
        run.fail("tests", RuntimeError(failure))
    return {"summaries": summaries, "failures": failures}


def sanitizer(run: Run) -> dict[str, str]:
    """Run small calls of the CUDA kernels, under compute-sanitizer where there is one."""
    if not run.args.dry_run and not dispatch.has_cuda("int8_linear"):
        return {"left out": "no CUDA kernels are compiled in"}
    program = [sys.executable, "-m", "benchmarks.gpu_sanitize", "--device", run.device.type]
    watcher = None if run.args.dry_run else shutil.which("compute-sanitizer")
    watch = [watcher or "", "--error-exitcode", "9", "--kernel-regex", "kns=llmq", "--tool"]
    tools = ("memcheck", "racecheck") if watcher else ("alone",)
    # Every tensor in memory of its own: what is read beside one is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = {}
    for tool in tools:
        process = subprocess.Popen(
            [*watch, tool, *program] if watcher else program,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            told, _ = process.communicate(timeout=min(75, max(run.left() / 6, 20)))
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)  # the program is a child of the tool
            process.communicate()
            run.fail(f"sanitizer {tool}", error)
            continue
        lines = [line for line in told.splitlines() if line.startswith(("right:", "====="))]
        found[tool] = "\n".join(lines[-40:])
        if process.returncode:
            run.fail(f"sanitizer {tool}", RuntimeError("\n".join(lines[:8]) or told[-1000:]))
        print(f"   {tool}: {' | '.join(lines[-2:])}")
    return found


def ceilings(run: Run) -> dict[str, float]:
    """Measure copy bandwidth in GB/s, read and written, and matrix products in TFLOP/s or TOPS."""
    dry = run.args.dry_run
    side, size = (64, 1 << 12) if dry else (8192, 1 << 29)
    a, b = (torch.randn(side, side, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    ints = torch.randint(-128, 128, (side, side), device=run.device, dtype=torch.int8)
    source = torch.empty(size, device=run.device, dtype=torch.int16)
    target = torch.empty_like(source)
    seconds = gpu_timing.medians(
        {
            "copy": [lambda: target.copy_(source)],
            "bfloat16": [lambda: a @ b.T],
            "int8": [lambda: torch._int_mm(ints, ints.T)],
        },
        run.device,
    )
    found = {
        "copy_gbs": 4e-9 * size / seconds["copy"],
        "bfloat16_tflops": 2e-12 * side**3 / seconds["bfloat16"],
        "int8_tops": 2e-12 * side**3 / seconds["int8"],
    }
    print("   " + "  ".join(f"{name} {value:.1f}" for name, value in found.items()))
    return found


def rows(run: Run) -> list[dict[str, Any]]:
    """Measure what reads and writes activations, in GB/s and as a share of the copy."""
    from llmq_kernels import quantize_rows

    records = []
    copy = run.record.get("ceilings", {}).get("copy_gbs")
    for M, K in ((4, 64),) if run.args.dry_run else ((1, 4096), (2048, 4096), (16384, 8192)):
        x, other = (torch.randn(M, K, device=run.device, dtype=torch.bfloat16) for _ in range(2))
        calls = {
            "quantize": (3, lambda x=x: quantize_rows.quantize_activation(x)),
            "quantize g64": (3, lambda x=x: quantize_rows.quantize_activation(x, 64)),
            "norm + quantize": (
                3,
                lambda x=x: quantize_rows.rms_norm_quantize(x, x[0], 1e-5),
            ),
            "residual + norm + quantize": (
                7,
                lambda x=x, o=other: quantize_rows.rms_norm_quantize(x, x[0], 1e-5, o),
            ),
        }
        medians = gpu_timing.medians({n: [c] for n, (_, c) in calls.items()}, run.device)
        for name, (bytes_, _) in calls.items():
            gbs = 1e-9 * bytes_ * M * K / medians[name]
            share = f", {gbs / copy:.0%} of copy" if copy else ""
            print(f"   {M}×{K} {name:<28}{medians[name] * 1e6:8.1f} µs {gbs:8.0f} GB/s{share}")
            records.append({"M": M, "K": K, "kernel": name, "us": medians[name] * 1e6, "gbs": gbs})
    return records


def kernels(run: Run) -> list[dict[str, Any]]:
    """Measure single layers of every scheme beside peers, all of a shape and M in turn."""
    records: list[dict[str, Any]] = []
    peers = {}
    for name, peer in gpu_peers.PEERS.items():
        if run.args.scheme and name not in ("bfloat16", *run.args.scheme):
            continue
        lacks = gpu_peers.missing(peer, run.device)
        if lacks is None:
            peers[name] = peer
        else:
            print(f"   {name} left out: needs {lacks}")
    for N, K, tokens in _sizes(run):
        torch.manual_seed(0)
        dense = torch.nn.Linear(K, N, bias=False, device=run.device, dtype=torch.bfloat16)
        layers = {}
        for name, peer in peers.items():
            try:
                layers[name] = gpu_peers.copies(peer, dense, run.args.dry_run)
            except Exception as error:  # noqa: PERF203  (the other peers go on)
                run.fail(f"{name} {N}×{K}", error)
        for M in tokens:
            if run.left() < 30:
                run.fail(f"kernels {N}×{K} M={M}", TimeoutError("no time left"))
                return records
            records += _one_size(run, dense, layers, M)
        del layers, dense
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    return records


def _sizes(run: Run) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    if run.args.dry_run:
        yield 256, 256, (1, 17)
        return
    shapes, tokens = (SHAPES, TOKENS) if run.args.full else (FEW_SHAPES, FEW_TOKENS)
    for N, K in shapes:
        yield N, K, tokens


@torch.inference_mode()
def _one_size(
    run: Run, dense: torch.nn.Linear, layers: dict[str, list[Any]], M: int
) -> list[dict[str, Any]]:
    N, K = dense.weight.shape
    x = torch.randn(M, K, device=run.device, dtype=torch.bfloat16)
    calls: dict[str, list[Callable[[], Any]]] = {}
    for name, equal in layers.items():
        peer = gpu_peers.PEERS[name]
        if peer.least_tokens > M:
            continue
        try:
            gpu_peers.check(peer, dense, equal[0], x)
            calls[name] = [lambda layer=layer: layer(x) for layer in equal]
        except Exception as error:
            run.fail(f"{name} {N}×{K} M={M}", error)
    medians = gpu_timing.medians(calls, run.device, run.fail)
    base, int8, records = medians.get("bfloat16"), medians.get("w8a8"), []
    for name, seconds in medians.items():
        layer = layers[name][0]
        kernel = layer.kernel(M, torch.bfloat16).name if hasattr(layer, "kernel") else name
        weight = gpu_peers.PEERS[name].bits / 8 * N * K
        records.append(
            {
                "N": N,
                "K": K,
                "M": M,
                "name": name,
                "kernel": kernel,
                "us": seconds * 1e6,
                "times_bfloat16": base / seconds if base else None,
                "times_w8a8": int8 / seconds if int8 else None,
                "gbs": 1e-9 * (weight + 2 * M * (N + K)) / seconds,
                "tops": 2e-12 * M * N * K / seconds,
            }
        )
    print(f"   {N}×{K} M={M}: " + "  ".join(_cell(r) for r in records), flush=True)
    return records


def _cell(record: dict[str, Any]) -> str:
    times, int8 = record["times_bfloat16"], record["times_w8a8"]
    pruned = gpu_peers.PEERS[record["name"]].loss == math.inf
    than = [f"{times:.2f}×"] if times else []
    than += [f"{int8:.2f}× w8a8"] if int8 and pruned else []
    told = f" ({', '.join(than)})" if than else ""
    return f"{record['name']} {record['us']:.1f}{told}"


def models(run: Run) -> list[dict[str, Any]]:
    """Measure whole models, randomly initialised, decoding and prefill in CUDA graphs."""
    records = []
    for shape in ("tiny",) if run.args.dry_run else ("smollm2-135m", "llama-3-8b"):
        base: dict[str, float] = {}
        for scheme in ("bfloat16", "w8a8", "w8a16", "w4a16-g128"):
            if run.left() < 60:
                run.fail(f"models {shape} {scheme}", TimeoutError("no time left"))
                return records
            try:
                speed = gpu_model.measure(shape, scheme, run.device)
            except Exception as error:
                run.fail(f"models {shape} {scheme}", error)
                continue
            base = base or speed
            cells = (f"{k} {v:.0f} tok/s ({v / base[k]:.2f}×)" for k, v in speed.items())
            print(f"   {shape} {scheme:<12}" + "  ".join(cells), flush=True)
            records.append({"model": shape, "scheme": scheme, **speed})
    return records


SECTIONS = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "ceilings": ceilings,
    "rows": rows,
    "kernels": kernels,
    "models": models,
}


def main() -> None:
    """Run the sections, print what they find, and keep it."""
    parser = argparse.ArgumentParser(description="one run on a GPU: tests, kernels, models")
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--scheme", action="append", help="of kernels, beside bfloat16")
    parser.add_argument("--full", action="store_true", help="all shapes and tokens: longer")
    parser.add_argument("--seconds", type=float, default=570, help="to stop after")
    parser.add_argument("--dry-run", action="store_true", help="the flow on CPU tensors")
    parser.add_argument("--output", type=Path, help="folder of the record")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA GPU here; --dry-run goes through the motions on the CPU")
    name = "dry-run" if args.dry_run else torch.cuda.get_device_name()
    args.output = args.output or (
        ROOT / "build" if args.dry_run else gpu_timing.results_folder(name)
    )
    run = Run(args)
    print(json.dumps(run.record["machine"]))
    for section, measure in SECTIONS.items():
        run.section(section, measure)
    run.write()
    print(f"{len(run.record['errors'])} failed; record in {args.output}")
    sys.exit(bool(run.record["errors"]))


if __name__ == "__main__":
    main()
