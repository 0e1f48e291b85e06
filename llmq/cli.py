"""The command `llmq`: reads its options, checks them, and runs a module of `llmq.commands`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import llmq
from llmq.commands import options
from llmq.commands.compress import check as check_compress
from llmq.commands.eval import check as check_eval
from llmq.pruning.method import ALLOCATIONS, METHODS

_CHECKS = {"compress": check_compress, "eval": check_eval}
_MODEL = (
    "a directory saved by llmq or by transformers, a .gguf file, or smollm2 (SmolLM2-135M from its "
    "pip package)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status.

    It is 0 on success, 1 on failure and 2 on a wrong option, each with one line on standard error,
    and 130 on an interrupt.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # after --help, or after an error that is printed
        return int(stop.code or 0)
    try:
        if args.command in _CHECKS:
            try:
                _CHECKS[args.command](args)
            except (ValueError, OSError) as error:
                if _debugs():
                    raise
                return _fail(error, 2)
        if args.quiet:  # before tqdm and transformers are imported, which read these
            os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        return int(import_module(f"llmq.commands.{args.command}").main(args) or 0)
    except KeyboardInterrupt:
        print("llmq: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if _debugs():
            raise
        return _fail(error, 1)


def _debugs() -> bool:
    return os.environ.get("LLMQ_DEBUG") == "1"


def _fail(error: Exception, status: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"llmq: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with one line instead of the whole usage."""
        self.exit(2, f"llmq: {message} ({self.prog} --help lists the options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="llmq",
        description="Make Transformers smaller and faster: quantize, prune, fine-tune, measure.",
        epilog="example:\n  llmq compress MODEL -o small --scheme w8a8-g64\n\n"
        "LLMQ_DEBUG=1 shows tracebacks, LLMQ_PRINT_KERNELS=1 the kernels that run.",
    )
    parser.add_argument("--version", action="version", version=f"llmq {llmq.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    _add_compress(commands)
    _add_eval(commands)
    _add_bench(commands)
    _add_tune(commands)
    _command(
        commands,
        "doctor",
        "show which parts and kernels work on this machine, and why others do not",
        ["llmq doctor"],
        "The exit status is 1 if a required package or the C++ kernels do not work.",
    )
    _add_demo(commands)
    return parser


def _command(commands: Any, name: str, what: str, examples: list[str], more: str = "") -> Any:
    """Add a command with the options that all have."""
    command = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}." + f"\n{more}" * bool(more),
        epilog="\n  ".join(["examples:" if examples[1:] else "example:", *examples]),
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--quiet", action="store_true", help="no progress bars and no notes")
    return command


# An option in a line or two, as in a table.
# fmt: off
def _add_compress(commands: Any) -> None:
    command = _command(
        commands, "compress", "quantize, prune and fine-tune a model, and save it",
        [
            "llmq compress MODEL -o small --scheme w8a8-g64",
            "llmq compress MODEL -o small --scheme w4a16-g32 --algorithm gptq --calibrate text.txt",
            "llmq compress MODEL -o small --prune 50% --scheme w8a8 --calibrate text.txt",
            "llmq compress MODEL -o small --max-ppl-increase 0.5%",
        ],
        "Without a scheme, a pruning rate, a bound or a text to fine-tune on, the scheme is w8a8.",
    )
    command.add_argument("model", help=_MODEL)
    add = command.add_argument_group("output").add_argument
    add("-o", "--output", required=True, type=Path, metavar="DIR",
        help="directory to write; an earlier checkpoint of llmq there is replaced")
    add("--resume", type=Path, metavar="DIR", help="keep finished work in this directory; after an "
        "interruption, the same command goes on from there")
    add = command.add_argument_group("quantization").add_argument
    add("--scheme", type=options.scheme_or_none, help="format of weights and activations: w8a8, "
        "w8a8-g64, w8a8-static, w8a16, w4a16-g32, w4a8-g32 and more; none leaves floating point")
    add("--bits", type=int, choices=(8, 4),
        help="instead of --scheme: pick a scheme of so many bits that suits this machine")
    add("--algorithm", type=options.algorithm, help="how to round: rtn (to nearest; the default), "
        "clip, gptq, smoothquant, awq, or two as in smoothquant+gptq; all but rtn and clip need "
        "--calibrate")
    add("--skip", action="append", metavar="NAME", help="leave layers of this name alone, such as "
        "lm_head or layers.0; may be repeated; the default skips the output embedding, \"\" skips "
        "nothing")
    add = command.add_argument_group("pruning").add_argument
    add("--prune", type=options.rate, metavar="RATE", help="share of weights to drop: 0.5 or 50%%")
    add("--pattern", type=options.pattern, help="sparsity pattern: unstructured (the default), "
        "2:4, block-RxC, structured (heads and MLP channels), layers")
    add("--method", choices=(*METHODS, "influence"), help="how to choose the weights to drop; the "
        "default is sparsegpt with --calibrate, magnitude without, and influence for layers")
    add("--allocation", choices=ALLOCATIONS, help="one rate for all layers (uniform, the default), "
        "or higher rates in less sensitive layers (sensitivity)")
    add = command.add_argument_group("calibration").add_argument
    add("--calibrate", type=Path, metavar="FILE",
        help="calibration text, for methods that look at a layer's inputs")
    add("--windows", type=options.count, metavar="N",
        help="use N windows of 512 tokens, spread evenly over the text (default: 32)")
    bound = command.add_argument_group(
        "choosing a format for each layer under a bound on accuracy",
        "The upper 95 % confidence limit on held-out text stays below the bound.",
    )
    add = bound.add_mutually_exclusive_group().add_argument
    add("--max-ppl-increase", type=options.positive_share, metavar="SHARE",
        help="largest increase of the perplexity: 0.5%% or 0.005")
    add("--max-kl", type=options.positive, metavar="NATS",
        help="largest mean KL divergence to the original, in nats a token")
    add = bound.add_argument
    add("--text", type=Path, metavar="FILE",
        help="text to choose and to check on (default: Python's documentation)")
    add("--tokens", type=options.count, metavar="N",
        help="use at most N tokens of the text (default: 8192)")
    add = command.add_argument_group("fine-tuning").add_argument
    add("--fine-tune", type=Path, metavar="FILE",
        help="text to train on, with the original model as teacher")
    add("--steps", type=options.count, metavar="N",
        help="training steps of 2 x 256 tokens (default: 60)")
    add("--lr", type=options.positive, help="peak learning rate")


