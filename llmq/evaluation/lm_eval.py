"""Task accuracy through EleutherAI's lm-eval, compressed and original on the same documents.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) reads the tasks, builds the prompts
and judges the answers; here its outcomes are paired document by document, so that a difference has
an interval that is narrower than those of the two accuracies (Miller, arXiv:2411.00640, section
4.2).
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from llmq.evaluation import intervals
from llmq.evaluation.evaluate import inference
from llmq.evaluation.intervals import Interval

EXTRA = "pip install 'llmq-kernels[lm-eval]'"


@dataclass(frozen=True)
class Score:
    """One metric of one task, or of a group of tasks.

    Args:
        task: its name.
        metric: its name, and that of the filter of answers where there is one.
        value: as lm-eval gives it.
        stderr: its standard error by lm-eval; None where it gives none.
        documents: that it rests on.
        interval: of 95 %; None where the metric is no mean over documents.
        baseline, baseline_stderr: of the original; None without one.
        difference: value − baseline, document by document; None where there is no interval.
        outcomes: of each document, by its task, number and hash; empty where the metric is no mean.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    interval: Interval | None
    baseline: float | None = None
    baseline_stderr: float | None = None
    difference: Interval | None = None
    outcomes: Mapping[str, float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class TaskReport:
    """The outcome of `evaluate`: one score a task and metric, in lm-eval's order."""

    scores: list[Score]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's rows, the first of which names the columns."""
        paired = any(score.baseline is not None for score in self.scores)
        head: tuple[str, ...] = ("task", "metric", "documents")
        head += ("original", "compressed", "difference") if paired else ("value", "95 %")
        rows = [head]
        for score in self.scores:
            row: tuple[str, ...] = (score.task, score.metric, str(score.documents))
            value = _with_error(score.value, score.stderr)
            if paired:
                before = score.baseline
                row += ("" if before is None else _with_error(before, score.baseline_stderr), value)
                row += ("" if score.difference is None else f"{score.difference:+.4f}",)
            else:
                found = score.interval
                row += (value, "" if found is None else f"[{found.low:.4f}, {found.high:.4f}]")
            rows.append(row)
        return rows

    def verdicts(self) -> list[str]:
        """Return a sentence per difference: whether it is significant."""
        compared = [score for score in self.scores if score.difference is not None]
        lines = []
        for score in compared:
            assert score.difference is not None
            told = "differs" if score.difference.distinguishable else "does not differ"
            lines.append(f"{score.task}, {score.metric}: {told} significantly (95 %)")
        if len(compared) > 1:
            lines.append(
                "between equal models, one difference in twenty would be significant by chance"
            )
        return lines

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self.verdicts()])

    def print(self) -> None:
        """Print the table, and which differences are significant."""
        print(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the scores by name, ready for JSON, without the outcome of each document."""
        scores = [asdict(replace(score, outcomes={})) for score in self.scores]
        for score in scores:
            del score["outcomes"]
            if score["difference"] is not None:
                difference = Interval(**score["difference"])
                score["difference"]["distinguishable"] = difference.distinguishable
        return {"scores": scores}

    def to_json(self, file: str | Path | None = None) -> str:
        """Return the scores as JSON, and write it to `file` if one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if file is not None:
            Path(file).write_text(text)
        return text


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[Any],
    *,
    baseline: nn.Module | TaskReport | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    include_path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> TaskReport:
    """Measure `model` on tasks of lm-eval, without changing it.

    Args:
        model: a language model of transformers, compressed, accelerated or neither, where it
            stands: on any device.
        tokenizer: its tokenizer; the baseline's too.
        tasks: names of tasks or groups, or whatever else `lm_eval.simple_evaluate` takes.
        baseline: the original, run on the same documents; or a report on it by this function, with
            the same tasks and limit, so that it need not run again.
        limit: documents of each task, the first of them; below 1 a share; None for all.
        num_fewshot: worked examples before each document; None for what the task says.
        batch_size: sequences in a batch, or `"auto"`.
        include_path: a folder with task files (YAML) besides lm-eval's own.
        options: more arguments of `lm_eval.simple_evaluate`, such as `apply_chat_template`.

    Raises:
        ImportError: if lm-eval is not installed.
        TypeError: if a model is not one of transformers.
        ValueError: if there is no task or tokenizer, the limit is not positive, or the baseline's
            report is of other tasks or documents. lm-eval has errors of its own for tasks it
            does not know, and data that it cannot fetch.

    Example:
        >>> from llmq.integrations import lm_eval
        >>> print(lm_eval.evaluate(model, tokenizer, ["arc_easy"], baseline=original, limit=500))
    """
    simple_evaluate, language_model, task_manager = _library()
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ValueError("tasks is empty; name one, as in ['arc_easy']")
    if tokenizer is None:
        raise ValueError("lm-eval needs the model's tokenizer, got None")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive, or None for all documents, got {limit!r}")
    given = () if baseline is None or isinstance(baseline, TaskReport) else (baseline,)
    for module in (model, *given):
        if not isinstance(module, nn.Module) or not hasattr(module, "config"):
            raise TypeError(
                f"lm-eval takes language models of transformers, got {type(module).__name__}"
            )
    if include_path is not None:
        options["task_manager"] = task_manager(include_path=str(include_path))

    def run(module: nn.Module) -> TaskReport:
        with inference(module):
            # A copy, as lm-eval gives a tokenizer without a padding token one.
            wrapped = language_model(
                pretrained=module, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
            )
            results = simple_evaluate(
                wrapped,
                tasks=names,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=True,
                **options,
            )
        return TaskReport(_scores(results))

    before = baseline if baseline is None or isinstance(baseline, TaskReport) else run(baseline)
    after = run(model)
    return after if before is None else _paired(before, after)


def _library() -> tuple[Any, Any, Any]:
    """Return what is used of lm-eval: `simple_evaluate`, `HFLM` and `TaskManager`."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"tasks run by lm-eval, which is not here ({error}): {EXTRA}") from error
    return simple_evaluate, HFLM, TaskManager


def _scores(results: Mapping[str, Any]) -> list[Score]:
    """Return the scores in what `simple_evaluate` gives."""
    scores = []
    for task, row in results["results"].items():
        parts = _parts(task, results.get("group_subtasks") or {})
        for key, value in row.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = row.get(f"{metric}_stderr,{filtered}")
            outcomes = _outcomes(results["samples"], parts, metric, filtered)
            found = list(outcomes.values())
            # Which tells a mean over documents from other sums of them, such as an F1.
            if not found or not math.isclose(
                sum(found) / len(found), value, rel_tol=1e-6, abs_tol=1e-9
            ):
                outcomes, found = {}, []
            scores.append(
                Score(
                    task,
                    metric if filtered == "none" else f"{metric} ({filtered})",
                    float(value),
                    float(stderr) if _is_number(stderr) else None,
                    sum(results["n-samples"][part]["effective"] for part in parts),
                    _interval(found),
                    outcomes=outcomes,
                )
            )
    return scores


def _parts(task: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks in a group, in groups of it too; a task itself."""
    inside = groups.get(task) or ()
    return [part for name in inside for part in _parts(name, groups)] if inside else [task]


def _outcomes(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    tasks: Sequence[str],
    metric: str,
    filtered: str,
) -> dict[str, float]:
    """Return each document's outcome; none where one is no number."""
    found: dict[str, float] = {}
    for task in tasks:
        for sample in samples.get(task, ()):
            if sample["filter"] != filtered:
                continue
            value = sample.get(metric)
            if not _is_number(value):
                return {}
            assert value is not None
            found[f"{task} {sample['doc_id']} {sample['doc_hash']}"] = float(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _interval(outcomes: Sequence[float], before: Sequence[float] | None = None) -> Interval | None:
    """Return the interval of a mean over documents, or of its difference from that before."""
    if len(outcomes) < 2:
        return None
    ones = [1.0] * len(outcomes)
    right = {*outcomes, *(before or ())} <= {0.0, 1.0}
    if before is None:
        return intervals.share(outcomes, ones) if right else intervals.mean(outcomes, ones)
    if right:
        return intervals.share_difference(before, outcomes, ones)
    return intervals.difference(before, outcomes, ones)


def _paired(before: TaskReport, after: TaskReport) -> TaskReport:
    """Return `after` with the scores of `before` beside its own."""
    originals = {(score.task, score.metric): score for score in before.scores}
    scores = []
    for score in after.scores:
        original = originals.get((score.task, score.metric))
        if original is None or original.documents != score.documents:
            raise ValueError(
                f"the baseline's report has no {score.metric} of {score.task} over "
                f"{score.documents} documents; evaluate it with the same tasks and limit"
            )
        difference = None
        if original.outcomes and score.outcomes:
            if original.outcomes.keys() != score.outcomes.keys():
                raise ValueError(
                    f"the baseline's report is of other documents of {score.task}; evaluate it "
                    f"with the same task, limit and seeds"
                )
            previous = [original.outcomes[document] for document in score.outcomes]
            difference = _interval([*score.outcomes.values()], previous)
        scores.append(
            replace(
                score,
                baseline=original.value,
                baseline_stderr=original.stderr,
                difference=difference,
            )
        )
    return TaskReport(scores)


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
