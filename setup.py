"""Builds `llmq/_C.abi3.so`, the CPU kernels; the rest of the package is in pyproject.toml.

The library uses LibTorch's stable ABI and no Python API, so one build serves torch 2.10 and later
and every Python 3. Each source is compiled for the instruction set that its file name ends with.
Without a working C++ compiler the package installs as pure Python and says what that costs.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Fixed, so that a second build compiles only what changed; `make sanitize` names another.
BUILD = ROOT / "build" / os.environ.get("LLMQ_BUILD", "native")

ISA_FLAGS = {
    "_avx2": "-mavx2 -mfma -mf16c",
    "_avxvnni": "-mavxvnni -mavx2 -mfma -mf16c",
    "_avx512vnni": (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512vbmi -mavx512vbmi2 "
        "-mavx2 -mfma -mf16c"
    ),
    "_neondot": "-march=armv8.2-a+dotprod",
    "_i8mm": "-march=armv8.2-a+dotprod+i8mm",
}
ISAS = {  # of each machine; its portable kernels are there besides
    "x86_64": ("_avx2", "_avxvnni", "_avx512vnni"),
    "amd64": ("_avx2", "_avxvnni", "_avx512vnni"),
    "aarch64": ("_neondot", "_i8mm"),
    "arm64": ("_neondot", "_i8mm"),
}
# No contraction: x·y + z must round the same on every instruction set; kernels ask for FMA by name.
FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra "
    "-Wno-maybe-uninitialized -Wno-uninitialized "  # GCC 12 warns of its own intrinsics
    "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10
)


def sources() -> list[Path]:
    """Every C++ source of this platform; instruction-set files only where they can run."""
    found = [ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    here = ISAS.get(platform.machine().lower(), ())
    absent = tuple(suffix for suffix in ISA_FLAGS if suffix not in here)
    return [path for path in found if not path.stem.endswith(absent)]


def isa_flags(source: Path) -> str:
    """The compiler flags for the instruction set in `source`'s name; none for portable code."""
    return next((f for suffix, f in ISA_FLAGS.items() if source.stem.endswith(suffix)), "")


def find_compiler() -> str:
    """Return a C++20 compiler that works, or raise RuntimeError saying what was tried."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("#include <string>\nint main() { return std::string().size(); }\n")
        for candidate in candidates:
            if not shutil.which(shlex.split(candidate)[0]):
                continue
            command = [*shlex.split(candidate), "-std=c++20", str(probe), "-o", f"{folder}/probe"]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return candidate
    raise RuntimeError(
        f"no working C++20 compiler (tried {', '.join(candidates)}); install GCC 11 or Clang 14 or "
        "later (Debian and Ubuntu: apt-get install g++), or name one in CXX"
    )


def find_ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")


def quote(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildNative(build_ext):
    """Builds the one extension with ninja, or one source after another where there is none."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
        except ImportError as error:
            self.skip(f"torch cannot be imported to build against ({error})")
            return
        try:
            compiler = find_compiler()
        except RuntimeError as error:
            self.skip(str(error))
            return
        torch_folder = Path(torch.__file__).parent
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.compile(compiler, torch_folder, BUILD / target.name)
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"llmq: {compiler} does not compile the kernels; its message is above. "
                "CXX=none installs without them"
            ) from None
        # A new inode: replacing the file in place would pull the code from under running processes.
        partial = target.with_suffix(".partial")
        shutil.copyfile(BUILD / target.name, partial)
        os.replace(partial, target)

    def skip(self, reason: str) -> None:
        self.warn(
            f"llmq is installed without its compiled kernels: {reason}. Everything works on the "
            "slow reference path; `llmq doctor` shows this again, and installing once more builds "
            "the kernels."
        )

    def compile(self, compiler: str, torch_folder: Path, library: Path) -> None:
        includes = f"-isystem {shlex.quote(str(torch_folder / 'include'))}"
        flags = f"{FLAGS} {includes} {os.environ.get('CXXFLAGS', '')}".strip()
        undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--as-needed"
        libraries = f"-L{shlex.quote(str(torch_folder / 'lib'))} -ltorch_cpu {undefined}"
        objects = {path: BUILD / f"{path.stem}.o" for path in sources()}
        BUILD.mkdir(parents=True, exist_ok=True)
        ninja = find_ninja()
        if ninja is not None:
            lines = [
                f"cxx = {compiler}",
                f"flags = {flags.replace('$', '$$')}",
                "rule compile",
                "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
                "  description = compile $in $isa",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link",
                f"  command = $cxx -shared $in -o $out {libraries}",
                "  description = link $out",
            ]
            for source, built in objects.items():
                lines += [
                    f"build {quote(built)}: compile {quote(source)}",
                    f"  isa = {isa_flags(source)}",
                ]
            lines += [f"build {quote(library)}: link {' '.join(map(quote, objects.values()))}", ""]
            (BUILD / "build.ninja").write_text("\n".join(lines))
            subprocess.run([ninja, "-C", str(BUILD), str(library)], check=True)
            return

        def run(command: str, *paths: Path | str) -> None:
            subprocess.run([*shlex.split(command), *map(str, paths)], check=True)

        def compile_one(source: Path) -> None:
            run(f"{compiler} {flags} {isa_flags(source)} -c", source, "-o", objects[source])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, objects))
        run(f"{compiler} -shared", *objects.values(), "-o", library, *shlex.split(libraries))


setup(
    ext_modules=[
        Extension("llmq._C", [], py_limited_api=True, optional=True),
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
