"""The CUDA part compiles: without spills for each GPU, and as part of the complete extension."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import static_cuda
from tests.cuda_emulator import emulator

# The oldest, and the one with the most to go wrong; `make cuda-archs` compiles for all.
ARCHS = os.environ.get("LLMQ_CUDA_ARCHS", "sm_80 sm_90a").split()
SOURCES = sorted(path.name for path in emulator.CUDA.glob("*.cu"))

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile with")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_warnings_spills_or_local_memory(
    source: str, arch: str, tmp_path: Path
) -> None:
    flags = ["-std=c++20", "-O3", f"-arch={arch}", "-Xptxas=-v", "-Werror=all-warnings", "-cubin"]
    target = tmp_path / "kernel.cubin"
    command = ["nvcc", *flags, str(emulator.CUDA / source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    usage = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", result.stderr)
    assert usage and all(size == "0" for size, _ in usage), f"{source}: {usage}"
    for name, body in static_cuda.loops(target).items():
        if "wgmma" in name and arch != "sm_90a":
            assert not body, f"{name} is more than empty where there is no wgmma"
            continue
        copies = [i for i in body if i.startswith("LDGSTS")]
        wide = [i for i in copies if i.endswith(".128")]
        assert wide, f"{name} copies no 16 bytes at once"
        assert "sparse_gemm" in name or copies == wide, f"{name}: {set(copies) - set(wide)}"


# One copy, then a loop of half of a lane's 8 LDSM within the loop that multiplies; another before.
SASS = """
.L_x_0:
        /*0000*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
.L_x_2:
        /*0030*/                   LDSM.16.M88.4 R4, [R20] ;
        /*0040*/                   LDSM.16.M88.4 R8, [R21] ;
        /*0050*/                   LDSM.16.M88.4 R12, [R22] ;
        /*0060*/                   LDSM.16.M88.4 R16, [R23] ;
        /*0070*/                   IMMA.16832.S8.S8 R24, R4.ROW, R30.COL, R24 ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/              @!P2 BRA `(.L_x_1) ;
"""


def test_the_loop_that_multiplies_is_counted_with_loops_within_it() -> None:
    body = static_cuda.loop(SASS)
    assert len(body) == 1 + 2 * 6 + 1
    assert sum(i.startswith("LDSM") for i in body) == 8 and "IADD3" not in body


def test_a_name_tells_a_kernel() -> None:
    name = "_ZN4llmq4cuda10small_gemmINS0_4RowsILi4EEENS0_{}ELi{}ELi{}EEEvNS0_9SmallGemmE"
    kernel = static_cuda.parse(name.format("6FloatsINS_8BFloat16ELi4E", 4, 32))
    assert kernel == ("Rows", 4, "BFloat16", 32, 32)
    assert kernel.bytes == 0.5 + 5 / 32 and kernel.chunk == 256 and not kernel.codes
    kernel = static_cuda.parse(name.format("5CodesILb1ELi4E", 1, 128))
    assert kernel == ("Rows", 4, "coded groups", 8, 128) and kernel.codes


def _build(folder: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(emulator.ROOT / "build" / folder / "lib")]
    return subprocess.run(
        command,
        cwd=emulator.ROOT,
        env={**os.environ, "LLMQ_BUILD": folder, **environment},
        capture_output=True,
        text=True,
    )


@needs_nvcc
@pytest.mark.slow
def test_the_complete_extension_compiles_and_loads_without_a_gpu() -> None:
    built = _build("cuda", LLMQ_CUDA="1", LLMQ_CUDA_ARCHS="sm_90a")
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    code = """
import torch, llmq.ops
from llmq.runtime import dispatch
from llmq.runtime import extension
from llmq.scheme import resolve_scheme
assert extension.load().loaded, extension.load().error
assert dispatch.has_cuda("int8_linear") and dispatch.has_cuda("weight_only_linear")
cuda = torch.device("cuda")
assert dispatch.keeps_tiles(cuda, resolve_scheme("w8a8"), 33, 64, 999, torch.int8)
assert dispatch.keeps_tiles(cuda, None, 32, 64, 999, torch.bfloat16)
for M, kind in ((64, "cuda"), (65, "dense")):
    op_shape = dispatch.OpShape(8, 0, 0, tiles=True)
    kernel = dispatch.choose("bitmap_sparse_linear", "cuda", torch.float16, M, 33, 64, op_shape)
    assert kernel.name == f"bitmap_sparse_linear_{kind}", kernel
for op, dtype, M in (("int8_linear", torch.float32, 1), ("weight_only_linear", torch.float16, 64)):
    op_shape = dispatch.OpShape(activation_group=0 if op == "int8_linear" else None)
    assert dispatch.choose(op, "cuda", dtype, M, 33, 64, op_shape).name == f"{op}_cuda"
    for K in (63, 65, 72):  # rows that do not begin on 16 bytes
        assert dispatch.choose(op, "cuda", dtype, M, 33, K, op_shape).name != f"{op}_cuda"
for K, group, taken in ((256, 0, True), (256, 256, True), (192, 0, False), (256, 128, False)):
    op, op_shape = "semi_structured_linear", dispatch.OpShape(activation_group=group)
    name = dispatch.choose(op, "cuda", torch.bfloat16, 64, 33, K, op_shape).name
    assert (name == "semi_structured_linear_cuda") == taken, (K, group, name)
x = torch.randn(3, 64)
assert torch.ops.llmq.quantize_activation(x, 0)[0].dtype == torch.int8
"""
    library = str(emulator.ROOT / "build" / "cuda" / "_C.abi3.so")
    environment = {**os.environ, "LLMQ_LIBRARY": library, "PYTHONPATH": str(emulator.ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def test_a_missing_toolkit_is_named(tmp_path: Path) -> None:
    code = """
import setuptools
setuptools.setup = lambda **arguments: None
import setup
setup.shutil.which = lambda name: None
setup.Path = lambda path: __import__("pathlib").Path("/nowhere")
try:
    setup.find_cuda(None)
except RuntimeError as error:
    assert "no nvcc" in str(error) and "CUDA_HOME" in str(error), error
else:
    raise AssertionError("forced without a toolkit, and no error")
"""
    environment = {**os.environ, "LLMQ_CUDA": "1"}
    command = [sys.executable, "-c", code]
    options = {"env": environment, "capture_output": True, "text": True, "cwd": emulator.ROOT}
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stderr[-2000:]
