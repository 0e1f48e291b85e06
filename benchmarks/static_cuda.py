"""What nvcc makes of the kernels in `csrc/cuda`, without a GPU: instructions, occupancy, bounds.

    python -m benchmarks.static_cuda             # printed, and written to results/static/cuda.json

For each kernel for few tokens, by the way in which it could be held back, the part of the read
bandwidth that it can reach at most; the least of them is what binds it. None is a measurement.

issue       A multiprocessor issues 4 instructions a cycle. Those of one trip through the loop that
            multiplies (one chunk of a warp) are counted in the SASS of nvcc, loops within it as
            often as they run, and every branch as if it were taken.
shared      It serves one wavefront of 128 bytes of shared memory a cycle. The emulator counts them.
matrix      mma m16n8k16 f16 and m16n8k32 int8: one in 2 cycles of an A100, one a cycle of an H100,
            by the rates of their data sheets, which mma.sync does not quite reach on an H100.
in flight   Little's law: bytes that cp.async may have on their way, over bandwidth × latency. Of a
            block by the emulator, times the blocks that registers (ptxas) and shared memory (what
            the launch asks for, and 1 KB that each block takes) let live at once. Latency under
            load is taken as LATENCY_NS, an assumption: some 500 idle, more as queues fill.

Bytes of a weight are those that memory must deliver: codes, and of groups a float32 scale and a
zero point; sparse ones at half density. Inputs come from L2. Instructions and wavefronts are of
a warp, for 32 weights. The 2:4 kernel, for many tokens, has instructions and wavefronts an mma.sp
of 16 × 8 × 64 instead (the latter as csrc/cuda/kernels.h counts them, those of wgmma included), and
bounds as parts of the sparse peak: the same mma a cycle as above, each of twice the inputs. Takes
nvcc, g++, and nvdisasm from Triton's wheel or from PATH.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmq.formats import bitmap, bitmap_tiles

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "results" / "static" / "cuda.json"
SOURCES = ("int8_linear", "weight_only_linear", "bitmap_sparse_linear", "semi_structured_linear")
LATENCY_NS = 700
COUNTED = ("LDGSTS", "LDG", "LDSM", "LDS", "STS", "IMMA", "HMMA", "LOP3", "PRMT", "SHF")
COUNTED += ("SHFL", "HFMA2", "HADD2", "FFMA", "FMUL", "I2FP", "IMAD", "IADD3")


class Gpu(NamedTuple):
    """What data sheets and the CUDA programming guide say of one."""

    name: str
    processors: int
    ghz: float
    gbs: float  # to read
    shared_kb: int  # a multiprocessor
    mma_cycles: float


GPUS = {
    "sm_80": Gpu("A100 80GB", 108, 1.41, 2039, 164, 2),
    "sm_90a": Gpu("H100 SXM", 132, 1.755, 3350, 228, 1),
}
DTYPES = {"Half": torch.float16, "BFloat16": torch.bfloat16}


class Kernel(NamedTuple):
    """Template arguments of a small_gemm."""

    weight: str  # "Rows" or "Bitmap"
    size: int  # bits of Rows, bytes of a value of Bitmap
    inputs: str  # "Half", "BFloat16", "codes" or "coded groups"
    tokens: int
    group: int  # 0: one scale, 1: any group

    @property
    def chunk(self) -> int:
        return 1024 // self.size if self.weight == "Rows" else 128 // self.size

    @property
    def codes(self) -> bool:
        return self.inputs.startswith("code")

    @property
    def label(self) -> str:
        held = f"W{self.size}" if self.weight == "Rows" else f"bitmap of {8 * self.size} bits"
        return f"{held}, {'int8 inputs' if self.codes else 'x ' + self.inputs.lower()}"

    @property
    def group_label(self) -> str:
        return {0: "one", 1: "any"}.get(self.group, str(self.group))

    @property
    def bytes(self) -> float:
        """Of a weight."""
        if self.weight == "Bitmap":
            return 0.5 * self.size + (32 + 4 * self.chunk) / (32 * self.chunk)
        folded = self.group != 0 and (not self.codes or self.size == 4)
        return self.size / 8 + (5 / max(self.group, 32) if folded else 0)


def parse(name: str) -> Kernel:
    """Return the template arguments that stand in a mangled name."""
    found = re.search(
        r"(Rows|Bitmap)ILi(\d)EE\w*?(?:FloatsI\w*?(BFloat16|Half)E?Li|CodesILb([01])E)"
        r"\w*?Li(\d)ELi(\d+)EEEv",
        name,
    )
    assert found, name
    weight, size, dtype, groups, tiles, group = found.groups()
    inputs = dtype or ("coded groups" if groups == "1" else "codes")
    return Kernel(weight, int(size), inputs, 8 * int(tiles), int(group))


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


def loop(code: str) -> list[str]:
    """Return the instructions of the longest loop that multiplies, loops within it unrolled.

    Loops within it that multiply run as often as it takes to read with LDSM the 8 rows of 16 bytes
    that a lane has of a chunk.
    """
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
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
            begin = labels[target[1]]
            if any(i.startswith(("IMMA", "HMMA", "IGMMA")) for i in lines[begin:]):
                loops.append((begin, len(lines)))
    if not loops:
        return []
    begin, end = max(loops, key=lambda span: span[1] - span[0])
    body = lines[begin:end]
    for first, last in loops:
        if begin < first and last < end:
            inner = lines[first:last]
            body += inner * (8 // sum(i.startswith("LDSM") for i in inner) - 1)
    return body


class SparsePlan(NamedTuple):
    """One of the ways in which the 2:4 kernel shares out its work (csrc/cuda/kernels.h)."""

    row_tiles: int
    token_tiles: int
    row_warps: int
    token_warps: int
    stages: int
    wgmma: bool

    @classmethod
    def all(cls) -> list[SparsePlan]:
        text = (ROOT / "csrc" / "cuda" / "kernels.h").read_text()
        found = re.findall(r"\{(\d+), (\d+), (\d+), (\d+), (\d+), (true|false)\},", text)
        return [cls(*map(int, numbers), wgmma == "true") for *numbers, wgmma in found]

    def row(self, gpu: Gpu, registers: int, body: list[str]) -> dict[str, Any]:
        """Return what an entry of the table has of the kernel with this plan."""
        outputs = self.row_warps * self.row_tiles * 16
        tokens = self.token_warps * self.token_tiles * 8
        threads = self.row_warps * self.token_warps * (128 if self.wgmma else 32)
        chunk = outputs * (64 + 16) + tokens * 128  # bytes
        moved = chunk + outputs * (64 + 16) * self.token_warps + tokens * 128 * self.row_warps
        count = Counter(i.split(".")[0] for i in body)
        a_warp = count["IGMMA"] * self.row_tiles * self.token_tiles / 4 + count["IMMA"]
        wavefronts, instructions = moved / 128 / (outputs * tokens / 64), len(body) / a_warp
        cycles = {"issue": instructions / 4, "shared": wavefronts, "matrix": gpu.mma_cycles}
        parts = {key: min(1.0, gpu.mma_cycles / value) for key, value in cycles.items()}
        return {
            "kernel": f"2:4, {'wgmma' if self.wgmma else 'mma'}.sp, {outputs} × {tokens}",
            "gpu": gpu.name,
            "registers": registers,
            "blocks": {
                "by registers": 65536 // (threads * (-(-registers // 8) * 8)),
                "by shared memory": gpu.shared_kb * 1024 // (self.stages * chunk + 1024),
            },
            "warps of a block": threads // 32,
            "shared bytes of a block": self.stages * chunk,
            "instructions an mma": round(instructions, 3),
            "shared wavefronts an mma": round(wavefronts, 3),
            "bounds, of the sparse peak": {key: round(part, 2) for key, part in parts.items()},
        }


@functools.cache
def emulate(kernel: Kernel) -> dict[str, float]:
    """Return shared memory and bytes in flight of a block, wavefronts of a warp for 32 weights."""
    from tests.cuda_emulator import emulator  # builds, with g++, when it is first called

    N, M, g = emulator.BLOCK_OUTPUTS, kernel.tokens, torch.Generator().manual_seed(0)
    counted = []
    for K in (768, 1536):
        groups = 1 if kernel.group == 0 else K // (96 if kernel.group == 1 else kernel.group)
        x = torch.randn(M, K, generator=g).to(DTYPES.get(kernel.inputs, torch.float32))
        memory = {"scale": torch.ones(N, 1)}
        if kernel.codes:
            x = torch.randint(-127, 128, (M, K), generator=g, dtype=torch.int8)
            memory["x_scale"] = torch.ones(M, groups if kernel.inputs == "coded groups" else 1)
        name, arguments = "run_int8", ()
        if kernel.weight == "Rows":
            shape = (N, K * kernel.size // 8)
            memory["weight"] = torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
            if kernel.size == 4 or not kernel.codes:
                memory["scale"] = torch.ones(N, groups)
                name, arguments = "run_weight_only", (kernel.size,)
                if kernel.group:
                    memory["zero_point"] = torch.zeros(N, groups, dtype=torch.int8)
            if kernel.size == 4 and kernel.codes:
                name, arguments = "run_int4_of_codes", ()
        else:
            kept = torch.rand(N, K, generator=g) < 0.5
            dtype = torch.int8 if kernel.size == 1 else x.dtype
            tiles = bitmap_tiles.pack(*bitmap.encode(kept.to(dtype), kept), K)
            memory |= dict(zip(("weight", "bitmask", "offsets"), tiles, strict=True))
            name, arguments = "run_bitmap", (kernel.size, int(kernel.codes))
            if kernel.size == 2:
                del memory["scale"]
        _, found = emulator.small_gemm(
            *(name, x, memory, *arguments), N=N, K=K, dtype=torch.float32
        )
        counted.append(found)
    less, more = counted
    return {
        "shared": more.shared_bytes,
        "flight": more.bytes_in_flight,
        "wavefronts": (more.shared_wavefronts - less.shared_wavefronts) / (N * 768 / 32),
    }


def bounds(gpu: Gpu, kernel: Kernel, registers: int, body: list[str]) -> dict[str, Any]:
    """Return what an entry of the table has of a kernel for few tokens."""
    count = Counter(i.split(".")[0] for i in body)
    weights = kernel.chunk  # a lane's of a trip: 32 rows
    emulated = emulate(kernel)
    by_registers = 65536 // (128 * (-(-registers // 8) * 8))
    by_shared = gpu.shared_kb * 1024 // (int(emulated["shared"]) + 1024)
    blocks = min(by_registers, by_shared)
    cycles = {
        "issue": len(body) / weights / 4,
        "shared": emulated["wavefronts"],
        "matrix": (count["IMMA"] + count["HMMA"]) / weights * gpu.mma_cycles,
    }
    at_most = 32 * kernel.bytes * gpu.processors * gpu.ghz / gpu.gbs  # in a cycle for 32 weights
    parts = {key: at_most / value for key, value in cycles.items()}
    needed = gpu.gbs / gpu.processors * LATENCY_NS  # GB/s · ns = bytes
    parts["in flight"] = blocks * emulated["flight"] / needed
    return {
        "blocks": {"by registers": by_registers, "by shared memory": by_shared},
        "warps": 4 * blocks,
        "shared bytes of a block": int(emulated["shared"]),
        "bytes in flight": int(blocks * emulated["flight"]),
        "bytes that latency takes": round(needed),
        "bytes a weight": round(kernel.bytes, 3),
        "instructions a weight": round(len(body) / weights, 3),
        "shared wavefronts a weight": round(emulated["wavefronts"], 3),
        "a weight": {k: round(count[k] / weights, 3) for k in COUNTED if count[k]},
        "bounds, of bandwidth": {key: round(part, 2) for key, part in parts.items()},
        "binds": min(parts, key=lambda key: parts[key]),
    }


def loops(cubin: Path) -> dict[str, list[str]]:
    """Return the loop of each kernel that multiplies, by its mangled name."""
    command = [find_nvdisasm(), "-c", str(cubin)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = {s.split()[0]: s for s in re.split(r"\n//-+ \.text\.", sass)[1:]}
    return {
        name: loop(code)
        for name, code in sections.items()
        if any(kind in name for kind in ("small_gemm", "sparse_gemm", "sparse_wgmma"))
    }


def disassemble(arch: str, source: str, folder: Path) -> list[tuple[str, int, list[str]]]:
    """Return mangled name, registers and the loop of each kernel of a source that multiplies."""
    cubin = folder / f"{source}.{arch}.cubin"
    flags = ["-std=c++20", "-O3", f"-arch={arch}", "-Xptxas=-v", "-cubin", "-o", str(cubin)]
    text = str(ROOT / "csrc" / "cuda" / f"{source}.cu")
    log = subprocess.run(["nvcc", *flags, text], capture_output=True, text=True, check=True).stderr
    registers = dict(re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", log, re.DOTALL))
    return [(name, int(registers[name]), body) for name, body in loops(cubin).items()]


def measure(arch: str, source: str, folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, registers, body in disassemble(arch, source, folder):
        sparse = re.search(r"sparse_(?:gemm|wgmma)ILi(\d+)E", name)
        if sparse:
            if body:  # on GPUs without it, wgmma's kernel is empty
                rows.append(SparsePlan.all()[int(sparse[1])].row(GPUS[arch], registers, body))
            continue
        row: dict[str, Any] = {"gpu": GPUS[arch].name, "registers": registers}
        kernel = parse(name)
        row = {"kernel": kernel.label, "tokens": kernel.tokens, "group": kernel.group_label} | row
        rows.append(row | bounds(GPUS[arch], kernel, registers, body))
    return rows


COLUMNS = (
    "{:>6} {:>6} {:>5} {:>6} {:>8} {:>6} {:>9} {:>7} {:>6} {:>6} | {:>6} {:>6} {:>6} {:>9} | {}"
)
HEAD = (
    *("tokens", "group", "regs", "KB sh.", "blocks", "warps", "KB flight", "instr.", "waves"),
    *("bytes", "issue", "shared", "matrix", "in flight", "binds"),
)

SPARSE_COLUMNS = "{:<26} {:>5} {:>6} {:>9} {:>6} {:>7} {:>6} | {:>6} {:>6} {:>6}"
SPARSE_HEAD = ("kernel", *HEAD[2:6], *HEAD[7:9], *HEAD[10:13])


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table: kernels apart, the bounds as parts of the bandwidth."""
    few = [row for row in rows if "binds" in row]
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        for kernel in sorted({row["kernel"] for row in few}):
            print(f"\n{gpu}: {kernel}\n" + COLUMNS.format(*HEAD))
            here = [row for row in few if (row["gpu"], row["kernel"]) == (gpu, kernel)]
            for row in sorted(
                here, key=lambda row: (row["tokens"], len(row["group"]), row["group"])
            ):
                blocks, part = row["blocks"].values(), row["bounds, of bandwidth"]
                flight = row["bytes in flight"], row["bytes that latency takes"]
                print(
                    COLUMNS.format(
                        *(row["tokens"], row["group"], row["registers"]),
                        round(row["shared bytes of a block"] / 1024, 1),
                        "min({}, {})".format(*blocks),
                        row["warps"],
                        "{:.0f} of {:.0f}".format(*(n / 1024 for n in flight)),
                        row["instructions a weight"],
                        row["shared wavefronts a weight"],
                        row["bytes a weight"],
                        *(f"{value:.2f}" for value in part.values()),
                        f"{row['binds']} ({min(part.values()):.2f})",
                    )
                )
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        many = [row for row in rows if row["gpu"] == gpu and "binds" not in row]
        if many:
            print(f"\n{gpu}: bounds of the sparse peak\n{SPARSE_COLUMNS.format(*SPARSE_HEAD)}")
        for row in many:
            blocks, part = row["blocks"].values(), row["bounds, of the sparse peak"]
            print(
                SPARSE_COLUMNS.format(
                    *(row["kernel"], row["registers"]),
                    round(row["shared bytes of a block"] / 1024, 1),
                    "min({}, {})".format(*blocks),
                    row["warps of a block"] * min(blocks),
                    row["instructions an mma"],
                    row["shared wavefronts an mma"],
                    *(f"{value:.2f}" for value in part.values()),
                )
            )


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in GPUS:
            for source in SOURCES:
                rows += measure(arch, source, Path(folder))
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
