"""What is distributed: files, tags, metadata, and what a build says when something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from llmq import version

ROOT = Path(__file__).resolve().parent.parent
VERSION = version.__version__


def setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution of this tree, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"  # building in place would leave an egg-info among the sources
    ignored = shutil.ignore_patterns(".*cache", ".venv", ".git", "build", "dist", "*.so", "__py*")
    shutil.copytree(ROOT, tree, ignore=ignored)
    result = setup(tree, "sdist", "-d", str(folder))
    assert result.returncode == 0, result.stderr[-2000:]
    with tarfile.open(folder / f"llmq_kernels-{VERSION}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"llmq_kernels-{VERSION}"


def test_a_source_distribution_holds_what_builds_and_tests_it(source: Path) -> None:
    expected = {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "setup.py", "pyproject.toml"}
    for folder in ("csrc", "kernels", "llmq", "tests", "benchmarks", "tools", "docs"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        expected |= {str(path.relative_to(ROOT)) for path in files}
    made = re.compile(r"\.so$|\.py[co]$|__pycache__|_build/|checkpoints|^docs/.*/generated/")
    missing = {name for name in expected if not made.search(name) and not (source / name).exists()}
    assert not missing
    assert not list(source.rglob("*.so"))


@pytest.fixture(scope="module")
def pure_wheel(source: Path) -> zipfile.ZipFile:
    result = setup(source, "bdist_wheel", "-d", str(source / "dist"), LLMQ_KERNELS="0")
    assert result.returncode == 0, result.stderr[-2000:]
    return zipfile.ZipFile(next((source / "dist").glob("*.whl")))


def test_a_wheel_without_kernels_is_tagged_for_any_platform(pure_wheel: zipfile.ZipFile) -> None:
    assert pure_wheel.filename is not None
    assert Path(pure_wheel.filename).name == f"llmq_kernels-{VERSION}-py3-none-any.whl"
    names = set(pure_wheel.namelist())
    packaged = {str(path.relative_to(ROOT)) for path in (ROOT / "llmq").rglob("*.py")}
    packaged |= {f"llmq_kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    packaged |= {"llmq/py.typed"}
    assert packaged <= names
    assert {name.split("/")[0] for name in names} == {
        "llmq",
        "llmq_kernels",
        f"llmq_kernels-{VERSION}.dist-info",
    }


def test_metadata(pure_wheel: zipfile.ZipFile) -> None:
    text = pure_wheel.read(f"llmq_kernels-{VERSION}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Version"] == VERSION
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert "torch>=2.10" in metadata.get_all("Requires-Dist", [])
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata.get_all("Project-URL") and metadata["Keywords"]


def test_the_changelog_begins_with_this_version_or_what_comes_next() -> None:
    heads = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert VERSION in heads[:2]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"LLMQ_TORCH": "/nowhere"}, "no torch 2.10 or later .*/nowhere.*Install torch"),
        ({"CXX": "no-such-compiler"}, "no working C.*tried no-such-compiler.*apt-get install g"),
    ],
    ids=["torch", "compiler"],
)
def test_a_build_names_what_is_missing(
    source: Path, environment: dict[str, str], said: str
) -> None:
    result = setup(source, "build_ext", **environment)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(f"llmq: {said}.*LLMQ_KERNELS=0", last), result.stderr[-2000:]
    assert "Traceback" not in result.stderr
