"""llmq.doctor: names every part and its path, says what is missing, and imports nothing heavy."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import llmq
from llmq.commands.doctor import Part
from llmq.runtime import extension
from tests.helpers import PACKAGE, run_python

OPS = ("quantize_activation", "int8_linear", "bitmap_sparse_linear", "block_sparse_linear")


def parts() -> dict[str, Part]:
    return {part.name: part for part in llmq.doctor().parts}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with llmq's Python files alone, as where there was no compiler."""
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "llmq", ignore=ignore)
    return tmp_path


def test_every_part_has_a_name_and_what_is_missing_a_remedy() -> None:
    diagnosis = llmq.doctor()
    names = [part.name for part in diagnosis.parts]
    assert len(set(names)) == len(names)
    assert {"llmq", "python", "torch", "C++ kernels", "transformers", "triton", *OPS} <= {*names}
    for part in diagnosis.parts:
        assert part.found
        assert part.ok or part.remedy, part.name
    assert diagnosis.missing == [part for part in diagnosis.parts if not part.ok]


def test_paths_are_those_of_what_runs() -> None:
    found = parts()
    assert found["llmq"].path == str(PACKAGE)
    assert found["torch"].path == str(Path(torch.__file__).parent)
    assert found["python"].path == sys.executable
    assert found["C++ kernels"].path == str(extension.load().path)
    for part in found.values():
        assert part.path is None or Path(part.path).exists(), part.name


def test_table_and_json_say_the_same() -> None:
    diagnosis = llmq.doctor()
    records = json.loads(diagnosis.to_json())
    assert [Part(**record) for record in records] == diagnosis.parts
    table = str(diagnosis)
    for part in diagnosis.parts:
        assert part.found in table and part.remedy in table and (part.path or "") in table


def test_without_compiled_kernels(source: Path) -> None:
    code = "import llmq; print(llmq.doctor().to_json())"
    found = {part["name"]: part for part in json.loads(run_python(code, source).stdout)}
    assert found["llmq"]["path"] == str(source / "llmq")
    kernels = found["C++ kernels"]
    assert not kernels["ok"] and "no compiled library" in kernels["found"]
    assert "pip install" in kernels["remedy"]
    assert found["instruction set"]["found"].startswith("none")
    for op in OPS:
        assert not found[op]["ok"] and found[op]["found"].startswith("reference")


def test_names_a_compiled_copy_that_is_hidden(source: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site" / "llmq"
    installed.mkdir(parents=True)
    (installed / "_C.abi3.so").write_bytes(b"")
    code = (
        f"import sys; sys.path.append({str(installed.parent)!r}); import llmq; print(llmq.doctor())"
    )
    assert f"{installed / '_C.abi3.so'} is compiled, but" in run_python(code, source).stdout


def test_a_library_that_does_not_load(source: Path) -> None:
    (source / "llmq" / "_C.abi3.so").write_bytes(b"not a library")
    output = run_python("import llmq; print(llmq.doctor())", source).stdout
    assert "_C.abi3.so does not load" in output


def test_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension.load().loaded
    isa = torch.ops.llmq.cpu_isa()
    part = parts()["instruction set"]
    assert part.found.startswith(isa)
    assert f"{isa}" in part.found.partition("runs here: ")[2]
    assert "portable" in part.found.partition("runs here: ")[2]
    monkeypatch.setenv("LLMQ_ISA", isa)
    assert "forced by LLMQ_ISA" in parts()["instruction set"].found
    assert torch.ops.llmq.cpu_isa() == isa  # asking changes nothing


def test_an_instruction_set_that_is_none() -> None:
    code = "import llmq; print(llmq.doctor().to_json())"
    found = {part["name"]: part for part in json.loads(run_python(code, LLMQ_ISA="avx9").stdout)}
    part = found["instruction set"]
    assert not part["ok"] and "avx9" in part["found"]
    assert "unset LLMQ_ISA" in part["remedy"] and "portable" in part["remedy"]
    assert not found["int8_linear"]["ok"]


def test_missing_packages_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = parts()
    assert "pip install 'llmq-kernels[eval]'" in found["gguf"].remedy
    assert "pip install 'llmq-kernels[transformers]'" in found["transformers"].remedy
    assert "apt-get install g++" in found["C++ compiler"].remedy
    assert not found["numpy"].ok and found["numpy"].remedy == "pip install numpy"


def test_imports_nothing_that_it_asks_about() -> None:
    code = (
        "import sys, llmq; before = set(sys.modules); llmq.doctor();"
        "print(sorted(m for m in set(sys.modules) - before if '.' not in m))"
    )
    loaded = run_python(code).stdout
    for package in ("transformers", "triton", "matplotlib", "gguf", "accelerate"):
        assert f"'{package}'" not in loaded