def _add_eval(commands: Any) -> None:
    command = _command(
        commands, "eval",
        "measure a model on a text or on lm-eval's tasks, alone or against its original",
        [
            "llmq eval small --text held-out.txt --baseline MODEL --html report.html",
            "llmq eval small --tasks arc_easy,hellaswag --limit 500 --baseline MODEL",
        ],
    )
    add = command.add_argument
    add("model", help=_MODEL)
    add("--baseline", metavar="MODEL", help="compare with this model, the original")
    add = command.add_argument_group("on a text").add_argument
    add("--text", type=Path, metavar="FILE", help="text to measure on")
    add("--tokens", type=options.count, default=4096, metavar="N",
        help="use at most N tokens of the text (default: %(default)s)")
    add("--html", type=Path, metavar="FILE", help="write a report with plots; needs --baseline")
    add = command.add_argument_group("on tasks of lm-eval").add_argument
    add("--tasks", metavar="NAMES", help="task names: arc_easy,hellaswag")
    add("--limit", type=options.count, metavar="N", help="use at most N documents of each task")
    add("--fewshot", type=int, metavar="N", help="solved examples before each document")
    add("--batch-size", type=options.count, metavar="N", help="requests at a time (default: 1)")
    add("--include-path", type=Path, metavar="DIR", help="directory with tasks of your own")


def _add_bench(commands: Any) -> None:
    command = _command(
        commands, "bench",
        "measure the speed of single layers or of a whole model against torch's float32",
        ["llmq bench linear --shape 4096x4096 --tokens 1 --scheme w4a16-g32", "llmq bench model"],
    )
    command.add_argument("what", nargs="?", default="linear", choices=("linear", "model"),
                         help="linear (the default): single layers; model: SmolLM2-135M")
    command.add_argument("--threads", type=options.count, metavar="N", help="threads of torch")
    _add_products(command)


def _add_tune(commands: Any) -> None:
    _add_products(_command(
        commands, "tune", "measure which tile sizes are fastest on this GPU, and keep them",
        ["llmq tune --shape 4096x4096 --tokens 1 --tokens 64 --scheme w8a8"],
    ))


def _add_products(command: Any) -> None:
    add = functools.partial(command.add_argument, action="append")
    add("--shape", type=options.shape, metavar="NxK",
        help="output x input features of a layer; may be repeated")
    add("--tokens", type=options.count, metavar="M", help="tokens in a call; may be repeated")
    add("--scheme", type=options.measured, help="such as w8a8; may be repeated")


def _add_demo(commands: Any) -> None:
    add = _command(
        commands, "demo", "compress SmolLM2-135M in several ways and show size, speed and accuracy",
        ["llmq demo --quick"],
    ).add_argument
    add("--quick", action="store_true", help="fewer models, less text")
    add("--fresh", action="store_true", help="calibrate and train again, even if cached")
    add("-o", "--output", type=Path, default=Path("demo-report"), metavar="DIR",
        help="directory for demo.html and demo.json (default: %(default)s)")
    add("--markdown", action="store_true", help="print the table in Markdown")
# fmt: on


if __name__ == "__main__":
    sys.exit(main())
