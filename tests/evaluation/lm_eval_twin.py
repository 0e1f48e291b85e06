"""What llmq uses of lm-eval, as plain as can be, for where it is not installed; and tasks for both.

One sequence at a time, each choice in full: no batches, padding or shared contexts. The tests hold
it against the library where that is installed.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "sleeps",
)
PARTS = ("words_a", "words_b")  # tasks in the group "words"
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_GROUP = """
group: words
task: [words_a, words_b]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
"""


def write_tasks(folder: Path, documents: int = 40) -> Path:
    """Write two tasks and their group: which of four words comes next, of texts of any length."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name in PARTS:
        lines = []
        for _ in range(documents):
            text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
            choices = draw.sample(WORDS, 4)
            lines.append(json.dumps({"text": text, "choices": choices, "gold": draw.randrange(4)}))
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(lines))
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name, file=file))
    (folder / "words.yaml").write_text(_GROUP)
    return folder


class HFLM:
    def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int | str = 1) -> None:
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    @torch.no_grad()
    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Return log p(continuation | context), and whether it is what greedy decoding gives."""
        given = len(self.tokenizer(context)["input_ids"])
        ids = torch.tensor([self.tokenizer(context + continuation)["input_ids"]])
        logits = self.model(input_ids=ids).logits[0, given - 1 : -1].float().log_softmax(-1)
        targets = ids[0, given:]
        chosen = logits.gather(1, targets[:, None]).sum()
        return float(chosen), bool((logits.argmax(-1) == targets).all())


class TaskManager:
    def __init__(self, *, include_path: str) -> None:
        self.folder = Path(include_path)

    def documents(self, task: str) -> list[dict[str, Any]]:
        file = self.folder / f"{task}.jsonl"
        if not file.exists():
            raise KeyError(f"no task {task}")
        return [json.loads(line) for line in file.read_text().splitlines()]


def simple_evaluate(
    model: HFLM,
    *,
    tasks: list[str],
    num_fewshot: int | None,
    limit: int | None,
    log_samples: bool,
    task_manager: TaskManager,
) -> dict[str, Any]:
    assert log_samples and not num_fewshot
    samples: dict[str, list[dict[str, Any]]] = {}
    for task in (part for name in tasks for part in (PARTS if name == "words" else (name,))):
        documents = task_manager.documents(task)[:limit]
        samples[task] = [_sample(model, i, document) for i, document in enumerate(documents)]
    results = {task: _mean(rows, ("acc", "acc_norm")) for task, rows in samples.items()}
    groups = {"words": list(PARTS)} if "words" in tasks else {}
    for group, parts in groups.items():
        results[group] = _mean([row for part in parts for row in samples[part]], ("acc",))
    return {
        "results": results,
        "group_subtasks": groups,
        "n-samples": {task: {"effective": len(rows)} for task, rows in samples.items()},
        "samples": samples,
    }


def _sample(model: HFLM, i: int, document: dict[str, Any]) -> dict[str, Any]:
    responses = [model.loglikelihood(document["text"], f" {c}") for c in document["choices"]]
    sums = torch.tensor([value for value, _ in responses], dtype=torch.float64)
    lengths = torch.tensor([len(choice) for choice in document["choices"]])
    return {
        "doc_id": i,
        "doc": document,
        "doc_hash": hashlib.sha256(json.dumps(document).encode()).hexdigest(),
        "filter": "none",
        "filtered_resps": responses,
        "acc": float(sums.argmax() == document["gold"]),
        "acc_norm": float((sums / lengths).argmax() == document["gold"]),
    }


def _mean(rows: list[dict[str, Any]], metrics: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"alias": "…", "sample_len": len(rows)}
    for metric in metrics:
        values = [row[metric] for row in rows]
        found[f"{metric},none"] = statistics.fmean(values)
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else "N/A"
        found[f"{metric}_stderr,none"] = error
    return found


def modules() -> dict[str, ModuleType]:
    """Return what `sys.modules` holds for the library."""
    made = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.tasks")}
    made["lm_eval.models.huggingface"] = ModuleType("lm_eval.models.huggingface")
    made["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    made["lm_eval.models.huggingface"].HFLM = HFLM  # type: ignore[attr-defined]
    made["lm_eval.tasks"].TaskManager = TaskManager  # type: ignore[attr-defined]
    return made
