"""What nvcc makes of the kernels in `csrc/cuda`, without a GPU: registers, instructions, bounds.

    python -m benchmarks.static_cuda             # written to results/static/cuda.json

Instructions are those of one trip through the loop that multiplies (one chunk of a warp), the code
that folds sums at the end of a group included once for each place it stands: an upper limit where
groups are long. The bound is the part of the read bandwidth at which a multiprocessor would have to
issue 4 instructions a cycle; it leaves out latency and shared memory. The 2:4 kernel, for
many tokens, has instructions and wavefronts of shared memory for each mma of 16 × 8 × 64 instead: a
multiprocessor does 4 of those and one of these a cycle, and by the data sheets an A100 an mma every
2 cycles, an H100 every cycle. Takes nvcc, and nvdisasm from
Triton's wheel or from PATH.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "results" / "static" / "cuda.json"
SOURCES = ("int8_linear", "weight_only_linear", "bitmap_sparse_linear", "semi_structured_linear")
# arch: GPU, multiprocessors, GHz, GB/s to read (data sheets).
GPUS = {"sm_80": ("A100 80GB", 108, 1.41, 2039), "sm_90a": ("H100 SXM", 132, 1.755, 3350)}
COUNTED = ("LDGSTS", "LDSM", "LDS", "IMMA", "HMMA", "LOP3", "PRMT", "SHFL", "HFMA2")


def find_nvdisasm() -> str:
    """Return the path of nvdisasm, or raise RuntimeError saying where it comes from."""
    spec = find_spec("triton")
    bundled = (
        Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm" if spec and spec.origin else None
    )
    found = str(bundled) if bundled and bundled.exists() else shutil.which("nvdisasm")
    if found is None:
        raise RuntimeError("no nvdisasm: pip install triton, or install the CUDA toolkit's")
    return found


def weights_of(name: str) -> tuple[int, float]:
    """Return the weights of a lane in a trip and the bytes of one, at half density if sparse."""
    if "RowsILi4" in name:
        return 256, 0.5
    if "RowsILi8" in name:
        return 128, 1.0
    size = 1 if "BitmapILi1" in name else 2
    chunk = 128 // size
    return chunk, 0.5 * size + (32 + 4 * chunk) / (32 * chunk)


def loop(code: str) -> list[str]:
    """Return the instructions of the longest loop that multiplies."""
    lines, labels, best = [], {}, []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_\S+):", line)
        if label:
            labels[label[1]] = len(lines)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*)", line)
        if not instruction:
            continue
        lines.append(instruction[1])
        target = re.search(r"`\((\.L_\S+?)\)", instruction[2])
        if instruction[1].startswith("BRA") and target and target[1] in labels:
            body = lines[labels[target[1]] :]
            if len(body) > len(best) and any(i.startswith(("IMMA", "HMMA")) for i in body):
                best = body
    return best


def of_mma(body: list[str]) -> dict[str, object]:
    """Return what a loop takes for an mma; copies and ldmatrix move 16 bytes a lane, loads 8."""
    count = Counter(i.split(".")[0] for i in body)
    mma, wavefronts = count["IMMA"], 4 * (count["LDGSTS"] + count["LDSM"]) + 2 * count["LDS"]
    return {
        "instructions an mma": round(len(body) / mma, 3),
        "shared wavefronts an mma": round(wavefronts / mma, 3),
    }


def measure(arch: str, source: str, folder: Path, nvdisasm: str) -> list[dict[str, object]]:
    cubin = folder / f"{source}.cubin"
    command = [
        "nvcc",
        "-std=c++20",
        "-O3",
        f"-arch={arch}",
        "-Xptxas=-v",
        "-cubin",
        "-o",
        str(cubin),
    ]
    text = str(ROOT / "csrc" / "cuda" / f"{source}.cu")
    log = subprocess.run([*command, text], capture_output=True, text=True, check=True).stderr
    registers = dict(re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", log, re.DOTALL))
    sass = subprocess.run(
        [nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    _, processors, clock, bandwidth = GPUS[arch]
    rows = []
    for section in re.split(r"\n//-+ \.text\.", sass)[1:]:
        name = section.split()[0]
        if "small_gemm" not in name and "sparse_gemm" not in name:
            continue
        body = loop(section)
        kernel = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True)
        row = {
            "kernel": kernel.stdout.removeprefix("void llmq::cuda::")
            .removeprefix("(anonymous namespace)::")
            .split("(")[0],
            "gpu": GPUS[arch][0],
            "registers": int(registers[name]),
            "blocks by registers": 65536 // (128 * (-(-int(registers[name]) // 8) * 8)),
        }
        if "sparse_gemm" in name:
            del row["blocks by registers"]  # of 128 threads
            rows.append(row | of_mma(body))
            continue
        weights, size = weights_of(name)
        counts = {key: sum(i.split(".")[0] == key for i in body) for key in COUNTED}
        issued = len(body) / weights / 32  # a weight
        most = 4 * processors * clock / issued * size  # GB/s
        rows.append(
            row
            | {
                "instructions a weight": round(len(body) / weights, 3),
                "a weight": {k: round(v / weights, 3) for k, v in counts.items() if v},
                "bytes a weight": round(size, 3),
                "bound by issue, of bandwidth": round(most / bandwidth, 2),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    nvdisasm = find_nvdisasm()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in GPUS:
            for source in SOURCES:
                rows += measure(arch, source, Path(folder), nvdisasm)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(*row.values())


if __name__ == "__main__":
    main()
