"""`llmq compress`: prunes, quantizes and fine-tunes a model, and saves it."""

from __future__ import annotations

import copy
import hashlib
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmq
from llmq.commands.open_model import LLMQ_MARKER, check_model, open_model
from llmq.commands.options import check_text, check_writable
from llmq.pruning.method import check_rate, choose_method
from llmq.scheme import Pattern, resolve_scheme
from llmq.storage import directory

_STEPS, _TOKENS, _WINDOWS = 60, 8192, 32


def check(args: Namespace) -> None:
    """Fill in defaults; raise `ValueError` if options do not go together or files are missing."""
    planned = args.max_kl is not None or args.max_ppl_increase is not None
    if planned and (args.scheme is not None or args.prune is not None):
        raise ValueError("a bound chooses the formats itself; leave out --scheme and --prune")
    pruning = ("pattern", "method", "allocation")
    for needed, is_there, options in (
        ("--prune", args.prune is not None, pruning),
        ("--calibrate", args.calibrate is not None, ("windows",)),
        ("--max-kl or --max-ppl-increase", planned, ("text", "tokens")),
        ("--fine-tune", args.fine_tune is not None, ("steps", "lr")),
        ("quantization", not planned and args.scheme != "none", ("algorithm",)),
    ):
        for option in options:
            if getattr(args, option) is not None and not is_there:
                raise ValueError(f"--{option} goes with {needed}")
    if args.scheme is None and args.prune is None and args.fine_tune is None and not planned:
        args.scheme = "w8a8"
    if args.scheme is not None and args.bits is not None:
        raise ValueError("--bits picks a scheme by itself; leave out --scheme or --bits")
    args.pattern = args.pattern or Pattern("unstructured")
    args.allocation = args.allocation or "uniform"
    args.algorithm = args.algorithm or "rtn"
    if args.prune is not None:
        check_rate(args.prune, args.pattern)
    users = _users_of_calibration(args, planned)
    if args.calibrate is None:
        for option, needs in users:
            if needs:
                raise ValueError(f"{option} needs calibration text: add --calibrate FILE")
    elif not users:
        raise ValueError(
            "--calibrate has no use here: it goes with --prune, --algorithm, a static --scheme, or "
            "a bound to choose formats by"
        )
    if args.prune is not None:
        choose_method(args.method, args.pattern, args.allocation, has_data=_prunes_by_data(args))
    if args.resume is not None and not (planned or args.calibrate or args.fine_tune):
        raise ValueError("--resume goes with --calibrate, a bound or --fine-tune")
    if args.resume is not None and args.resume.exists() and not args.resume.is_dir():
        raise ValueError(f"--resume takes a directory; {args.resume} is a file")
    check_model(args.model, needs_tokenizer=planned or bool(args.calibrate or args.fine_tune))
    for option in ("calibrate", "text", "fine_tune"):
        check_text(getattr(args, option), f"--{option.replace('_', '-')}")
    directory.check(args.output.resolve(), marker=LLMQ_MARKER)
    check_writable(args.output, "--output")
    if args.resume is not None:
        check_writable(args.resume, "--resume")


def _users_of_calibration(args: Namespace, planned: bool) -> list[tuple[str, bool]]:
    """Return the options that take calibration text, and whether each cannot go without."""
    users = [("a bound", False)] if planned else []
    if args.prune is not None and (args.method != "magnitude" or args.allocation != "uniform"):
        if args.allocation == "sensitivity":
            users.append(("--allocation sensitivity", True))
        if args.pattern.kind == "layers":
            users.append(("--pattern layers", True))
        users.append((f"--method {args.method}", args.method not in (None, "magnitude")))
    if args.algorithm != "rtn":
        users.append((f"--algorithm {args.algorithm}", args.algorithm != "clip"))
    if _is_static(args):
        users.append((f"--scheme {args.scheme}", True))
    return users


