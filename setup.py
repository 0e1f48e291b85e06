"""Builds `llmq/_C.abi3.so`, the kernels; the rest of the package is in pyproject.toml.

CUDA kernels are part of it where nvcc and a torch with CUDA are found. LLMQ_CUDA=1 forces them,
also beside a torch without CUDA (to compile only), LLMQ_CUDA=0 leaves them out;
LLMQ_CUDA_ARCHS="sm_90a" builds for fewer GPUs than all of CUDA_ARCHS.

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

# 'a' only for wgmma: it binds code to one GPU. The others' also runs on later ones of the family.
CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden"


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
            cuda = find_cuda(torch.version.cuda)
        except RuntimeError as error:
            raise SystemExit(f"llmq: {error}") from None
        try:
            self.compile(compiler, torch_folder, cuda, BUILD / target.name)
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"llmq: {compiler}{' or nvcc' if cuda else ''} does not compile the kernels; its "
                "message is above. CXX=none installs without them"
                f"{', LLMQ_CUDA=0 without those for GPUs' if cuda else ''}"
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

    def compile(self, compiler: str, torch_folder: Path, cuda: Path | None, library: Path) -> None:
        includes = f"-isystem {shlex.quote(str(torch_folder / 'include'))}"
        flags = f"{FLAGS} {includes} {os.environ.get('CXXFLAGS', '')}".strip()
        undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--as-needed"
        folder = shlex.quote(str(torch_folder / "lib"))
        libraries = f"-L{folder} -ltorch_cpu {undefined}"
        commands = {path: f"{compiler} {flags} {isa_flags(path)}" for path in sources()}
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
        BUILD.mkdir(parents=True, exist_ok=True)
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


setup(
    ext_modules=[
        Extension("llmq._C", [], py_limited_api=True, optional=True),
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
