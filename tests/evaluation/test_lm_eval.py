"""Tasks of lm-eval: the library, and a plain twin of it that runs where it is not installed."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq
from llmq import cli
from llmq.evaluation import intervals
from llmq.evaluation import lm_eval as adapter
from llmq.models.accelerate import accelerate
from tests import families
from tests.evaluation import lm_eval_twin

TASKS = [*lm_eval_twin.PARTS, "words"]


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in lm_eval_twin.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip(f"lm-eval is not installed: {adapter.EXTRA}")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    simple_evaluate, language_model, task_manager = adapter._library()
    # The index of all of its own tasks takes seconds to make each time.
    quick = functools.partial(task_manager, include_defaults=False)
    monkeypatch.setattr(adapter, "_library", lambda: (simple_evaluate, language_model, quick))


@pytest.fixture(params=["twin", "real"])
def library(request: pytest.FixtureRequest) -> str:
    request.getfixturevalue(request.param)
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lm_eval_twin.write_tasks(tmp_path / "tasks", documents=10)


@pytest.fixture(scope="module")
def original() -> Any:
    return families.make("llama")


@pytest.fixture(scope="module")
def compressed(original: Any) -> Any:
    """So coarsely that it answers otherwise."""
    return llmq.quantize(llmq.prune(copy.deepcopy(original), 0.8), scheme="w8a8")


def responses(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return a list to which each run's whole results will be added."""
    found: list[dict[str, Any]] = []
    take: Callable[..., Any] = adapter._scores

    def note(results: dict[str, Any]) -> Any:
        found.append(results)
        return take(results)

    monkeypatch.setattr(adapter, "_scores", note)
    return found


