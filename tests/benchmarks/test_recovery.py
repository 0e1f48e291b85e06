"""The cases of recovery on tiny models: what they record, and that they go on where they were."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq
from benchmarks import recovery
from tests import families
from tests.helpers import generator

pytest.importorskip("transformers")


def arguments(**given: Any) -> argparse.Namespace:
    standard = {"steps": 2, "lr": 1e-3, "method": "magnitude", "seed": 0, "rounds": 1}
    return argparse.Namespace(**{**standard, "bfloat16": False, **given})


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = families.CAUSAL["llama"]().eval()
    g = generator(0)
    texts = tuple(torch.randint(3, 128, (n,), generator=g) for n in (1100, 1100, 256 * 140))
    monkeypatch.setattr(recovery.smollm2, "load", lambda: (copy.deepcopy(model), None))
    monkeypatch.setattr(recovery.smollm2, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(recovery, "_smollm2_text", lambda tokenizer, more=0: texts)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_smollm2_is_judged_before_and_after(method: str) -> None:
    record = recovery.run_smollm2(arguments(method=method))
    assert [row["name"] for row in record["rows"]] == ["before", "after"]
    for row in record["rows"]:
        change = row["articles"]["change"]
        assert change["low"] <= change["value"] <= change["high"]
        assert row["documentation"]["kl"] > 0
    assert len(record["rows"][1]["losses"]) == 2
    assert [step for step, _ in record["rows"][1]["validation"]] == [0, 1, 2]
    assert json.loads(json.dumps(record))["method"] == method


def test_an_interrupted_case_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, made = llmq.prune, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return genuine(*args, **kwargs)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(llmq, "prune", counted)
    with monkeypatch.context() as patch:
        patch.setattr(llmq, "fine_tune", stopped)
        with pytest.raises(KeyboardInterrupt):
            recovery.run_smollm2(arguments())
    assert len(recovery.run_smollm2(arguments())["rows"]) == 2
    assert len(made) == 1


def test_the_original_is_trained_alike() -> None:
    record = recovery.run_smollm2_original(arguments())
    before, after = record["rows"]
    assert before["documentation"]["kl"] == pytest.approx(0, abs=1e-6)
    assert len(after["losses"]) == 2


def test_the_plan_stands_beside_uniform_formats() -> None:
    record = recovery.run_plan(arguments())
    shares = {row["name"]: row.get("linear_share") for row in record["rows"]}
    assert shares["w8a8"] < 0.4
    assert set(shares) == {"float32", "w8a8", "w8a8-g64", "plan"}
    assert record["plan"]["choices"]
