"""What README and CONTRIBUTING name exists, and their tables say what the results say."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import llmq
from benchmarks import readme
from llmq import cli, scheme

ROOT = Path(__file__).parent.parent
DOCS = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
}
MADE = ("build/", "demo-report/", "path/to/")  # what commands make, or stands for a user's own


def quoted(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def commands() -> list[str]:
    lines = []
    for text in DOCS.values():
        lines += quoted(text)
        lines += [line for block in blocks(text, "") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines]


@pytest.mark.parametrize("name", DOCS)
def test_paths_exist(name):
    places = (ROOT, (ROOT / name).parent)
    files = re.findall(r"<!-- table \w+ (\S+) -->", DOCS[name])
    texts = [*quoted(DOCS[name]), *(file for names in files for file in names.split(","))]
    paths = [t for t in texts if re.fullmatch(r"[\w./-]*(/|\.(py|md|h|cpp|json|txt))[\w./-]*", t)]
    missing = [
        path
        for path in paths
        if not path.startswith(MADE) and not any((place / path).exists() for place in places)
    ]
    assert paths and not missing


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {c.split()[1] for c in commands() if re.match(r"make [a-z]+", c)}
    assert named and named <= set(targets)


def test_llmq_commands_parse():
    found = [c for c in commands() if re.match(r"llmq [a-z]+", c)]
    for command in found:
        cli._parser().parse_args(shlex.split(command)[1:])
    assert {c.split()[1] for c in found} >= {"compress", "eval", "bench", "doctor"}


def test_modules_that_are_run_exist():
    modules = {m for c in commands() for m in re.findall(r"python -m ([\w.]+)", c)}
    assert modules and all(importlib.util.find_spec(module) for module in modules)


def test_python_names_exist():
    for block in blocks(DOCS["README.md"], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "llmq":
                assert hasattr(llmq, node.attr), node.attr


def test_schemes_and_variables_exist():
    named = {t for t in quoted(DOCS["README.md"]) if re.fullmatch(r"w\d+a\d+(-\w+)*-g\d+", t)}
    assert named and named <= set(scheme.PRESETS)
    code = "".join(f.read_text() for f in ROOT.glob("llmq/**/*.py"))
    code += "".join(f.read_text() for f in ROOT.glob("csrc/**/*.cpp"))
    variables = {v for text in DOCS.values() for v in re.findall(r"LLMQ_\w+", text)}
    assert all(f'"{variable}"' in code for variable in variables)


def test_tables_are_those_of_the_results():
    text = DOCS["README.md"]
    assert text.count("<!-- table") == text.count("<!-- end -->") >= 1
    assert readme.filled(text) == text, "run python -m benchmarks.readme"
