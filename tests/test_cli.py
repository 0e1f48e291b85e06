"""The command line: what it prints, what it writes, and the one line it fails with."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq
from llmq import cli
from llmq.commands import compress, demo, doctor, smollm2
from llmq.commands.doctor import Diagnosis, Part
from tests import families

tf = pytest.importorskip("transformers")

COMMANDS = ("compress", "eval", "bench", "tune", "doctor", "demo")
TEXT_FILE = "<text>"
TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps. " * 40


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "llama"
    torch.manual_seed(0)
    families.CAUSAL["llama"]().save_pretrained(folder)
    families.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error of a command, in this process."""
    status = cli.main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def process(*args: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmq.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


NO_TORCH = """
import sys
from llmq import cli
status = cli.main(sys.argv[1:])
heavy = {"torch", "numpy", "transformers", "tqdm"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "compress  quantize, prune and fine-tune"),
        (["--version"], 0, f"llmq {llmq.__version__}"),
        *([[c, "--help"], 0, f"  llmq {c}"] for c in COMMANDS),
        ([], 2, "the following arguments are required: command (llmq --help lists"),
        (["compress", ".", "-o", "out", "--scheme", "w3a8"], 2, "unknown scheme 'w3a8'; presets"),
        (["compress", "nowhere", "-o", "out"], 2, "nowhere does not exist; name a directory"),
        (["eval", ".", "--text", "absent.txt"], 2, "holds no model: neither llmq.json nor"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_help_and_option_errors_import_no_torch(
    arguments: list[str], status: int, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stderr
    if status == 0:
        assert said in done.stdout and done.stderr == ""
    else:
        assert said in done.stderr and done.stdout == ""
        assert done.stderr.startswith("llmq: ") and done.stderr.count("\n") == 1


def test_help_is_written_for_people() -> None:
    """Each option says in words what it does, and each command shows an example that parses."""
    whole = cli._parser()
    for command in COMMANDS:
        parser = whole._subparsers._group_actions[0].choices[command]  # type: ignore
        assert all(action.help for action in parser._actions), command
        examples = [line.split("  ") for line in parser.epilog.splitlines()[1:]]
        assert examples
        for _, example in examples:
            assert whole.parse_args(shlex.split(example)[1:]).command == command


def test_failure_is_one_line_and_a_status(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = process("compress", tmp_path, "-o", tmp_path / "out", "--quiet")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("llmq: ") and done.stderr.count("\n") == 1


def test_debug_shows_the_traceback():
    done = process("compress", "nowhere", "-o", "out", LLMQ_DEBUG="1")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_compress_then_eval_against_the_baseline(capsys, original, text, tmp_path):
    out = tmp_path / "small"
    status, table, _ = run(capsys, "compress", original, "-o", out, "--scheme", "w8a8")
    assert status == 0 and "w8a8" in table and "untouched" in table
    assert (out / "tokenizer.json").exists()

    status, line, _ = run(capsys, "eval", out, "--text", text)
    assert status == 0 and "perplexity" in line

    page = tmp_path / "report.html"
    args = ("eval", out, "--text", text, "--baseline", original, "--html", page, "--json")
    status, output, _ = run(capsys, *args)
    report = json.loads(output)
    assert status == 0 and 0 <= report["kl"] < 0.01
    assert page.read_text().startswith("<!doctype html>")


def test_compress_prunes_and_fine_tunes(capsys, original, text, tmp_path):
    out = tmp_path / "sparse"
    tune = ("--fine-tune", text, "--steps", 2, "--lr", 1e-3)
    prune = ("--prune", 0.5, "--pattern", "2:4", "--scheme", "w8a8", "--json")
    status, output, errors = run(capsys, "compress", original, "-o", out, *prune, *tune)
    assert status == 0 and "2 steps in" in errors
    layers = json.loads(output)["layers"]
    assert {(layer["scheme"], layer["pattern"]) for layer in layers} == {("w8a8", "2:4")}
    assert run(capsys, "eval", out, "--text", text)[0] == 0


def test_compress_within_a_bound_on_perplexity(capsys, original, text, tmp_path):
    out, kept = tmp_path / "planned", tmp_path / "kept"
    bound = ("--max-ppl-increase", "0.5%", "--text", text, "--tokens", 1200, "--resume", kept)
    status, table, errors = run(capsys, "compress", original, "-o", out, *bound)
    assert status == 0 and "untouched" in table
    assert "held-out text: KL" in errors and "bound: perplexity 0.005" in errors
    assert (kept / "plan" / "measurements.safetensors").exists()
    status, output, _ = run(capsys, "eval", out, "--text", text, "--baseline", original)
    assert status == 0 and "significantly from the original" in output


def test_a_bound_takes_the_documentation_of_python(capsys, original, tmp_path):
    bound = ("--max-kl", "1e-3", "--tokens", 1100, "--json")
    status, output, _ = run(capsys, "compress", original, "-o", tmp_path / "planned", *bound)
    assert status == 0 and json.loads(output)["layers"]


def test_an_empty_skip_compresses_the_embeddings_too(capsys, original, tmp_path):
    command = ("compress", original, "-o", tmp_path / "all", "--skip", "", "--json")
    status, output, _ = run(capsys, *command)
    kinds = {layer["kind"] for layer in json.loads(output)["layers"]}
    assert status == 0 and "Embedding" in kinds


CALIBRATED = ("--calibrate", TEXT_FILE)
BAD = [
    (("--scheme", "w3a8"), "unknown scheme 'w3a8'; presets are w8a8"),
    (("--prune", "1.5"), "pruning_rate must be in [0, 1), got 1.5"),
    (("--prune", "half"), "takes a share, say 0.5% or 0.005, got 'half'"),
    (("--prune", "0.4", "--pattern", "2:4"), "its rate is 0.5, got 0.4"),
    (("--prune", "0.5", "--pattern", "stripes"), "unknown pattern 'stripes'"),
    (("--prune", "0.5", "--method", "wish"), "invalid choice: 'wish'"),
    (("--prune", "0.5", "--method", "influence"), "--method influence needs calibration text"),
    (("--prune", "0.5", "--method", "influence", *CALIBRATED), "unknown method 'influence'"),
    (("--prune", "0.5", "--method", "wanda"), "--method wanda needs calibration text"),
    (("--prune", "0.5", "--allocation", "sensitivity"), "--allocation sensitivity needs calibrat"),
    (("--prune", "0.5", "--pattern", "layers"), "--pattern layers needs calibration text"),
    (("--prune", "0.5", "--pattern", "2:4", "--allocation", "sensitivity", *CALIBRATED),
     "pattern 2:4 takes one rate for all layers"),
    (("--pattern", "2:4"), "--pattern goes with --prune"),
    (("--bits", "5"), "invalid choice: 5"),
    (("--bits", "4", "--scheme", "w8a8"), "leave out --scheme or --bits"),
    (("--fine-tune", "absent.txt"), "--fine-tune: absent.txt does not exist"),
    (("--steps", "3"), "--steps goes with --fine-tune"),
    (("--steps", "0"), "takes a positive integer, got '0'"),
    (("--lr", "nan"), "takes a positive number, got 'nan'"),
    (("--scheme", "w8a8", "--max-kl", "0.1"), "leave out --scheme and --prune"),
    (("--max-ppl-increase", "little"), "takes a share, say 0.5% or 0.005, got 'little'"),
    (("--max-kl", "-1"), "takes a positive number, got '-1'"),
    (("--max-kl", "1", "--text", "absent.txt"), "--text: absent.txt does not exist"),
    (("--max-kl", "1", "--algorithm", "gptq"), "--algorithm goes with quantization"),
    (("--text", TEXT_FILE), "--text goes with --max-kl or --max-ppl-increase"),
    (("--scheme", "w8a8-static"), "--scheme w8a8-static needs calibration text"),
    (("--algorithm", "gptq"), "--algorithm gptq needs calibration text: add --calibrate FILE"),
    (("--algorithm", "magic"), "unknown algorithm 'magic'; choose rtn"),
    (("--scheme", "none", "--algorithm", "gptq"), "--algorithm goes with quantization"),
    (CALIBRATED, "--calibrate has no use here"),
    (("--algorithm", "gptq", "--calibrate", "."), "--calibrate: . is a directory; name a text"),
    (("--resume", "x"), "--resume goes with --calibrate, a bound or --fine-tune"),
    (("--fine-tune", TEXT_FILE, "--resume", TEXT_FILE), "--resume takes a directory"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda a: "_".join(a) if isinstance(a, tuple) else ""
)
def test_bad_options_of_compress(capsys, monkeypatch, original, text, tmp_path, arguments, message):
    """All are found before the model is opened."""
    monkeypatch.setattr(compress, "open_model", None)
    out = tmp_path / "out"
    given = [text if a == TEXT_FILE else a for a in arguments]
    status, output, errors = run(capsys, "compress", original, "-o", out, *given)
    assert (status, output) == (2, "")
    assert message in errors and errors.count("\n") == 1
    assert not out.exists()


def test_a_scheme_that_does_not_fit(capsys, original, tmp_path):
    out = tmp_path / "out"
    status, output, errors = run(
        capsys, "compress", original, "-o", out, "--scheme", "w4a16-g128", "--quiet"
    )
    assert (status, output) == (1, "") and not out.exists()
    assert "does not divide its 64 inputs" in errors and errors.count("\n") == 1


def test_output_that_cannot_be_written(capsys, original, text, tmp_path):
    for target in (text / "out", "/proc/out", "/proc/self/a/b"):
        status, output, errors = run(capsys, "compress", original, "-o", target)
        assert (status, output) == (2, "")
        assert f"--output: {target} cannot be written" in errors
    page = ("--baseline", original, "--html", "/proc/page.html")
    status, _, errors = run(capsys, "eval", original, "--text", text, *page)
    assert status == 2 and "--html: /proc/page.html cannot be written" in errors


def test_quiet_leaves_the_result(capsys, monkeypatch, original, tmp_path):
    monkeypatch.setattr(os, "environ", {**os.environ})
    loud = run(capsys, "compress", original, "-o", tmp_path / "out")
    quiet = run(capsys, "compress", original, "-o", tmp_path / "out", "--quiet")
    assert loud[:2] == quiet[:2] and quiet[2] == ""
    assert f"saved to {tmp_path / 'out'}: " in loud[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "holds no model: neither llmq.json nor config.json"),
        (lambda folder: folder.write_text("x"), "is not a model; name a directory or a .gguf file"),
    ],
    ids=["empty directory", "some file"],
)
def test_what_is_no_model(capsys, tmp_path, text, make, message):
    place = tmp_path / "thing"
    make(place)
    status, _, errors = run(capsys, "eval", place, "--text", text)
    assert status == 2 and message in errors


def test_eval_without_tokenizer(capsys, original, text, tmp_path):
    folder = tmp_path / "bare"
    tf.AutoModelForCausalLM.from_pretrained(original).save_pretrained(folder)
    status, _, errors = run(capsys, "eval", folder, "--text", text)
    assert status == 2 and "has no tokenizer" in errors


def test_output_holding_something_else_is_left_alone(capsys, original, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    status, _, errors = run(capsys, "compress", original, "-o", tmp_path)
    assert status == 2 and "holds something else" in errors
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_doctor_fails_if_what_is_needed_does(capsys, monkeypatch):
    parts = [Part("torch", False, "2.1", "pip install torch"), Part("gguf", False, "not installed")]
    for missing, status in ((parts, 1), (parts[1:], 0)):
        monkeypatch.setattr(doctor, "doctor", lambda found=missing: Diagnosis(found))
        assert run(capsys, "doctor", "--json")[0] == status
        found, table, _ = run(capsys, "doctor")
        assert found == status and ("does not work: torch" in table) == bool(status)


def test_doctor_as_table_and_json(capsys):
    status, table, _ = run(capsys, "doctor")
    assert status == 0 and "C++ kernels" in table
    status, output, _ = run(capsys, "doctor", "--json")
    names = [part["name"] for part in json.loads(output)]
    assert status == 0 and "torch" in names


def test_bench_linear(capsys):
    args = ("bench", "linear", "--shape", "48x32", "--tokens", 1, "--scheme", "w8a8")
    status, table, _ = run(capsys, *args)
    assert status == 0 and "48×32" in table and "w8a8" in table
    status, output, _ = run(capsys, *args, "--json")
    record = json.loads(output)
    assert status == 0 and {r["scheme"] for r in record["records"]} == {"float32", "w8a8"}
    assert all(r["microseconds"] > 0 for r in record["records"])


def test_bench_rejects_a_shape(capsys):
    status, _, errors = run(capsys, "bench", "linear", "--shape", "12")
    assert status == 2 and "argument --shape: takes output x input features" in errors


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_demo_writes_table_json_and_page(capsys, original, tmp_path, monkeypatch, quick):
    model = tf.AutoModelForCausalLM.from_pretrained(original).eval()
    monkeypatch.setattr(smollm2, "load", lambda: (model, families.tiny_tokenizer()))
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "EVALUATED", 1024)
    monkeypatch.setattr(demo, "RECIPE", demo.Recipe(steps=2, tokens=64))
    out = tmp_path / "report"
    command = ["demo", *["--quick"] * quick, "-o", out]
    status, table, _ = run(capsys, *command)
    assert status == 0
    names = list(demo.QUICK if quick else demo.FULL)
    assert all(name in table for name in (*names, "prefill tok/s"))

    record = json.loads((out / "demo.json").read_text())
    assert [row["name"] for row in record["rows"]] == names
    assert record["rows"][0]["kl"] == 0 and all(row["perplexity"] > 1 for row in record["rows"])
    if not quick:
        assert record["recovery"]["zeros_kept"]
        assert "2 steps of distillation" in table
    assert set(record["layers"]) == set(names[1:])
    assert len(record["layers"][demo.LINEAR]) == 14  # 2 layers of 7
    assert len(record["layers"][demo.FAST]) > 14

    page = (out / "demo.html").read_text()
    assert "slower than float32" in page or "1.0×" in page
    assert "http-equiv" not in page and 'src="http' not in page

    monkeypatch.setattr(demo, "_pruned", None)  # from the cache: nothing is made again
    status, output, _ = run(capsys, *command, "--markdown")
    assert status == 0 and output.startswith("| model |")


def test_compress_calibrates(
    capsys: pytest.CaptureFixture[str], original: Path, text: Path, tmp_path: Path
) -> None:
    calibrated = ("--calibrate", text, "--windows", 2)
    status, out, err = run(
        capsys,
        *("compress", original, "-o", tmp_path / "small", "--scheme", "w8a8", "--prune", 0.5),
        *("--method", "sparsegpt", "--algorithm", "smoothquant+gptq", *calibrated),
    )
    assert status == 0, err
    assert "smoothquant+gptq, calibrated on 2 batches" in out
    static = ("--scheme", "w8a8-static")
    status, out, err = run(
        capsys, "compress", original, "-o", tmp_path / "static", *static, *calibrated
    )
    assert status == 0 and "w8a8-static" in out, err
    for options, message in (
        (
            ("--prune", 0.5, "--allocation", "sensitivity"),
            "sparsegpt (picked, as there is data), calibrated on 2 batches; 0.5 shared out by",
        ),
        (("--prune", 0.5, "--pattern", "layers"), "layers: model.layers 2 -> 1, without 1 ("),
    ):
        pruning = (*options, *calibrated, "--scheme", "none")
        status, out, err = run(capsys, "compress", original, "-o", tmp_path / "small", *pruning)
        assert status == 0, err
        assert message in out
    kept = tmp_path / "kept"
    bound = ("--max-kl", 0.05, "--text", text, "--tokens", 1100, "--resume", kept, *calibrated)
    status, _, err = run(capsys, "compress", original, "-o", tmp_path / "planned", *bound)
    assert status == 0 and "bound: KL 0.05" in err
    names = [file.name for file in (kept / "plan" / "calibrated").iterdir()]
    assert any("smoothquant+gptq" in name for name in names)
    text_of_few = tmp_path / "few.txt"
    text_of_few.write_text("few words")
    few = ("--algorithm", "gptq", "--calibrate", text_of_few)
    status, _, err = run(capsys, "compress", original, "-o", tmp_path / "none", *few)
    assert status == 1 and "at least 512 tokens" in err


KILLED = """
import os, signal, sys
from llmq.training import loop
from llmq import cli
from llmq.storage import resume
loop._SAVE_EVERY = 0.0
saves = 0

def until_killed(keep):
    def kept(*args, **kwargs):
        global saves
        keep(*args, **kwargs)
        saves += 1
        if saves == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
    return kept

resume.Store.put = until_killed(resume.Store.put)
sys.exit(cli.main(sys.argv[2:]))
"""


def files(folder: Path) -> dict[str, bytes]:
    """What a checkpoint holds, apart from its description, whose layers' errors are sums."""
    return {file.name: file.read_bytes() for file in folder.rglob("*.safetensors")}


def test_a_killed_compress_goes_on_where_it_was(
    capsys: pytest.CaptureFixture[str], original: Path, text: Path, tmp_path: Path
) -> None:
    """Killed in quantization, after pruning, and in training: the same bits as at one go."""
    command = [
        *("compress", original, "--scheme", "w8a8", "--prune", 0.5, "--method", "sparsegpt"),
        *("--algorithm", "gptq", "--calibrate", text, "--windows", 2),
        *("--fine-tune", text, "--steps", 4, "--lr", 1e-3),
    ]
    whole, parted, kept = tmp_path / "whole", tmp_path / "parted", tmp_path / "kept"
    status, _, errors = run(capsys, *command, "-o", whole)
    assert status == 0, errors
    resumed = [*command, "-o", parted, "--resume", kept]
    stages = []
    for saves in (3, 3):  # two blocks are pruned, two quantized, then four steps are trained
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(saves), *map(str, resumed)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not parted.exists()
        stages.append(sorted(p.parent.name[:9] for p in kept.rglob("*.safetensors")))
    assert stages == [
        ["prune", "prune", "quantize"],
        ["fine-tune", "prune", "prune", "quantize", "quantize"],
    ]
    status, _, errors = run(capsys, *resumed)
    assert status == 0 and "4 steps in" in errors and "taken up at 2" in errors
    assert files(parted) == files(whole)

    status, _, errors = run(capsys, *resumed, "--prune", 0.25)
    assert status == 1 and "prune holds work of another model, data or options" in errors
