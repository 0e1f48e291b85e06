"""What Triton's kernels compile to, without a GPU: registers, shared memory, instructions.

    python -m benchmarks.static                  # all, written to results/static/triton.json
    python -m benchmarks.static --quick --check  # one of each kind; fails where one is amiss

Every kernel is launched as in use, by its own launcher, on small CPU tensors, for each tile that
`llmq_kernels.configs` can choose; a stand-in for the driver names the GPU and compiles instead of
running. So the code is the one that a GPU would get. Loads are counted in the loop that multiplies.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from llmq.formats import bitmap, block
from llmq_kernels import (
    bitmap_gemm,
    block_sparse_gemm,
    configs,
    int8_gemm,
    quantize_rows,
    weight_only_gemm,
)

ARCHS = (80, 89, 90, 100)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB a block may use
PER_SM = {80: (164, 64, 32), 89: (100, 48, 24), 90: (228, 64, 32), 100: (228, 64, 32)}
FILE = Path(__file__).parent / "results" / "static" / "triton.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
N, K = 256, 1024


class Case(NamedTuple):
    """A kernel as it is launched: `expect` is the instruction that must do the work."""

    name: str
    config: configs.Config | None
    launch: Callable[[], object]
    expect: str | None


class _Driver:
    """Stands in for a GPU of compute capability `arch`."""

    arch = 0

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


_built: list[Any] = []


def _compile_only(self: Any, grid: Any) -> Callable[..., None]:
    def compile_(*args: Any, **kwargs: Any) -> None:
        _built.append(self.run(*args, grid=grid, warmup=True, **kwargs))

    return compile_


def _instruction(arch: int, config: configs.Config, integer: bool) -> str:
    """Return the SASS that multiplies a tile: rows of 64 and more take the warpgroup's."""
    wide = config.BLOCK_M >= 64 and config.num_warps >= 4
    if wide and arch == 100:
        return "UTCIMMA" if integer else "UTC.?MMA"
    if wide and arch == 90:
        return "IGMMA" if integer else "HGMMA"
    return "IMMA" if integer else "HMMA"


