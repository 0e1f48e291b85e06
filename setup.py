"""Builds `llmq/_C.abi3.so`, the kernels; the rest of the package is in pyproject.toml.

The library uses LibTorch's stable ABI and no Python API, so one build serves torch 2.10 and later
and every Python 3. Each source is compiled for the instruction set that its file name ends with.
torch is needed for its headers only and is never imported. Without torch or a compiler the build
stops with one sentence that says what to do.

CUDA kernels are part of it where nvcc and a torch with CUDA are found. What the environment sets:

LLMQ_KERNELS=0             installs pure Python, without kernels; every op runs its reference
LLMQ_CUDA=1, 0             forces CUDA kernels, also beside a torch without CUDA; leaves them out
LLMQ_CUDA_ARCHS="sm_90a"   builds for fewer GPUs than all of CUDA_ARCHS
LLMQ_TORCH=FOLDER          the folder of the torch to compile against, instead of the installed one
LLMQ_BUILD=NAME            puts object files into build/NAME, so that two builds do not mix
CXX, CXXFLAGS              the compiler, which may compile for another machine; more flags for it
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:  # neither, which is enough for what makes no wheel
        bdist_wheel = object

ROOT = Path(__file__).resolve().parent
# Fixed, so that a second build compiles only what changed.
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

# 'a' only for wgmma: it binds code to one GPU. The others' also runs on later ones of the family.
CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden"


class Torch(NamedTuple):
    """A torch to compile against: its folder, and the CUDA version it is built for, if any."""

    folder: Path
    cuda: str | None


def find_torch() -> Torch:
    """Return the torch to compile against; raise RuntimeError saying how to get one.

    pip and other front ends hide installed packages from an isolated build. A second torch, with
    gigabytes of CUDA libraries, would then be fetched for a few headers. But pip runs that build
    with the environment's own Python, so its site-packages are looked into as well.
    """
    named = os.environ.get("LLMQ_TORCH")
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    for prefix in (sys.prefix, sys.base_prefix):
        variables = {"base": prefix, "platbase": prefix}
        candidates.append(Path(sysconfig.get_path("platlib", vars=variables)) / "torch")
    candidates.append(Path(site.getusersitepackages()) / "torch")
    for folder in [Path(named)] if named else candidates:
        if (folder / "include" / "torch" / "csrc" / "stable").is_dir():
            text = (folder / "version.py").read_text()
            version = re.search(r"__version__ = '(\d+)\.(\d+)", text)
            if version is None or (int(version[1]), int(version[2])) < (2, 10):
                continue
            cuda = re.search(r"^cuda\b.*'([\d.]+)'", text, re.MULTILINE)
            return Torch(folder, cuda[1] if cuda else None)
    looked = dict.fromkeys(str(path) for path in ([Path(named)] if named else candidates))
    raise RuntimeError(
        f"no torch 2.10 or later to compile the kernels against (looked for {', '.join(looked)}). "
        "Install torch into this environment first, then run this again, with "
        "--no-build-isolation unless it is plain pip"
    )


def target_machine(compiler: str) -> str:
    """Return the machine that `compiler` compiles for, as platform.machine() names it."""
    command = [*shlex.split(compiler), "-dumpmachine"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.split("-")[0] if result.returncode == 0 else platform.machine().lower()


def sources(machine: str) -> list[Path]:
    """Every C++ source for `machine`; instruction-set files only where they can run."""
    found = [ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    here = ISAS.get(machine, ())
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


def find_cuda(torch_cuda: str | None) -> Path | None:
    """Return the CUDA toolkit to build with, or None; raise RuntimeError if one is forced."""
    wanted = os.environ.get("LLMQ_CUDA", "")
    if wanted == "0" or (torch_cuda is None and not wanted):
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    homes += [str(Path(on_path).resolve().parent.parent)] if on_path else []
    homes.append("/usr/local/cuda")
    for home in homes:
        needed = ("bin/nvcc", "include/cuda_runtime_api.h")
        if all((Path(home) / file).exists() for file in needed):
            return Path(home)
    message = (
        f"no nvcc to build the CUDA kernels with (looked in {', '.join(homes)} and on PATH); "
        "install the CUDA toolkit 12.8 or later, or name its folder in CUDA_HOME"
    )
    if wanted:
        raise RuntimeError(f"LLMQ_CUDA={wanted}, but {message}")
    print(f"note: {message}; GPUs run Triton's kernels and the reference", file=sys.stderr)
    return None


def cuda_sources() -> list[Path]:
    folder = ROOT / "csrc" / "cuda"
    return [*sorted(folder.glob("*.cpp")), *sorted(folder.glob("*.cu"))]


def gencode() -> str:
    """Code of each GPU asked for, and PTX for what comes after."""
    archs = os.environ.get("LLMQ_CUDA_ARCHS", " ".join(CUDA_ARCHS)).replace(",", " ").split()
    flags = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in archs]
    oldest = min(archs, key=lambda arch: int(arch[3:].rstrip("af")))[3:].rstrip("af")
    return " ".join([*flags, f"-gencode=arch=compute_{oldest},code=compute_{oldest}"])


def stub_torch(compiler: str) -> Path:
    """Make an empty libtorch_cpu.so of the target machine, whose torch is not at hand.

    The library needs no more than its name: symbols are resolved when it loads, after torch.
    """
    command = [*shlex.split(compiler), "-shared", "-x", "c", os.devnull]
    command += ["-Wl,-soname,libtorch_cpu.so", "-o", str(BUILD / "libtorch_cpu.so")]
    subprocess.run(command, check=True)
    return BUILD


def find_ninja() -> str | None:
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja")


def quote(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildNative(build_ext):
    """Builds the one extension with ninja, or one source after another where there is none."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch = find_torch()
            compiler = find_compiler()
            cuda = find_cuda(torch.cuda)
        except RuntimeError as error:
            raise SystemExit(
                f"llmq: {error}. LLMQ_KERNELS=0 installs without kernels: every op then runs its "
                "slow reference."
            ) from None
        try:
            self.compile(compiler, torch.folder, cuda, BUILD / target.name)
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"llmq: {compiler}{' or nvcc' if cuda else ''} does not compile the kernels; its "
                "message is above. LLMQ_KERNELS=0 installs without them"
                f"{', LLMQ_CUDA=0 without those for GPUs' if cuda else ''}."
            ) from None
        # A new inode: replacing the file in place would pull the code from under running processes.
        partial = target.with_suffix(".partial")
        shutil.copyfile(BUILD / target.name, partial)
        os.replace(partial, target)

    def compile(self, compiler: str, torch_folder: Path, cuda: Path | None, library: Path) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        machine = target_machine(compiler)
        includes = f"-isystem {shlex.quote(str(torch_folder / 'include'))}"
        flags = f"{FLAGS} {includes} {os.environ.get('CXXFLAGS', '')}".strip()
        folder = torch_folder / "lib"
        if machine != platform.machine().lower():
            folder = stub_torch(compiler)
        libraries = f"-L{shlex.quote(str(folder))} "
        if sys.platform == "darwin":
            libraries += "-ltorch_cpu -undefined dynamic_lookup"
        else:  # a stub resolves no symbol, and would be left out
            libraries += "-Wl,--no-as-needed -ltorch_cpu -Wl,--as-needed"
        commands = {path: f"{compiler} {flags} {isa_flags(path)}" for path in sources(machine)}
        if cuda is not None:
            commands[ROOT / "csrc" / "ops.cpp"] += " -DLLMQ_CUDA"
            headers = f"-isystem {shlex.quote(str(cuda / 'include'))}"
            nvcc = f"{shlex.quote(str(cuda / 'bin' / 'nvcc'))} -ccbin {shlex.quote(compiler)}"
            for path in cuda_sources():
                host = f"{compiler} {flags} {headers}"
                device = f"{nvcc} {NVCC_FLAGS} {gencode()}"
                commands[path] = device if path.suffix == ".cu" else host
            # The runtime inside, so that the library loads where there is neither GPU nor toolkit.
            lib = cuda / ("lib64" if (cuda / "lib64").exists() else "lib")
            libraries += f" -L{shlex.quote(str(lib))} -lcudart_static -lrt -ldl -lpthread"
            libraries += " -Wl,--exclude-libs,ALL"
            if (torch_folder / "lib" / "libtorch_cuda.so").exists():
                libraries += " -Wl,--no-as-needed -ltorch_cuda"  # it is only referred to weakly
        objects = {path: BUILD / f"{path.parent.name}_{path.stem}.o" for path in commands}
        ninja = find_ninja()
        if ninja is not None:
            lines = [
                "rule compile",
                "  command = $compile -MMD -MF $out.d -c $in -o $out",
                "  description = compile $in",
                "  depfile = $out.d",
                "  deps = gcc",
                "rule link",
                f"  command = {compiler} -shared $in -o $out {libraries}",
                "  description = link $out",
            ]
            for source, built in objects.items():
                lines += [
                    f"build {quote(built)}: compile {quote(source)}",
                    f"  compile = {commands[source].replace('$', '$$')}",
                ]
            lines += [f"build {quote(library)}: link {' '.join(map(quote, objects.values()))}", ""]
            (BUILD / "build.ninja").write_text("\n".join(lines))
            subprocess.run([ninja, "-C", str(BUILD), str(library)], check=True)
            return

        def run(command: str, *paths: Path | str) -> None:
            subprocess.run([*shlex.split(command), *map(str, paths)], check=True)

        def compile_one(source: Path) -> None:
            run(f"{commands[source]} -c", source, "-o", objects[source])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, objects))
        run(f"{compiler} -shared", *objects.values(), "-o", library, *shlex.split(libraries))


class BuildWheel(bdist_wheel):
    """Tags the wheel for every Python 3: its library is loaded by torch and uses no Python API."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


commands = {"build_ext": BuildNative}
if bdist_wheel is not object:
    commands["bdist_wheel"] = BuildWheel
elif {"bdist_wheel", "editable_wheel"} & set(sys.argv):
    raise SystemExit(
        f"llmq: setuptools {setuptools.__version__} makes no wheels by itself; "
        "pip install wheel, or a setuptools of 70.1 or later, or leave out --no-build-isolation"
    )

# pyproject.toml cannot hold it in a form that setuptools before 77 and after both take.
has_spdx = int(setuptools.__version__.split(".")[0]) >= 77
license_field = {"license_expression" if has_spdx else "license": "Apache-2.0"}

setup(
    **license_field,
    packages=[*find_packages(include=["llmq", "llmq.*"]), "llmq_kernels"],
    package_dir={"llmq": "llmq", "llmq_kernels": "kernels"},
    ext_modules=(
        []
        if os.environ.get("LLMQ_KERNELS") == "0"
        else [Extension("llmq._C", [], py_limited_api=True)]
    ),
    cmdclass=commands,
)
