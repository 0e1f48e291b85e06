"""`llmq eval`: measures a model on a text or on tasks, alone or against its original."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from typing import Any

import llmq
from llmq.commands.open_model import check_model, open_model
from llmq.commands.options import check_text, check_writable


def check(args: Namespace) -> None:
    """Raise `ValueError` if options do not go together or files are missing."""
    if args.text is None and args.tasks is None:
        raise ValueError("name a text to measure on (--text FILE), tasks (--tasks NAMES), or both")
    if args.html is not None and (args.text is None or args.baseline is None):
        raise ValueError("--html goes with --text and --baseline")
    for option in ("limit", "fewshot", "batch_size", "include_path"):
        if getattr(args, option) is not None and args.tasks is None:
            raise ValueError(f"--{option.replace('_', '-')} goes with --tasks")
    missing = sys.modules.get("lm_eval") is None and importlib.util.find_spec("lm_eval") is None
    if args.tasks is not None and missing:
        raise ValueError("--tasks needs lm-eval: pip install 'llmq-kernels[lm-eval]'")
    if args.include_path is not None and not args.include_path.is_dir():
        raise ValueError(f"--include-path: {args.include_path} is not a directory")
    if args.baseline is not None:
        check_model(args.baseline)
    check_model(args.model, needs_tokenizer=args.baseline is None)
    check_text(args.text, "--text")
    if args.html is not None:
        check_writable(args.html, "--html")


def main(args: Namespace) -> None:
    """Run the command; `check` comes first."""
    model, tokenizer = open_model(args.model)
    baseline, other = (None, None) if args.baseline is None else open_model(args.baseline)
    tokenizer = tokenizer if tokenizer is not None else other
    found: dict[str, Any] = {}
    if args.text is not None:
        found["text"] = _on_text(args, model, baseline, tokenizer)
    if args.tasks is not None:
        from llmq.evaluation import lm_eval

        found["tasks"] = lm_eval.evaluate(
            model,
            tokenizer,
            [name for name in args.tasks.split(",") if name],
            baseline=baseline,
            limit=args.limit,
            num_fewshot=args.fewshot,
            batch_size=args.batch_size or 1,
            include_path=args.include_path,
        )
    if args.json:
        records = {name: report.to_dict() for name, report in found.items()}
        print(json.dumps(records if len(records) > 1 else next(iter(records.values())), indent=1))
    else:
        print("\n\n".join(str(report) for report in found.values()))


def _on_text(args: Namespace, model: Any, baseline: Any, tokenizer: Any) -> Any:
    from llmq.commands import text

    tokens = text.tokens(args.text, tokenizer)[: args.tokens]
    if baseline is None:
        return llmq.evaluate(model, tokens)
    report = llmq.compare(baseline, model, tokens)
    if args.html is not None:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        report.to_html(args.html)
    return report