def cases(arch: int, quick: bool) -> Iterator[Case]:
    """Give every kernel in every tile for the GPU.

    `quick`: for each kernel the largest one, and the smallest as one token's splits have it.
    """
    integers = functools.partial(torch.zeros, dtype=torch.int8)

    def tokens(config: configs.Config) -> int:
        return 1 if config.BLOCK_M == 16 else 256  # 1 is compiled into a kernel, unlike others

    weight, packed = integers(N, K), integers(N, K // 2)
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32)

    def tiles(family: str, group: int = 0) -> Iterator[configs.Config]:
        rows = configs.TILES[family][configs.generation(divmod(arch, 10))]
        for at, (_, _, config) in enumerate(rows):
            # Splits change a pointer and what is stored there: once is enough.
            splitting = family in configs.SPLITTING and at == 0
            whole = not quick or at == len(rows) - 1
            for splits in (1,) * whole + (4,) * splitting:
                yield configs.within_group(configs.replace(config, SPLITS=splits), group)

    for size in (1024,) if quick else (64, 4096, 28672):
        for dtype in dtypes[::2] if size == 4096 else dtypes[:1]:
            x = torch.zeros(256, size, dtype=dtype)
            launch = functools.partial(quantize_rows.quantize_activation, x)
            yield Case(f"quantize_activation {size} {_short(dtype)}", None, launch, None)
            launch = functools.partial(launch, 0, torch.zeros(1))
            yield Case(f"quantize_activation given {size} {_short(dtype)}", None, launch, None)
            launch = functools.partial(quantize_rows.rms_norm_quantize, x, x[0], 1e-5, x)
            yield Case(f"rms_norm_quantize {size} {_short(dtype)}", None, launch, None)

    for config in tiles("int8_gemm"):
        M = tokens(config)
        x = integers(M, K)
        scales = (torch.zeros(M, 1), weight, torch.zeros(N, 1), torch.zeros(N))
        launch = functools.partial(int8_gemm.int8_gemm, x, *scales, torch.bfloat16, config=config)
        yield Case("int8 w8a8", config, launch, _instruction(arch, config, True))
    for bits, group in ((8, 64), (4, 32), (4, 128)):
        for config in tiles("grouped_int8_gemm", group):
            G, M = K // group, tokens(config)
            zero = None if bits == 8 else integers(N, G)
            launch = functools.partial(
                int8_gemm.grouped_int8_gemm,
                *(integers(M, K), torch.zeros(M, G), weight if bits == 8 else packed),
                *(torch.zeros(N, 1 if bits == 8 else G), zero, None, torch.bfloat16, bits, config),
            )
            expect = _instruction(arch, config, True)
            yield Case(f"int8 w{bits}a8-g{group}", config, launch, expect)
    for dtype in dtypes:
        both = ((8, 0), (4, 128))
        for bits, group in both if dtype != torch.bfloat16 else (*both, (4, 32)):
            for config in tiles("weight_only_gemm", group):
                G = K // (group or K)
                zero = integers(N, G) if group else None
                codes = weight if bits == 8 else packed
                launch = functools.partial(
                    weight_only_gemm.float_gemm,
                    *(
                        _x(tokens(config), dtype),
                        codes,
                        torch.zeros(N, G),
                        zero,
                        None,
                        None,
                        bits,
                        config,
                    ),
                )
                name = f"weight_only w{bits}a16{f'-g{group}' if group else ''} {_short(dtype)}"
                expect = _instruction(arch, config, False)
                if dtype == torch.float32:  # in smaller tiles, of three TF32 products
                    expect += "|HMMA"
                yield Case(name, config, launch, expect)
    for bits in (8, 4):
        for config in tiles("weight_only_gemm"):
            table = torch.zeros(1, 2**bits)
            codes = weight if bits == 8 else packed
            launch = functools.partial(
                weight_only_gemm.float_gemm,
                *(_x(tokens(config)), codes, torch.zeros(N, 1), None, table, None, bits, config),
            )
            yield Case(f"codebook {bits} bits", config, launch, _instruction(arch, config, False))
    kept = torch.ones(N, K, dtype=torch.bool)
    for group in (None, 0, 128):
        form = {None: "float", 0: "int8", 128: "int8-g128"}[group]
        scale = torch.zeros(N, 1)
        blocks, bits_ = block.encode(weight, (128, 128), kept), bitmap.encode(weight, kept)
        for config in tiles("block_sparse_gemm"):
            x = _x(tokens(config))
            launch = functools.partial(
                block_sparse_gemm.block_sparse_linear, x, *blocks, scale, None, group, config=config
            )
            expect = _instruction(arch, config, group is not None)
            yield Case(f"block_sparse {form}", config, launch, expect)
            if group is None:
                wide = _x(tokens(config), torch.float32)
                launch = functools.partial(
                    block_sparse_gemm.block_sparse_linear, wide, *blocks, scale, config=config
                )
                yield Case("block_sparse float32", config, launch, f"{expect}|HMMA")
        for config in tiles("bitmap_gemm"):
            x = _x(tokens(config))
            launch = functools.partial(
                bitmap_gemm.bitmap_sparse_linear, x, *bits_, scale, None, group, config=config
            )
            expect = _instruction(arch, config, group is not None)
            yield Case(f"bitmap {form}", config, launch, expect)
            pairs = (weight[:, : K // 2].contiguous(), torch.zeros(N, K // 8, dtype=torch.uint8))
            launch = functools.partial(
                bitmap_gemm.semi_structured_linear, x, *pairs, scale, None, group, config=config
            )
            yield Case(f"2:4 {form}", config, launch, expect)


def _x(M: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(M, K, dtype=dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _disassemble(kernel: Any) -> tuple[str, str]:
    """Return a kernel's SASS and its use of resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        commands = (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        outputs = [
            subprocess.run(
                [str(TOOLS / tool), flag, file.name], check=True, capture_output=True, text=True
            ).stdout
            for tool, flag in commands
        ]
    return outputs[0], outputs[1]


def _opcodes(lines: list[str]) -> collections.Counter[str]:
    found = (re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line) for line in lines)
    return collections.Counter(match[1] for match in found if match)


def _main_loop(sass: str, instruction: str) -> list[str]:
    """Return the longest loop that multiplies, or all where none does."""
    lines, labels, longest = sass.splitlines(), {}, []
    for at, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = at
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and jump[1] in labels:
            body = lines[labels[jump[1]] : at + 1]
            if len(body) > len(longest) and any(re.search(instruction, row) for row in body):
                longest = body
    return longest or lines


def measure(case: Case, arch: int) -> list[dict[str, Any]]:
    """Compile a case; one record a kernel that it launches."""
    _built.clear()
    case.launch()
    records = []
    for kernel in _built:
        sass, usage = _disassemble(kernel)
        registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        multiplies = case.expect is not None and kernel.name.endswith("gemm")
        body = _main_loop(sass, case.expect if multiplies else "^$")
        counted, everywhere = _opcodes(body), _opcodes(sass.splitlines())
        warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
        records.append(
            {
                "arch": f"sm_{arch}",
                "case": case.name,
                "kernel": kernel.name,
                "config": None if case.config is None else configs.as_json(case.config),
                "warps": warps,
                "registers": registers,
                "spilled_bytes": stack,
                "local_memory": sum(n for op, n in everywhere.items() if op[:3] in ("LDL", "STL")),
                "shared_bytes": shared,
                "warps_a_multiprocessor": _occupancy(arch, registers, shared, warps),
                "expected": case.expect if multiplies else None,
                "multiplied_by": sorted(
                    {op.split(".")[0] for op in everywhere if "MMA" in op and "BAR" not in op}
                ),
                "loads": {
                    op: n for op, n in sorted(counted.items()) if op.startswith(("LDG", "UTMALDG"))
                },
                "loop": dict(counted.most_common(12)),
            }
        )
    return records


def _occupancy(arch: int, registers: int, shared: int, warps: int) -> int:
    """Warps at once on a multiprocessor: 64 Ki registers, by 256 a warp; 1 KiB shared a block."""
    shared_kib, most_warps, most_blocks = PER_SM[arch]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = shared_kib * 1024 // (shared + 1024)
    return min(by_registers, by_shared, most_warps // warps, most_blocks) * warps


def problems(record: dict[str, Any]) -> list[str]:
    """Say what is amiss with a compiled kernel."""
    wrong = []
    arch = int(record["arch"][3:])
    if record["spilled_bytes"] or record["local_memory"]:
        wrong.append(f"spills {record['spilled_bytes']} bytes")
    if record["shared_bytes"] > SHARED[arch] * 1024:
        wrong.append(f"needs {record['shared_bytes']} bytes of shared memory")
    expected = record["expected"]
    if expected and not any(re.fullmatch(expected, op) for op in record["multiplied_by"]):
        wrong.append(f"multiplies by {record['multiplied_by']}, not {expected}")
    if expected and not any("128" in op or "UTMA" in op for op in record["loads"]):
        wrong.append(f"has no loads of 16 bytes: {record['loads']}")
    return [f"{record['arch']} {record['case']} {record['kernel']}: {what}" for what in wrong]


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as a table."""
    lines = [
        f"{'arch':<8}{'case':<34}{'tile':<18}{'regs':>5}{'spill':>6}{'KiB':>6}{'warps':>6}  by"
    ]
    for r in records:
        c = r["config"]
        tile = "" if c is None else f"{c['BLOCK_M']}x{c['BLOCK_N']}x{c['BLOCK_K']}/{c['SPLITS']}"
        name = r["case"] if r["expected"] or c is None else f"  {r['kernel']}"
        lines.append(
            f"{r['arch']:<8}{name:<34}{tile:<18}{r['registers']:>5}{r['spilled_bytes']:>6}"
            f"{r['shared_bytes'] / 1024:>6.0f}{r['warps_a_multiprocessor']:>6}  "
            f"{' '.join(r['multiplied_by'])}"
        )
    return "\n".join(lines)


def main() -> None:
    """Compile, print the table, and write it or check it."""
    parser = argparse.ArgumentParser(description="what Triton's kernels compile to")
    parser.add_argument("--quick", action="store_true", help="one tile a kernel, bfloat16")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if one is amiss")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    stand_in: Any = _Driver()
    driver.set_active(stand_in)
    JITFunction.__getitem__ = _compile_only
    records = []
    for arch in args.arch or ARCHS:
        stand_in.arch = arch
        for case in cases(arch, args.quick):
            if args.only in case.name:
                records += measure(case, arch)
    print(table(records))
    wrong = [line for record in records for line in problems(record)]
    print("\n".join(wrong) or f"{len(records)} kernels, none amiss")
    if args.check:
        sys.exit(bool(wrong))
    FILE.parent.mkdir(parents=True, exist_ok=True)
    if (args.arch or args.only) and FILE.exists():  # what was not asked for stays as it is
        measured = {(r["arch"], r["case"]) for r in records}
        known = json.loads(FILE.read_text())["records"]
        records += [r for r in known if (r["arch"], r["case"]) not in measured]
        records.sort(key=lambda r: int(r["arch"][3:]))
    whole = {"triton": triton.__version__, "torch": torch.__version__, "records": records}
    FILE.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
