"""What Triton's kernels compile to, and the GPU's benchmark without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")


def _run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_compiles_without_spills_to_the_instructions_of_the_gpu(arch: str) -> None:
    """`make static` takes all tiles, and sm_89 too; here it is the largest and one token's."""
    printed = _run("benchmarks.static", "--quick", "--check", "--arch", arch)
    assert "none amiss" in printed
    assert printed.count(f"sm_{arch}") >= 20


def test_the_table_of_all_tiles_is_clean() -> None:
    from llmq_kernels import configs

    file = ROOT / "benchmarks" / "results" / "static" / "triton.json"
    records = json.loads(file.read_text())["records"]
    assert {r["arch"] for r in records} == {"sm_80", "sm_89", "sm_90", "sm_100"}
    for record in records:
        assert not record["spilled_bytes"] and not record["local_memory"], record
    tiles = {
        (c["BLOCK_M"], c["BLOCK_N"], c["num_warps"], c["TMA"])
        for c in (r["config"] for r in records)
        if c
    }
    for family, columns in configs.TILES.items():
        for rows in columns.values():
            for _, _, c in rows:
                assert (c.BLOCK_M, c.BLOCK_N, c.num_warps, c.TMA) in tiles, f"{family} {c}"


@needs_triton
@pytest.mark.slow
def test_the_benchmark_of_a_gpu_goes_through_its_motions(tmp_path: Path) -> None:
    printed = _run("benchmarks.gpu", "--dry-run", "--output", str(tmp_path))
    assert "0 failed" in printed
    record = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert {r["name"] for r in record["kernels"]} >= {"bfloat16", "w8a8", "w4a16-g128"}
    assert {r["scheme"] for r in record["models"]} == {"bfloat16", "w8a8", "w8a16", "w4a16-g128"}
