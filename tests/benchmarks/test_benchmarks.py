"""The benchmarks' machinery: workers, records, tables. No timing is asserted."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, model, peers
from llmq.commands import bench
from tests import families

CEILINGS = {
    "read_256k_gbs": 100.0,
    "read_8m_gbs": 80.0,
    "read_memory_gbs": 20.0,
    "int8_gops": 400.0,
    "float32_gops": 100.0,
}


def record(peer: str, seconds: float, M: int = 1, **fields: Any) -> dict[str, Any]:
    quartiles = {"low": 0.98 * seconds, "high": 1.02 * seconds}
    return {"peer": peer, "kernel": "k", "N": 4096, "K": 4096, "M": M, "seconds": seconds} | (
        quartiles | fields
    )


def test_workers_measure_in_turn_and_complain_apart() -> None:
    records, complaints = compare.measure(
        ["llmq w8a8", "llmq w4a16-g32", "torch float32"],
        [(32, 24)],
        [1, 3],
        threads=1,
        seconds=0.001,
        rounds=2,
    )
    measured = {(r["peer"], r["M"]) for r in records}
    assert measured == {(p, M) for p in ("llmq w8a8", "torch float32") for M in (1, 3)}
    assert all(0 < r["low"] <= r["seconds"] <= r["high"] for r in records)
    kernels = {r["peer"]: r["kernel"] for r in records}
    assert kernels["llmq w8a8"].startswith(("int8_linear_", "reference"))
    assert kernels["torch float32"] == "torch float32"
    # 32 does not divide 24: the others go on.
    assert len(complaints) == 1 and "group_size=32 does not divide" in complaints[0]


def test_a_process_that_ends_is_an_error_not_a_hang() -> None:
    worker = compare.Worker("torch float32", 1)
    worker._process.kill()
    worker._process.wait()
    assert "ended" in worker.ask(prepare=[8, 8])["error"]
    worker.stop()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = peers.PEERS["onnxruntime 4 bits"]._replace(needs=("no_such_library",))
    monkeypatch.setitem(peers.PEERS, "onnxruntime 4 bits", absent)
    records, complaints = compare.measure(["onnxruntime 4 bits"], [(16, 32)], [1], threads=1)
    assert not records and complaints == ["onnxruntime 4 bits: pip install no_such_library"]


@pytest.mark.parametrize("name", [n for n in peers.PEERS if n.startswith("llmq")])
def test_our_rows_compute_the_layer(name: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    x = torch.randn(5, 64)
    expected = linear(x)
    error = (peers.PEERS[name].make(linear, 1)(x) - expected).norm() / expected.norm()
    assert error < (0.6 if "sparse" in name else 0.15)


def test_peers_with_integers_compute_the_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    for name in ("torch dynamic x86", "onnxruntime dynamic int8", "openvino int8 weights"):
        if peers.missing(name):
            continue
        linear = torch.nn.Linear(64, 48)
        with torch.inference_mode():
            expected = linear(x)
            found = peers.PEERS[name].make(linear, 1)(x)
        found = torch.as_tensor(found if isinstance(found, torch.Tensor) else found[0])
        assert (found - expected).norm() / expected.norm() < 0.05, name


def test_limit_is_the_larger_of_reading_and_computing() -> None:
    one = compare.limit(record("llmq w8a8", 1.0), CEILINGS)
    assert one == pytest.approx((4096**2 + 4 * 8192) / 20e9)
    many = compare.limit(record("llmq w8a8", 1.0, M=1024), CEILINGS)
    assert many == pytest.approx(2 * 1024 * 4096**2 / 400e9)
    floats = compare.limit(record("llmq w8a16", 1.0, M=1024), CEILINGS)
    assert floats == pytest.approx(4 * many)


def test_table_and_plots_show_ratio_and_share(tmp_path: Path) -> None:
    records = [
        record("llmq w8a8", 1.0e-3),
        record("torch dynamic x86", 1.5e-3),
        record("torch dynamic onednn", 2.0e-3),
        record("torch float32", 9e-3),
    ]
    whole = {"ceilings": CEILINGS, "records": records}
    text = compare.table(whole)
    assert "1000 (1.50×, 84 %)" in text and "4096×4096" in text
    pytest.importorskip("matplotlib")
    for file in compare.plot(whole, tmp_path):
        assert "<svg" in file.read_text()


def test_update_replaces_whole_cases() -> None:
    old = [record("llmq w8a8", 1.0), record("torch float32", 2.0), record("llmq w8a8", 3.0, M=4)]
    merged = compare.updated(old, [record("llmq w8a8", 0.5)])
    assert [(r["M"], r["seconds"]) for r in merged] == [(1, 0.5), (4, 3.0)]


def test_moved_tells_change_from_noise() -> None:
    old = [record("llmq w8a8", 1.0e-3), record("torch float32", 1.0e-3)]
    new = [record("llmq w8a8", 0.8e-3), record("torch float32", 1.03e-3)]
    lines = compare.moved(new, old)
    assert len(lines) == 1 and "llmq w8a8" in lines[0] and "0.80×" in lines[0]
    wide = [record("llmq w8a8", 0.8e-3, low=0.7e-3, high=1.1e-3)]
    assert not compare.moved(wide, old)
    assert not compare.moved(json.loads(json.dumps(old)), old)


def test_models_are_measured_in_turn_with_what_measures_itself() -> None:
    turns: list[int] = []

    def other() -> dict[str, float]:
        turns.append(len(turns))
        return {"decode": 100.0 + len(turns)}

    llama = families.CAUSAL["llama"]().eval()
    speeds = bench.model_speeds(
        {"float32": llama}, prompt=16, decode=2, rounds=3, others={"other": other}
    )
    assert speeds["float32"]["prefill"] > 0 and speeds["float32"]["decode"] > 0
    assert speeds["other"] == {"decode": 103.0}  # the first of four turns warms up
    text = bench.speed_table(speeds)
    assert text.splitlines()[2].split()[:2] == ["other", "103.0"]


def test_llama_cpp_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with contextlib.ExitStack() as stack:
        assert model.llama_cpp(1, stack) == {}
    assert "pip install llama-cpp-python" in capsys.readouterr().out
