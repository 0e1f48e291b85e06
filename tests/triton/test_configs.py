"""The choice of tiles: it fits every GPU and shape, and what was measured comes first."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llmq import cli
from llmq.commands import tune
from tests.helpers import assert_raises
from tests.triton.device import DEVICE

configs = pytest.importorskip("llmq_kernels.configs")

CAPABILITIES = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}  # KiB


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("family", configs.TILES)
def test_every_choice_fits(family: str, capability: tuple[int, int]) -> None:
    for M in (1, 3, 16, 17, 64, 65, 500, 8192):
        for N, K in ((1, 1), (576, 576), (4096, 4096), (57344, 8192), (17, 100003)):
            for group in (0, 1, 5, 32, 48, 64, 128):
                if group and (K % group or family not in ("grouped_int8_gemm", "weight_only_gemm")):
                    continue
                c = configs.heuristic(family, M, N, K, capability, 132, group)
                assert c.BLOCK_K >= 32 and not c.BLOCK_K & (c.BLOCK_K - 1)
                assert not group or max(32, 2 * group) >= c.BLOCK_K
                assert 1 <= c.SPLITS <= 16
                assert c.SPLITS == 1 or c.SPLITS * min(c.BLOCK_K, group or K) <= K
                width = 2 if family == "weight_only_gemm" else 1  # bytes of an input
                stage = (c.BLOCK_M * width + c.BLOCK_N) * c.BLOCK_K
                assert stage * c.num_stages <= CAPABILITIES[capability] * 1024


def test_few_tokens_split_what_many_do_not() -> None:
    few, many = (configs.heuristic("int8_gemm", M, 1024, 8192, (9, 0), 132) for M in (1, 8192))
    assert few.SPLITS > 1 and few.BLOCK_M == 16
    assert many.SPLITS == 1 and many.BLOCK_M == 128 and many.TMA


def test_groups_bound_the_depth_of_a_tile() -> None:
    wide = configs.Config(16, 64, 256)
    found = {g: configs.within_group(wide, g).BLOCK_K for g in (0, 1, 5, 32, 48, 65, 96, 128)}
    assert found == {0: 256, 1: 32, 5: 32, 32: 32, 48: 64, 65: 128, 96: 32, 128: 128}
    blocks = {(32, 32, 0): (32, 32), (128, 128, 64): (64, 64), (1, 4, 0): (16, 32)}
    blocks |= {(48, 96, 0): (64, 32), (128, 512, 0): (64, 256)}
    for block, tile in blocks.items():
        config = configs.within_block(wide, *block)
        assert tile == (config.BLOCK_N, config.BLOCK_K), block


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path))
    configs._tuned.cache_clear()
    configs.choose.cache_clear()
    yield tmp_path
    configs._tuned.cache_clear()
    configs.choose.cache_clear()


def test_tuning_keeps_the_fastest_and_choices_follow_it(cache: Path) -> None:
    fastest, times = 3, iter(range(1 << 30))

    def seconds(call: Any) -> float:
        at = next(times)
        if at == 1:
            raise RuntimeError("out of shared memory")
        if at < 2:
            call()
        return abs(at - fastest) + 1.0

    scheme, N, K = "w8a8", 32, 2048
    tuned = tune.tune([(N, K)], [2], [scheme], device=DEVICE, seconds=seconds)
    (entry,) = tuned.entries
    assert entry["us"] == 1e6 and entry["heuristic_us"] == 4e6 and not tuned.refused
    assert "int8_gemm" in str(tuned) and str(tuned.file) in str(tuned)
    assert json.loads(tuned.file.read_text())["entries"] == tuned.entries
    best = configs.Config(**entry["config"])
    assert configs.choose("int8_gemm", 1, N, K, DEVICE) == best
    capability, sms, _ = configs.gpu(DEVICE)
    for M, n in ((3, N), (1, N + 1)):  # more tokens, another shape
        expected = configs.heuristic("int8_gemm", M, n, K, capability, sms)
        assert configs.choose("int8_gemm", M, n, K, DEVICE) == expected


@pytest.mark.parametrize("scheme", tune.SCHEMES)
def test_every_scheme_has_a_product_to_tune(scheme: str) -> None:
    M, N, K = 3, 32, 128
    problem = tune._problem(scheme, M, N, K, DEVICE)
    assert problem.family in configs.SPLITTING
    y = problem.run(configs.choose(problem.family, M, N, K, DEVICE, problem.group))
    assert y.shape == (M, N) and y.isfinite().all()


def test_tuning_says_what_it_needs(capsys: pytest.CaptureFixture) -> None:
    assert_raises(lambda: tune.tune(device="cpu"), ValueError, "CUDA GPU")
    shape = [(32, 128)]
    quantile = ["w8a16-quantile"]
    assert_raises(
        lambda: tune.tune(shape, [1], quantile, device=DEVICE, seconds=lambda c: math.inf),
        ValueError,
        "takes the tiles of w8a16",
    )
    if DEVICE.type == "cpu":
        assert cli.main(["tune"]) == 1
        assert "CUDA GPU" in capsys.readouterr().err