def log_likelihoods(results: dict[str, Any], task: str) -> torch.Tensor:
    """By document and choice, in float64."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return torch.tensor(
        [[value for value, _ in sample["filtered_resps"]] for sample in samples],
        dtype=torch.float64,
    )


@pytest.mark.usefixtures("library")
def test_pairs_documents(
    original: Any, compressed: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = responses(monkeypatch)
    report = adapter.evaluate(
        compressed,
        families.tiny_tokenizer(),
        TASKS[:2],
        baseline=original,
        limit=8,
        include_path=folder,
    )
    before, after = found
    assert [(s.task, s.metric) for s in report.scores] == [
        (task, metric) for task in TASKS[:2] for metric in ("acc", "acc_norm")
    ]
    for score in report.scores:
        old, new = (
            [sample[score.metric] for sample in results["samples"][score.task]]
            for results in (before, after)
        )
        assert score.documents == len(new) == 8
        assert score.value == pytest.approx(statistics.fmean(new))
        assert score.stderr == pytest.approx(statistics.stdev(new) / 8**0.5)
        assert score.baseline == pytest.approx(statistics.fmean(old))
        assert score.interval == intervals.share(new, [1] * 8)
        assert score.difference == intervals.share_difference(old, new, [1] * 8)
    assert any(score.difference and score.difference.value for score in report.scores)


@pytest.mark.usefixtures("library")
def test_a_group_is_the_documents_of_its_tasks(
    original: Any, compressed: Any, folder: Path
) -> None:
    options: dict[str, Any] = {"limit": 6, "include_path": folder}
    tokenizer = families.tiny_tokenizer()
    earlier = adapter.evaluate(original, tokenizer, "words", **options)
    report = adapter.evaluate(compressed, tokenizer, "words", baseline=earlier, **options)
    scores = {(score.task, score.metric): score for score in report.scores}
    parts, whole = [scores[part, "acc"] for part in TASKS[:2]], scores["words", "acc"]
    assert whole.documents == 12 and whole.difference is not None
    assert whole.value == pytest.approx(sum(part.value for part in parts) / 2)
    assert whole.difference.rows == 12
    assert whole.baseline is not None
    assert whole.difference.value == pytest.approx(whole.value - whole.baseline)


# How far a document's log-likelihood moves as a share of it: batches and padding change the order
# of sums only. That moves a code of an 8-bit input now and then, by 1/127 of the largest.
MOVES = {"float": 1e-5, "w8a16": 1e-5, "w8a8": 5e-3, "w4a8-g32": 5e-3}


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize(
    ("name", "scheme", "options", "batch_size"),
    [
        ("llama", "float", (), 1),
        ("llama", "float", (), 3),
        ("llama", "w8a8", (), 1),
        ("llama", "w8a8", (), 3),
        ("llama", "w8a16", ("accelerated",), 1),
        ("llama", "w8a16", ("accelerated",), 3),
        ("llama", "w8a8", ("accelerated",), 3),
        ("llama-tied", "w8a16", ("whole",), 3),
        ("gpt2", "w8a16", ("sparse",), 3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_the_library_gives_what_one_sequence_at_a_time_gives(
    name: str,
    scheme: str,
    options: tuple[str, ...],
    batch_size: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = families.make(name)
    if "sparse" in options:
        llmq.prune(model, 0.5)
    if scheme != "float":
        llmq.quantize(model, scheme=scheme, skip=() if "whole" in options else None)
    tokenizer = families.tiny_tokenizer()
    plain = lm_eval_twin.simple_evaluate(
        lm_eval_twin.HFLM(pretrained=model, tokenizer=tokenizer),
        tasks=["words_a"],
        num_fewshot=None,
        limit=None,
        log_samples=True,
        task_manager=lm_eval_twin.TaskManager(include_path=str(folder)),
    )
    if "accelerated" in options:
        accelerate(model)
        assert model.llmq_acceleration.fused, str(model.llmq_acceleration)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tied = model.get_output_embeddings() if "whole" in options else None
    shared = tied is not None and tied.weight is model.get_input_embeddings().weight
    model.train()

    found = responses(monkeypatch)
    report = adapter.evaluate(
        model, tokenizer, "words_a", batch_size=batch_size, include_path=folder
    )
    want, got = (log_likelihoods(results, "words_a") for results in (plain, found[0]))
    torch.testing.assert_close(got, want, rtol=MOVES[scheme], atol=0)
    # An answer may differ only where two choices are as near as that.
    close = want.topk(2).values.diff().abs()[:, 0] <= MOVES[scheme] * want.abs().amax(1)
    theirs = [sample["acc"] for sample in found[0]["samples"]["words_a"]]
    ours = [sample["acc"] for sample in plain["samples"]["words_a"]]
    assert all(a == b or near for a, b, near in zip(theirs, ours, close.tolist(), strict=True))
    assert report.scores[0].value == pytest.approx(statistics.fmean(theirs))

    assert model.training and tokenizer.pad_token is None
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    if tied is not None:
        assert shared and tied is model.get_output_embeddings()
        assert tied.weight is model.get_input_embeddings().weight


def results(samples: list[dict[str, Any]], **row: Any) -> dict[str, Any]:
    """What `simple_evaluate` gives for a task "t" in a group "g" of a group "all"."""
    of = {"doc_hash": "0", "filter": "none"}
    return {
        "results": {"t": row, "g": row, "all": row},
        "group_subtasks": {"all": ["g"], "g": ["t"], "t": []},
        "n-samples": {"t": {"original": 9, "effective": 3}},
        "samples": {"t": [{"doc_id": i, **of, **sample} for i, sample in enumerate(samples)]},
    }


def test_metrics_of_any_kind() -> None:
    samples = [
        {"rouge": 0.25, "f1": 1.0, "ppl": [-3.0, 2]},
        {"rouge": 0.5, "f1": 0.0, "ppl": [-1.0, 2]},
        {"rouge": 0.75, "f1": 1.0, "ppl": [-2.0, 2]},
    ]
    samples += [{"filter": "strict", "rouge": 0.0}] * 3
    means = {"rouge,none": 0.5, "rouge_stderr,none": 0.14}
    others = {"f1,none": 0.8, "f1_stderr,none": "N/A", "ppl,none": 2.7, "ppl_stderr,none": "N/A"}
    strict_means = {"rouge,strict": 0.0, "rouge_stderr,strict": 0.0}
    row = {"alias": "t", "sample_len": 3, **means, **others, **strict_means}
    before = adapter.TaskReport(adapter._scores(results(samples, **row)))
    assert [(s.task, s.metric) for s in before.scores[:4]] == [
        *(("t", "rouge"), ("t", "f1"), ("t", "ppl"), ("t", "rouge (strict)")),
    ]
    for place in (0, 4, 8):  # alike in the task, its group and that one's
        rouge, f1, ppl, strict = before.scores[place : place + 4]
        assert rouge.interval == intervals.mean([0.25, 0.5, 0.75], [1, 1, 1])
        assert (rouge.stderr, rouge.documents) == (0.14, 3)
        assert strict.interval == intervals.share([0, 0, 0], [1, 1, 1])
        assert f1.value == 0.8 and f1.interval is None and f1.stderr is None  # 2/3 is the mean
        assert ppl.value == 2.7 and ppl.interval is None

    better = [{**sample, "rouge": sample["rouge"] + 0.125} for sample in samples[:3]]
    raised = {**row, "rouge,none": 0.625}
    after = adapter.TaskReport(adapter._scores(results([*better, *samples[3:]], **raised)))
    report = adapter._paired(before, after)
    rouge, f1 = report.scores[:2]
    assert rouge.difference is not None and rouge.difference.distinguishable
    assert rouge.difference.value == rouge.difference.low == rouge.difference.high == 0.125
    assert (f1.baseline, f1.difference) == (0.8, None)
    table = str(report).splitlines()
    assert table[0].split() == [
        "task",
        "metric",
        "documents",
        "original",
        "compressed",
        "difference",
    ]
    assert "t, rouge: differs significantly (95 %)" in table
    assert "t, rouge (strict): does not differ significantly (95 %)" in table

    record = json.loads(report.to_json())["scores"]
    assert record[0]["difference"]["distinguishable"] is True and "outcomes" not in record[0]
    assert record[1]["difference"] is None and record[1]["value"] == 0.8


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"tasks": []}, ValueError, "tasks is empty"),
        ({"tokenizer": None}, ValueError, "needs the model's tokenizer"),
        ({"limit": 0}, ValueError, "limit must be positive"),
        (
            {"model": torch.nn.Linear(2, 2)},
            TypeError,
            "language models of transformers, got Linear",
        ),
        ({"baseline": "smollm2"}, TypeError, "language models of transformers, got str"),
        ({"limit": 4}, ValueError, "no acc of words_a over 4 documents"),
        ({"tasks": "words_b"}, ValueError, "no acc of words_b over 5 documents"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_evaluated(
    original: Any, folder: Path, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    right: dict[str, Any] = {
        "model": original,
        "tokenizer": families.tiny_tokenizer(),
        "tasks": "words_a",
        "limit": 5,
        "include_path": folder,
    }
    given = {**right, "baseline": adapter.evaluate(**right), **changed}
    with pytest.raises(error, match=message):
        adapter.evaluate(**given)


@pytest.mark.usefixtures("twin")
def test_a_baseline_on_other_documents(original: Any, folder: Path, tmp_path: Path) -> None:
    other = lm_eval_twin.write_tasks(tmp_path / "others", documents=11)  # drawn anew: others
    tokenizer = families.tiny_tokenizer()
    report = adapter.evaluate(original, tokenizer, "words_b", limit=9, include_path=other)
    with pytest.raises(ValueError, match="other documents of words_b"):
        adapter.evaluate(
            original, tokenizer, "words_b", limit=9, include_path=folder, baseline=report
        )


@pytest.fixture(scope="module")
def directories(
    original: Any, compressed: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    whole, small = (tmp_path_factory.mktemp(name) / "model" for name in ("whole", "small"))
    original.save_pretrained(whole)
    llmq.save(copy.deepcopy(compressed), small)
    for place in (whole, small):
        families.tiny_tokenizer().save_pretrained(place)
    return whole, small


@pytest.mark.usefixtures("library")
def test_command(
    directories: tuple[Path, Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, small = map(str, directories)
    tasks = ["--tasks", "words_a,words_b", "--limit", "8", "--include-path", str(folder)]
    assert cli.main(["eval", small, *tasks]) == 0
    assert "words_b  acc_norm  8" in capsys.readouterr().out
    assert cli.main(["eval", small, *tasks, "--baseline", whole, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [score["documents"] for score in scores] == [8] * 4
    assert all(score["difference"]["rows"] == 8 for score in scores)
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    both = [*tasks, "--text", str(text), "--json"]
    assert cli.main(["eval", small, *both]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"]["perplexity"] > 1 and len(found["tasks"]["scores"]) == 4


def test_command_without_the_library(
    directories: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for arguments, message in (
        (["--tasks", "arc_easy"], "pip install 'llmq-kernels[lm-eval]'"),
        ([], "name a text to measure on (--text FILE), tasks (--tasks NAMES), or both"),
        (["--tasks", "arc_easy", "--html", "x.html"], "--html goes with --text and --baseline"),
    ):
        assert cli.main(["eval", str(directories[0]), *arguments]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.strip().count("\n") == 0