def _is_static(args: Namespace) -> bool:
    if args.scheme in (None, "none"):
        return False
    return resolve_scheme(args.scheme).activations == "static"


def _prunes_by_data(args: Namespace) -> bool:
    measured = args.method != "magnitude" or args.allocation == "sensitivity"
    return args.calibrate is not None and measured


def main(args: Namespace) -> None:
    """Run the command; `check` comes first."""

    def note(text: object) -> None:
        if not args.quiet:
            print(text, file=sys.stderr)

    keep = _keeper(args.resume)
    note(f"opening {args.model}")
    model, tokenizer = open_model(args.model)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    skip = None if args.skip is None else tuple(name for name in args.skip if name)
    teacher, batches = None, []
    if args.fine_tune is not None or args.calibrate is not None:
        from llmq.commands import text
    if args.fine_tune is not None:
        steps = args.steps or _STEPS
        batches = text.training_batches(text.tokens(args.fine_tune, tokenizer), steps)
        teacher = copy.deepcopy(model)
    windows = None
    if args.calibrate is not None:
        windows = text.windows(args.calibrate, tokenizer, args.windows or _WINDOWS)
    if args.prune is not None:
        _prune(args, model, skip, windows, keep)
    if args.max_kl is not None or args.max_ppl_increase is not None:
        _plan(args, model, tokenizer, skip, windows, keep, note)
    elif args.scheme != "none":
        _quantize(args, model, skip, windows, keep)
    if teacher is not None:
        digest = hashlib.sha256(args.fine_tune.read_bytes()).hexdigest()[:8]
        history = llmq.fine_tune(
            model,
            batches,
            steps=len(batches),
            lr=args.lr,
            teacher=teacher,
            checkpoint_dir=keep(f"fine-tune-{digest}"),
        )
        note(history)
    llmq.save(model, args.output)
    if tokenizer is not None:
        tokenizer.save_pretrained(args.output)
    report: Any = model.llmq_report
    print(report.to_json() if args.json else report)
    after = sum(f.stat().st_size for f in args.output.rglob("*.safetensors"))
    note(f"saved to {args.output}: {after / 1e6:.1f} MB of weights, {before / 1e6:.1f} MB before")


def _keeper(folder: Path | None) -> Callable[[str], Path | None]:
    """Return what tells each stage where to keep its work: in `folder`, which is made."""
    if folder is None:
        return lambda stage: None
    folder.mkdir(parents=True, exist_ok=True)
    return lambda stage: folder / stage


def _prune(args: Namespace, model: Any, skip: Any, windows: Any, keep: Any) -> None:
    options: dict[str, Any] = {}
    if _prunes_by_data(args):
        options["data"] = windows
        if args.pattern.kind not in ("structured", "layers"):
            options["resume"] = keep("prune")
    llmq.prune(
        model,
        args.prune,
        pattern=args.pattern.name,
        method=args.method,
        allocation=args.allocation,
        skip=skip,
        **options,
    )


def _quantize(args: Namespace, model: Any, skip: Any, windows: Any, keep: Any) -> None:
    options: dict[str, Any] = {}
    if windows is not None and (args.algorithm != "rtn" or _is_static(args)):
        options = {"data": windows, "resume": keep("quantize")}
    bits = args.bits or 8
    llmq.quantize(model, bits, scheme=args.scheme, algorithm=args.algorithm, skip=skip, **options)


def _plan(
    args: Namespace, model: Any, tokenizer: Any, skip: Any, windows: Any, keep: Any, note: Any
) -> None:
    from llmq.commands import text

    options = {} if windows is None else {"calibration": windows}
    plan = llmq.plan(
        model,
        text.tokens(args.text, tokenizer)[: args.tokens or _TOKENS],
        max_kl=args.max_kl,
        max_perplexity_increase=args.max_ppl_increase,
        skip=skip,
        resume=keep("plan"),
        **options,
    )
    note(plan)
    plan.apply(model)
