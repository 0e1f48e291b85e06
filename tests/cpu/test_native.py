"""Microkernels without torch: each instruction set against the portable one, also under emulation.

`tests/native/compare_isas.cpp` does the comparing. On this machine it runs with the address and
undefined-behaviour sanitizers; Arm's kernels are cross-compiled and run under QEMU.
"""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cpu.isas import available

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = ROOT / "csrc" / "cpu"
FLAGS = ["-std=c++20", "-ffp-contract=off", "-g", "-Wall", "-Wextra", "-Werror"]
# GCC 12 warns of its own intrinsics.
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
SANITIZE = ["-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
SANITIZE += ["-fsanitize=address,undefined"]
ARM = ("_neondot", "_i8mm")
X86 = ("_avx2", "_avxvnni", "_avx512vnni")


def isa_flags() -> dict[str, str]:
    """ISA_FLAGS of setup.py, which cannot be imported without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ISA_FLAGS":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no ISA_FLAGS")


def build(compiler: str, flags: list[str], suffixes: tuple[str, ...], folder: Path) -> Path:
    """Build compare_isas with the kernels of `suffixes`; compiles only what changed."""
    folder.mkdir(parents=True, exist_ok=True)
    of_isa = isa_flags()
    sources = [CPU / "isa.cpp", CPU / "dispatch.cpp", ROOT / "tests/native/compare_isas.cpp"]
    for suffix in ("_portable", *suffixes):
        sources += sorted(CPU.glob(f"*{suffix}.cpp"))
    shared = [*CPU.glob("*.h"), ROOT / "setup.py", Path(__file__)]
    newest = max(path.stat().st_mtime for path in shared)

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        needed = max(newest, source.stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < needed:
            own = next((f for s, f in of_isa.items() if source.stem.endswith(s)), "").split()
            partial = target.with_suffix(".partial")
            run([compiler, *FLAGS, *flags, *own, "-c", str(source), "-o", str(partial)])
            os.replace(partial, target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "compare_isas"
    if not program.exists() or program.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        run([compiler, *flags, *map(str, objects), "-o", str(program)])
    return program


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr[-4000:]}"
    return result.stdout


def test_every_isa_of_this_cpu_equals_portable_and_stays_in_bounds() -> None:
    machine = platform.machine().lower()
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build microkernels with")
    suffixes = X86 if machine in ("x86_64", "amd64") else ARM if machine == "aarch64" else ()
    program = build(compiler, SANITIZE, suffixes, ROOT / "build" / "compare_isas")
    ran = run([str(program), "300"]).split()
    assert set(available()) <= set(ran)


@pytest.mark.parametrize(
    ("cpu", "isas"),
    [
        ("max", ["portable", "neondot", "i8mm"]),
        ("neoverse-n1", ["portable", "neondot"]),
        ("cortex-a72", ["portable"]),
    ],
)
def test_arm_kernels_equal_portable_under_emulation(cpu: str, isas: list[str]) -> None:
    tools = {name: shutil.which(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64")}
    missing = [name for name, path in tools.items() if path is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    flags = ["-O3", "-static"]  # static: needs no Arm libraries beside the emulator
    program = build("aarch64-linux-gnu-g++", flags, ARM, ROOT / "build" / "compare_isas_arm")
    assert run(["qemu-aarch64", "-cpu", cpu, str(program), "300"]).split() == isas
