"""What README, CONTRIBUTING and docs/ name exists, runs, and says what the results say."""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

import llmq
from benchmarks import readme
from llmq import cli, scheme

ROOT = Path(__file__).parent.parent
PAGES = {f"docs/{file.name}": file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))}
DOCS = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")
} | PAGES
MADE = (
    "build/",
    "demo-report/",
    "path/to/",
    "llmq.json",
)  # what commands make, or stands for a user's own
TABLES = [name for name, text in DOCS.items() if "<!-- table" in text]
RUN = [name for name, text in PAGES.items() if "```python" in text]


def quoted(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def commands() -> list[str]:
    lines = []
    for text in DOCS.values():
        lines += quoted(text)
        found = [*blocks(text, ""), *blocks(text, "text")]
        lines += [line for block in found for line in block.splitlines()]
    return [re.split(r"  +#?", line.strip())[0] for line in lines]


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
    assert (paths or name in PAGES) and not missing


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


@pytest.fixture(scope="session")
def user_files(tmp_path_factory):
    """What examples read: a small Llama of random weights with a tokenizer, and two texts."""
    tokenizers = pytest.importorskip("tokenizers")
    tf = pytest.importorskip("transformers")
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("user")
    words = "\n".join(topics.values()).split()
    (folder / "text.txt").write_text(" ".join(words[:1600]))
    (folder / "held-out.txt").write_text(" ".join(words[1600:2400]))
    text = (folder / "text.txt").read_text()
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=120, special_tokens=special)
    raw.train_from_iterator([text], trainer)
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        **dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), special, strict=True)),
    )
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder / "path/to/model")
    tokenizer.save_pretrained(folder / "path/to/model")
    return folder


@pytest.mark.slow
def test_readme_examples_run(user_files, tmp_path, monkeypatch):
    """Each part of a block between empty lines starts from a float model, as the text says."""
    tf = pytest.importorskip("transformers")
    for entry in user_files.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained("path/to/model")
    tokens = torch.tensor(tokenizer(Path("held-out.txt").read_text())["input_ids"])
    for block in blocks(DOCS["README.md"], "python"):
        names = {"llmq": llmq, "tokenizer": tokenizer, "tokens": tokens}
        names["train_data"] = [tokens[None, :64]] * 2
        for part in block.split("\n\n"):
            original = tf.AutoModelForCausalLM.from_pretrained("path/to/model").eval()
            if "model = llmq.load" not in part:
                names["model"] = copy.deepcopy(original)
            names["original"] = original
            exec(part, names)
            assert "llmq.prune" not in part or names["model"].llmq_report.layers


def test_the_chinese_readme_has_the_same_code():
    english, chinese = DOCS["README.md"], (ROOT / "README.zh.md").read_text()
    for language in ("", "python"):
        assert blocks(chinese, language) == blocks(english, language)
    schemes = re.findall(r"`(w\d+a\d+[\w-]*|gptq|llmq\.plan[^`]*)`", chinese)
    assert set(schemes) <= set(quoted(english))


def test_links_to_files_lead_somewhere():
    texts = DOCS | {"README.zh.md": (ROOT / "README.zh.md").read_text()}
    for name, text in texts.items():
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}"


def test_the_readme_is_read_in_a_sitting():
    assert len(DOCS["README.md"].splitlines()) < 200


@pytest.mark.parametrize("name", RUN)
def test_examples_run(name, user_files, tmp_path, monkeypatch):
    for entry in user_files.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for i, block in enumerate(blocks(PAGES[name], "python")):
        exec(compile(block, f"{name}, python block {i + 1}", "exec"), names)


def test_every_page_begins_with_an_example():
    for name, text in PAGES.items():
        if name not in ("docs/contributing.md", "docs/changelog.md"):
            assert "```" in text.split("\n## ")[0], name


def test_schemes_and_variables_exist():
    text = DOCS["README.md"] + DOCS["docs/choosing_a_scheme.md"]
    named = {t for t in quoted(text) if re.fullmatch(r"w\d+a\d+(-\w+)*-g\d+", t)}
    assert named and named <= set(scheme.PRESETS)
    assert set(scheme.PRESETS) <= set(quoted(DOCS["docs/choosing_a_scheme.md"]))
    variables = {v for text in DOCS.values() for v in re.findall(r"\bLLMQ_[A-Z_]+\b(?!\()", text)}
    assert variables <= read_variables()


def read_variables() -> set[str]:
    """Return the environment variables that the package, its kernels and its build read."""
    files = [ROOT / "setup.py"]
    for pattern in ("llmq/**/*.py", "kernels/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h"):
        files += ROOT.glob(pattern)
    found = {v for f in files for v in re.findall(r'"(LLMQ_[A-Z_]+)"', f.read_text())}
    return found | set(re.findall(r"\b(LLMQ_[A-Z_]+)\b", (ROOT / "Makefile").read_text()))


def test_every_environment_variable_has_its_row():
    rows = re.findall(r"^\| `(LLMQ_[A-Z_]+)`", DOCS["docs/environment.md"], re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == read_variables()


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_results(name):
    text = DOCS[name]
    assert text.count("<!-- table") == text.count("<!-- end -->") >= 1
    assert readme.filled(text) == text, "run python -m benchmarks.readme"
