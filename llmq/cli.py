"""The command `llmq`: compress, eval, bench, tune, doctor, demo."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Heavy imports stand in the commands: `llmq --help` must not wait for torch.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 with one line on standard error."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("llmq: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("LLMQ_DEBUG") == "1":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"llmq: {message}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmq",
        description="Makes Transformers smaller and faster without losing what they know.",
        epilog="LLMQ_DEBUG=1 shows tracebacks, LLMQ_PRINT_KERNELS=1 the kernels that run.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    model = "a directory (llmq's or transformers'), a .gguf file, or smollm2"

    compress = commands.add_parser("compress", help="quantize, prune and fine-tune a model")
    compress.add_argument("model", help=model)
    compress.add_argument("-o", "--output", required=True, type=Path, metavar="DIR")
    compress.add_argument("--scheme", help="w8a8, w8a8-g64, w8a8-static, w4a16-g32 … or none")
    compress.add_argument("--bits", type=int, default=8, help="8 or 4, where no scheme is named")
    compress.add_argument("--prune", type=float, metavar="RATE", help="share of weights to drop")
    compress.add_argument("--pattern", default="unstructured", help="what --prune keeps to")
    compress.add_argument(
        "--algorithm",
        default="rtn",
        help="rtn, clip, gptq, smoothquant, awq, or both as in smoothquant+gptq",
    )
    compress.add_argument(
        "--method", help="of pruning: magnitude (if none is named), wanda or sparsegpt"
    )
    compress.add_argument(
        "--allocation",
        default="uniform",
        help="of pruning: uniform, or sensitivity for more where it matters less",
    )
    compress.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="text that algorithm, method and static see, or those that a bound chooses among",
    )
    compress.add_argument(
        "--windows", type=int, default=32, help="of 512 tokens of that text, evenly from all of it"
    )
    compress.add_argument("--skip", action="append", metavar="NAME", help='layers; "" for none')
    bound = compress.add_mutually_exclusive_group()
    bound.add_argument(
        "--max-ppl-increase", metavar="SHARE", help="choose a format for each layer: 0.5%% or 0.005"
    )
    bound.add_argument("--max-kl", type=float, metavar="NATS", help="the same, bound by divergence")
    compress.add_argument("--text", type=Path, metavar="FILE", help="to choose on; else Python's")
    compress.add_argument("--tokens", type=int, default=8192, help="of that text, at most")
    compress.add_argument(
        "--resume",
        type=Path,
        metavar="DIR",
        help="keeps what is done of each stage, from which the same command goes on",
    )
    compress.add_argument("--fine-tune", type=Path, metavar="FILE", help="text to recover on")
    compress.add_argument("--steps", type=int, default=60, help="of fine-tuning")
    compress.add_argument("--lr", type=float, help="peak learning rate of fine-tuning")
    compress.add_argument("--json", action="store_true", help="print the report as JSON")
    compress.set_defaults(run=_compress)

    evaluate = commands.add_parser("eval", help="measure a model on a text, or on tasks of lm-eval")
    evaluate.add_argument("model", help=model)
    evaluate.add_argument("--text", type=Path, metavar="FILE")
    evaluate.add_argument("--tasks", metavar="NAMES", help="of lm-eval: arc_easy,hellaswag …")
    evaluate.add_argument("--baseline", metavar="MODEL", help="compare with this original")
    evaluate.add_argument("--tokens", type=int, default=4096, help="of the text, at most")
    evaluate.add_argument("--html", type=Path, metavar="FILE", help="of --text with --baseline")
    evaluate.add_argument("--limit", type=int, metavar="N", help="documents of each task, at most")
    evaluate.add_argument("--fewshot", type=int, metavar="N", help="examples before each document")
    evaluate.add_argument("--batch-size", type=int, default=1, metavar="N", help="of tasks")
    evaluate.add_argument("--include-path", type=Path, metavar="DIR", help="with tasks of your own")
    evaluate.add_argument("--json", action="store_true")
    evaluate.set_defaults(run=_eval)

    bench = commands.add_parser("bench", help="measure the kernels of this machine")
    bench.add_argument("what", nargs="?", default="linear", choices=("linear", "model"))
    bench.add_argument("--threads", type=int, help="of torch")
    bench.add_argument("--shape", action="append", metavar="NxK", help="instead of all shapes")
    bench.add_argument("--tokens", action="append", type=int, metavar="M")
    bench.add_argument("--scheme", action="append")
    bench.add_argument("--json", action="store_true")
    bench.set_defaults(run=_bench)

    tune = commands.add_parser("tune", help="measure which tiles suit this GPU, and keep them")
    tune.add_argument("--shape", action="append", metavar="NxK", help="instead of Llama-3-8B's")
    tune.add_argument("--tokens", action="append", type=int, metavar="M")
    tune.add_argument("--scheme", action="append")
    tune.add_argument("--json", action="store_true")
    tune.set_defaults(run=_tune)

    doctor = commands.add_parser("doctor", help="tell which parts work here, and why others do not")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="compress SmolLM2-135M and show what that gives")
    demo.add_argument("--quick", action="store_true", help="less text, hardly any fine-tuning")
    demo.add_argument("--fresh", action="store_true", help="fine-tune again, cached or not")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo-report"), metavar="DIR")
    form = demo.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true", help="as the table in the README")
    demo.set_defaults(run=_demo)
    return parser


def _compress(args: argparse.Namespace) -> None:
    import llmq
    from llmq.commands.open_model import LLMQ_MARKER, open_model
    from llmq.scheme import resolve_scheme
    from llmq.storage import directory

    planned = args.max_ppl_increase is not None or args.max_kl is not None
    if planned and (args.scheme is not None or args.prune is not None):
        raise ValueError("a bound chooses the formats itself; leave out --scheme and --prune")
    increase = None if args.max_ppl_increase is None else _share(args.max_ppl_increase)
    if args.scheme is None and args.prune is None and args.fine_tune is None and not planned:
        args.scheme = "w8a8"
    directory.check(args.output.resolve(), marker=LLMQ_MARKER)  # before hours of work
    keep = _keeper(args.resume)
    if args.resume is not None and not (planned or args.calibrate or args.fine_tune):
        raise ValueError("--resume goes with --calibrate, a bound or --fine-tune")
    model, tokenizer = open_model(args.model)
    skip = None if args.skip is None else tuple(name for name in args.skip if name)
    teacher = None
    batches: list[Any] = []
    if args.fine_tune is not None:
        import copy

        batches = _training_text(args.fine_tune, tokenizer, args.steps)
        teacher = copy.deepcopy(model)
    prunes: dict[str, Any] = {"method": args.method, "allocation": args.allocation}
    quantizes: dict[str, Any] = {"algorithm": args.algorithm}
    plans: dict[str, Any] = {}
    if args.calibrate is not None:
        windows = _windows(args.calibrate, tokenizer, args.windows)
        measures = args.pattern == "layers" or args.allocation == "sensitivity"
        if args.method not in (None, "magnitude") or measures:
            prunes["data"] = windows
            if args.pattern not in ("structured", "layers"):
                prunes["resume"] = keep("prune")
        static = (
            args.scheme not in (None, "none")
            and resolve_scheme(args.scheme).activations == "static"
        )
        if args.algorithm != "rtn" or static:
            quantizes |= {"data": windows, "resume": keep("quantize")}
        if planned:
            plans["calibration"] = windows
        elif not ("data" in prunes and args.prune is not None) and "data" not in quantizes:
            raise ValueError(
                "--calibrate goes with --algorithm, a static --scheme, --prune and --method, "
                "--allocation or --pattern layers, or a bound to choose by"
            )
    if args.prune is not None:
        llmq.prune(model, args.prune, pattern=args.pattern, skip=skip, **prunes)
    if planned:
        tokens = _tokens(args.text, tokenizer)[: args.tokens]
        plan = llmq.plan(
            model,
            tokens,
            max_kl=args.max_kl,
            max_perplexity_increase=increase,
            skip=skip,
            resume=keep("plan.json"),
            **plans,
        )
        print(plan, file=sys.stderr)
        plan.apply(model)
    elif args.scheme != "none":
        llmq.quantize(model, args.bits, scheme=args.scheme, skip=skip, **quantizes)
    if teacher is not None:
        history = llmq.fine_tune(
            model,
            batches,
            steps=args.steps,
            lr=args.lr,
            teacher=teacher,
            checkpoint_dir=keep(f"fine-tune-{_digest(args.fine_tune)}"),
        )
        print(history, file=sys.stderr)
    llmq.save(model, args.output)
    if tokenizer is not None:
        tokenizer.save_pretrained(args.output)
    report: Any = model.llmq_report
    print(report.to_json() if args.json else report)


def _keeper(folder: Path | None) -> Callable[[str], Path | None]:
    """Return what tells each stage where to keep its work: in `folder`, which is made."""
    if folder is None:
        return lambda stage: None
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --resume takes a directory")
    folder.mkdir(parents=True, exist_ok=True)
    return lambda stage: folder / stage


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


def _training_text(file: Path, tokenizer: Any, steps: int) -> list[Any]:
    from llmq.commands.demo import Recipe, training_batches

    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    tokens = _tokens(file, tokenizer)
    recipe = Recipe(steps=steps)
    if tokens.numel() < recipe.tokens:
        raise ValueError(f"{file} holds {tokens.numel()} tokens; at least {recipe.tokens} would do")
    return training_batches(tokens, recipe)


def _windows(file: Path, tokenizer: Any, count: int) -> list[Any]:
    """Return windows of a file's text to calibrate with, evenly from all of it."""
    from llmq.evaluation.evaluate import WINDOW

    if count < 1:
        raise ValueError(f"--windows must be at least 1, got {count}")
    windows = _tokens(file, tokenizer).split(WINDOW)
    if len(windows[0]) < WINDOW:
        raise ValueError(
            f"{file} holds {len(windows[0])} tokens; at least {WINDOW} would do to calibrate"
        )
    whole = windows if len(windows[-1]) == WINDOW else windows[:-1]
    count = min(count, len(whole))
    return [whole[i * len(whole) // count][None] for i in range(count)]


def _share(text: str) -> float:
    number, percent = (text[:-1], True) if text.endswith("%") else (text, False)
    try:
        return float(number) / (100 if percent else 1)
    except ValueError as error:
        raise ValueError(f"--max-ppl-increase takes 0.5% or 0.005, got {text!r}") from error


def _tokens(file: Path | None, tokenizer: Any) -> Any:
    """Return the token ids of a file's text, of Python's documentation if there is none."""
    import torch

    if tokenizer is None:
        raise ValueError("the model's directory has no tokenizer; copy its tokenizer.json there")
    if file is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    elif not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    else:
        text = file.read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _eval(args: argparse.Namespace) -> None:
    from llmq.commands.open_model import open_model

    if args.text is None and args.tasks is None:
        raise ValueError("name a text to measure on (--text FILE), tasks (--tasks NAMES), or both")
    if args.html is not None and (args.text is None or args.baseline is None):
        raise ValueError("--html goes with --text and --baseline")
    model, tokenizer = open_model(args.model)
    baseline, other = (None, None) if args.baseline is None else open_model(args.baseline)
    tokenizer = tokenizer if tokenizer is not None else other
    found: dict[str, Any] = {}
    if args.text is not None:
        found["text"] = _eval_text(args, model, baseline, tokenizer)
    if args.tasks is not None:
        found["tasks"] = _eval_tasks(args, model, baseline, tokenizer)
    if args.json:
        records = {name: report.to_dict() for name, report in found.items()}
        whole = records if len(records) > 1 else next(iter(records.values()))
        print(json.dumps(whole, indent=1))
        return
    print("\n\n".join(str(report) for report in found.values()))


def _eval_text(args: argparse.Namespace, model: Any, baseline: Any, tokenizer: Any) -> Any:
    import llmq

    tokens = _tokens(args.text, tokenizer)[: args.tokens]
    if baseline is None:
        return llmq.evaluate(model, tokens)
    report = llmq.compare(baseline, model, tokens)
    if args.html is not None:
        report.to_html(args.html)
    return report


def _eval_tasks(args: argparse.Namespace, model: Any, baseline: Any, tokenizer: Any) -> Any:
    from llmq.evaluation import lm_eval

    return lm_eval.evaluate(
        model,
        tokenizer,
        [name for name in args.tasks.split(",") if name],
        baseline=baseline,
        limit=args.limit,
        num_fewshot=args.fewshot,
        batch_size=args.batch_size,
        include_path=args.include_path,
    )


def _bench(args: argparse.Namespace) -> None:
    import torch

    from llmq.commands import bench

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.what == "linear":
        shapes = tuple(_shape(text) for text in args.shape) if args.shape else bench.SHAPES
        tokens = tuple(args.tokens) if args.tokens else bench.TOKENS
        schemes = tuple(args.scheme) if args.scheme else bench.SCHEMES
        records = bench.linear(shapes, tokens, schemes)
        whole = {"machine": bench.machine(), "records": records}
        print(json.dumps(whole, indent=1) if args.json else bench.linear_table(records))
        return
    import copy

    import llmq
    from llmq.commands import smollm2
    from llmq.models.accelerate import accelerate

    original, _ = smollm2.load()
    models: dict[str, Any] = {"float32": original}
    for scheme in args.scheme or ("w8a8", "w8a8-g64", "w8a16", "w4a16-g32", "w4a8-g32"):
        models[scheme] = llmq.quantize(copy.deepcopy(original), scheme=scheme)
        fast = accelerate(copy.deepcopy(models[scheme]))
        if fast.llmq_acceleration.fused:
            models[f"{scheme}, accelerated"] = fast
    speeds = bench.model_speeds(models)
    if args.json:
        print(json.dumps({"machine": bench.machine(), "tokens_per_second": speeds}, indent=1))
        return
    print(f"SmolLM2-135M\n{bench.speed_table(speeds)}")


def _tune(args: argparse.Namespace) -> None:
    from llmq.commands import tune

    shapes = tuple(_shape(text) for text in args.shape) if args.shape else tune.SHAPES
    tuned = tune.tune(shapes, args.tokens or tune.TOKENS, args.scheme or tune.SCHEMES)
    print(json.dumps(tuned.entries, indent=1) if args.json else tuned)


def _shape(text: str) -> tuple[int, int]:
    N, _, K = text.lower().replace("×", "x").partition("x")
    if not (N.isdigit() and K.isdigit() and int(N) and int(K)):
        raise ValueError(f"--shape takes outputs x inputs, say 4096x4096, got {text!r}")
    return int(N), int(K)


def _doctor(args: argparse.Namespace) -> None:
    import llmq

    diagnosis = llmq.doctor()
    print(diagnosis.to_json() if args.json else diagnosis)


def _demo(args: argparse.Namespace) -> None:
    from llmq.commands import demo

    record = demo.run(args.output, quick=args.quick, fresh=args.fresh)
    if args.json:
        print(json.dumps(record, indent=1))
    else:
        print(demo.markdown(record) if args.markdown else demo.table(record))
        print(f"\n{args.output / 'demo.html'} and {args.output / 'demo.json'} hold the rest")


if __name__ == "__main__":
    sys.exit(main())
