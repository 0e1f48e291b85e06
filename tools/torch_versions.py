"""Compiles the kernels against other releases of torch, and runs them there.

    make torch-versions                      # the oldest and the newest that llmq supports
    python tools/torch_versions.py 2.12.0    # any other

For each release: its wheel is fetched from PyPI (0.5 to 0.9 GB) and unpacked under build/torch,
csrc is compiled against its headers, and tools/smoke.py runs there with that library and with the
one of the installed torch. All results must be equal to the last bit.

PyPI's wheels are built for CUDA, and the NVIDIA libraries that they load would be some GB more.
Stubs stand in for those: every function returns cudaErrorNoDevice, and the CPU part of torch is
real. CUDA kernels are not compiled or run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "torch"
VERSIONS = ("2.10.0", "2.14.1")
NO_DEVICE = 100  # cudaErrorNoDevice, and CUDA_ERROR_NO_DEVICE
NVIDIA = re.compile("_*(cu|nv|nccl)", re.IGNORECASE)


def fetch(version: str) -> Path:
    """Return the unpacked wheel of `version`, from an earlier run if there is one."""
    target = FOLDER / version
    if not (target / "torch" / "version.py").exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            run("pip", "download", "-q", "--no-deps", f"torch=={version}", "-d", folder)
            wheel = next(Path(folder).glob("torch-*.whl"))
            run("zipfile", "-e", wheel, target)
        stub_nvidia(target / "torch" / "lib")
    return target


def run(module: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def dynamic_symbols(library: Path, flag: str) -> set[str]:
    command = ["nm", "-D", flag, str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in output.splitlines() if " w " not in line}


def stub_nvidia(folder: Path) -> None:
    """Put one library into `folder` under the name of each that is missing there."""
    libraries = sorted(folder.glob("*.so*"))
    needed, undefined, defined = set[str](), set[str](), set[str]()
    for library in libraries:
        output = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
        needed |= set(re.findall(r"NEEDED.*\[(.+)\]", output))
        undefined |= dynamic_symbols(library, "--undefined-only")
        defined |= {name.split("@")[0] for name in dynamic_symbols(library, "--defined-only")}
    missing = {}  # by name: its version, if it has one
    for symbol in sorted(undefined):
        name, _, version = symbol.partition("@")
        if NVIDIA.match(name) and name not in defined:
            missing[name] = version
    lines = [f".globl {name}\n.type {name}, @function\n{name}:" for name in missing]
    source = folder / "stub.s"
    source.write_text("\n".join([".text", *lines, f"mov ${NO_DEVICE}, %eax", "ret", ""]))
    versions = folder / "stub.versions"  # the loader insists on those that torch names
    nodes = [
        f"{node} {{ {' '.join(f'{name};' for name in missing if missing[name] == node)} }};"
        for node in sorted(set(missing.values()) - {""})
    ]
    versions.write_text("\n".join(nodes))
    stub = folder / "libnvidia_stub.so"
    script = f"-Wl,--version-script={versions}"
    subprocess.run(["cc", "-shared", "-nostdlib", script, source, "-o", stub], check=True)
    present = {library.name for library in libraries}
    for name in needed - present:
        if NVIDIA.match(name.removeprefix("lib")):
            (folder / name).symlink_to(stub.name)


def compile_against(version: str, unpacked: Path) -> Path:
    """Return the library that csrc makes with the headers of that torch."""
    environment = {
        **os.environ,
        "LLMQ_TORCH": str(unpacked / "torch"),
        "LLMQ_BUILD": f"torch/build-{version}",
        "LLMQ_CUDA": "0",
    }
    library = FOLDER / f"lib-{version}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(library)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return next(library.glob("llmq/_C*.so"))


def smoke(library: Path, torch: Path | None = None) -> str:
    """Return what tools/smoke.py prints with that library, beside `torch` or the installed one."""
    paths = [str(path) for path in (torch, ROOT) if path]
    environment = {
        **os.environ,
        "LLMQ_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, str(ROOT / "tools" / "smoke.py")]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{library} does not run beside {torch or 'the installed torch'}")
    return result.stdout


def main() -> None:
    """Check every version named on the command line, or the oldest and newest."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    own = next((ROOT / "llmq").glob("_C*.so"))
    expected = smoke(own)
    for version in sys.argv[1:] or VERSIONS:
        unpacked = fetch(version)
        built = compile_against(version, unpacked)
        results = {
            f"compiled against {version}, run by it": smoke(built, unpacked),
            f"compiled against {version}, run by the installed torch": smoke(built),
            f"compiled against the installed torch, run by {version}": smoke(own, unpacked),
        }
        for what, output in results.items():
            if output != expected:
                sys.exit(f"{what}: other results than the installed torch:\n{output}\n{expected}")
            print(f"{what}: {len(output.splitlines())} results equal")


if __name__ == "__main__":
    main()
