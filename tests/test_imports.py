"""Who imports whom: never up the order of layers, and nothing optional before it is needed."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llmq
from tests.helpers import PACKAGE, run_python

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}

# From bottom to top: a package may import from its own line and those above it here.
ORDER = (
    "version",
    "scheme",
    "formats",
    "runtime",
    "ops",
    "nn",
    "report",
    "models",
    "storage",
    "evaluation",
    "calibrate",
    "pruning",
    "quantization",
    "training",
    "planner",
    "commands",
    "cli",
)
# The names of the public API, gathered; only what stands on top of the verbs may ask there.
TOP = ("cli", "commands")
CORE = {"torch", "numpy", "safetensors", "tqdm"}
OPTIONAL = (
    *("transformers", "triton", "matplotlib", "gguf", "accelerate", "lm_eval", "datasets"),
    "llmq_kernels",
)


def rank(module: str) -> int:
    """The line of ORDER that `module` stands in."""
    return ORDER.index(module.split(".")[1])


def imports(file: Path) -> Iterator[tuple[str, int, bool]]:
    """Give each imported module as (name, line, whether importing `file` imports it too)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) not in later
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                name = full if full in MODULES else node.module
                yield name, node.lineno, id(node) not in later


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "llmq"])
def test_nothing_imports_from_above(module: str) -> None:
    own = rank(module)
    for name, line, _ in imports(MODULES[module]):
        if name == "llmq":
            assert ORDER[own] in TOP, f"{MODULES[module]}:{line} imports the whole of llmq"
        elif name.startswith("llmq."):
            assert name in MODULES, f"{MODULES[module]}:{line} imports {name}, which is not there"
            assert rank(name) <= own, f"{MODULES[module]}:{line} imports {name}, which is above it"


def test_the_order_names_what_there_is() -> None:
    assert set(ORDER) == {name.split(".")[1] for name in MODULES if name != "llmq"}


def test_contributing_shows_the_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    chain = text[text.index("cli → commands") :].split("```")[0]
    assert tuple(chain.replace("→", " ").split()[::-1]) == ORDER[1:]


@pytest.mark.parametrize("module", MODULES)
def test_only_the_core_is_imported_at_once(module: str) -> None:
    for name, line, at_once in imports(MODULES[module]):
        top = name.partition(".")[0]
        if at_once and top not in sys.stdlib_module_names and top != "llmq":
            assert top in CORE, (
                f"{MODULES[module]}:{line} imports {top}; import it where it is used"
            )


def test_gpu_kernels_import_torch_and_triton_only() -> None:
    for file in (ROOT / "kernels").glob("**/*.py"):
        for name, line, _ in imports(file):
            top = name.partition(".")[0]
            known = top in sys.stdlib_module_names or top in ("torch", "triton", "llmq_kernels")
            assert known, f"{file}:{line} imports {name}"


def test_import_loads_nothing_optional(record_property: pytest.FixtureRequest) -> None:
    code = """
import json, sys, time
import llmq
assert "torch" not in sys.modules
import torch
before = set(sys.modules)
events = []
sys.addaudithook(lambda event, args: events.append(event))
start = time.perf_counter()
assert llmq.formats.uniform.quantize  # which loads everything that `llmq` names
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "modules": sorted(set(sys.modules) - before),
    "processes": sum(e in ("subprocess.Popen", "os.system", "os.exec", "os.fork") for e in events),
}))
"""
    found = json.loads(run_python(code).stdout)
    record_property("import_llmq_seconds", found["seconds"])  # type: ignore[operator]
    print(f"import llmq: {found['seconds']:.3f} s beyond import torch")
    assert found["processes"] == 0  # nothing is compiled
    loaded = {name.partition(".")[0] for name in found["modules"]}
    assert loaded.isdisjoint({*OPTIONAL, "scipy", "pandas", "sklearn", "IPython", "hypothesis"})
    assert not {"torch._dynamo", "torch._inductor", "torch.onnx"} & set(found["modules"])


def test_names_are_loaded_when_they_are_used() -> None:
    """Every public name is there, by any road, and a pickle needs no import before it."""
    layer = pickle.dumps(llmq.QuantLinear.from_linear(torch.nn.Linear(8, 4), "w8a8"))
    code = f"""
import pickle, sys
import llmq
assert set(llmq.__all__) <= set(dir(llmq)) and "torch" not in sys.modules
try:
    llmq.quantise
except AttributeError as error:
    assert "no attribute 'quantise'" in str(error)
assert llmq.Scheme(bits=8).name == "w8a16" and "torch" not in sys.modules
layer = pickle.loads({layer!r})
assert type(layer) is llmq.QuantLinear and llmq.nn.QuantLinear is llmq.QuantLinear
from llmq import *
assert quantize is llmq.quantize and accelerate is llmq.accelerate
"""
    run_python(code)
    typed = (PACKAGE / "__init__.py").read_text()
    assert set(re.findall(r"import (\w+) as \1$", typed, re.M)) == {*llmq.__all__} - {"__version__"}


def test_the_version_is_that_of_the_package() -> None:
    assert 'attr = "llmq.version.__version__"' in (ROOT / "pyproject.toml").read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", llmq.__version__)
    newest = re.search(r"^## \[(\d\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None and newest[1] == llmq.__version__


def test_works_with_the_core_alone(tmp_path: Path) -> None:
    """Without transformers, Triton and the compiled library, every verb runs its reference."""
    shutil.copytree(PACKAGE, tmp_path / "llmq", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {(*OPTIONAL, "pytest_benchmark")!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import torch
import llmq
from llmq.runtime import extension
assert not extension.load().loaded
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 8))
x = torch.randn(4, 32)
y = model(x)
llmq.quantize(model, scheme="w8a8", skip=())
assert torch.nn.functional.cosine_similarity(y.flatten(), model(x).flatten(), dim=0) > 0.99
llmq.prune(model, 0.5)
assert torch.isfinite(model(x)).all()
assert [layer.kernel for layer in model.llmq_report.layers] == ["reference"] * 2
try:
    llmq.save(model, "saved")
except TypeError as error:
    assert "state_dict" in str(error)
found = {{part.name: part for part in llmq.doctor().parts}}
assert not found["transformers"].ok and "pip install" in found["transformers"].remedy
assert not found["C++ kernels"].ok
print("done")
"""
    assert run_python(code, tmp_path).stdout.endswith("done\n")
