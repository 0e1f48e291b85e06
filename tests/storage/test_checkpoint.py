"""save and load: bit for bit, whole or not at all, and never by trusting a file."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import llmq
from llmq.nn import CompressedLayer
from llmq.storage.checkpoint import TENSORS
from llmq.storage.description import DESCRIPTION, digest

tf = pytest.importorskip("transformers")

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "bert": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=96,
        )
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=96,
            decoder_start_token_id=0,
        )
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=4)),
}  # fmt: skip
STEPS = {
    "as-it-is": lambda m: m,
    "w8a8": lambda m: llmq.quantize(m, scheme="w8a8"),
    "static": lambda m: llmq.quantize(
        m, scheme="w8a8-static", algorithm="clip", data=[_inputs(m)], skip=()
    ),
    "static-sparse": lambda m: llmq.prune(
        llmq.quantize(m, scheme="w8a8-static", data=[_inputs(m)]), 0.5
    ),
    "everything": lambda m: llmq.quantize(m, scheme="w8a8", skip=()),
    "w4a16-g32": lambda m: llmq.quantize(m, scheme="w4a16-g32"),
    "quantile": lambda m: llmq.quantize(m, scheme="w8a16-quantile"),
    "sparse": lambda m: llmq.prune(m, 0.5),
    "sparse-w8a8": lambda m: llmq.quantize(llmq.prune(m, 0.5), scheme="w8a8"),
    "2:4-w8a8": lambda m: llmq.prune(llmq.quantize(m, scheme="w8a8"), pattern="2:4"),
    "block": lambda m: llmq.prune(
        m, 0.5, pattern="block-16x16", skip=tuple({"classifier", "lm_head"} & {*m._modules})
    ),
    "structured-w8a8": lambda m: llmq.quantize(
        llmq.prune(m, 0.5, pattern="structured"), scheme="w8a8"
    ),
}  # fmt: skip


def _model(name: str = "llama", step: str = "w8a8") -> nn.Module:
    torch.manual_seed(0)
    return STEPS[step](MODELS[name]().eval())


def _inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(20).remainder(96).reshape(2, 10)
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    )


def _output(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(**_inputs(model)).logits


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MODELS)
def test_comes_back_bit_for_bit(name: str, step: str, tmp_path: Path) -> None:
    model = _model(name, step)
    llmq.save(model, tmp_path / "m")
    loaded = llmq.load(tmp_path / "m")
    assert torch.equal(_output(model), _output(loaded))
    assert not loaded.training
    left, right = model.state_dict(), loaded.state_dict()
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key
    kinds = [type(m) for m in model.modules() if isinstance(m, CompressedLayer)]
    assert kinds == [type(m) for m in loaded.modules() if isinstance(m, CompressedLayer)]
    if step != "as-it-is":
        assert str(loaded.llmq_report) == str(model.llmq_report)
    assert {p.name for p in (tmp_path / "m").iterdir()} == {TENSORS, DESCRIPTION}


def test_tied_tensors_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    model = _model("llama-tied", "everything")
    llmq.save(model, tmp_path / "m")
    loaded = llmq.load(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    size = (tmp_path / "m" / TENSORS).stat().st_size
    tensors = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert size < tensors - 96 * 64 + 50_000
    assert (
        llmq.evaluate(loaded, torch.arange(30)).bytes
        == llmq.evaluate(model, torch.arange(30)).bytes
    )


def test_generates_after_loading(tmp_path: Path) -> None:
    model = _model("llama", "structured-w8a8")
    llmq.save(model, tmp_path / "m")
    loaded = llmq.load(tmp_path / "m")
    ids = torch.tensor([[1, 5, 7]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_replaces_its_own_and_keeps_files_of_others(tmp_path: Path) -> None:
    target = tmp_path / "m"
    llmq.save(_model(step="w8a8"), target)
    (target / "tokenizer.json").write_text("{}")
    model = _model(step="w4a16-g32")
    llmq.save(model, target)
    assert torch.equal(_output(llmq.load(target)), _output(model))
    assert (target / "tokenizer.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_refuses_to_replace_anything_else(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        llmq.save(_model(), tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        llmq.save(_model(), tmp_path / "photo.jpg")
    assert (tmp_path / "photo.jpg").read_text() == "x"


def test_refuses_models_that_it_could_not_rebuild(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state_dict"):
        llmq.save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


SAVER = """
import sys, torch, transformers, llmq
torch.manual_seed(int(sys.argv[2]))
config = transformers.LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=4, vocab_size=1000, bos_token_id=1, eos_token_id=2)
model = llmq.quantize(transformers.LlamaForCausalLM(config).eval(), scheme="w8a8")
print("ready", flush=True)
while True:
    llmq.save(model, sys.argv[1])
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "m"
    generator = random.Random(0)
    for seed in range(2):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(target), str(seed)], stdout=subprocess.PIPE
        )
        assert saver.stdout is not None
        assert saver.stdout.readline() == b"ready\n"
        if seed == 0:
            while not target.exists():
                time.sleep(0.01)
        time.sleep(0.3 * generator.random())
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        model = llmq.load(target)
        assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()


@pytest.mark.parametrize("at", ["first", "second", "third"])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_crash_between_renames_is_undone(
    at: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmq.storage import directory

    target = tmp_path / "m"
    old, new = _model(step="w8a8"), _model(step="w4a16-g32")
    llmq.save(old, target)
    rename, count = os.rename, iter(range(10))
    crash_at = ("first", "second", "third").index(at)

    def crashing(*args: object) -> None:
        if next(count) == crash_at:
            raise KeyboardInterrupt
        rename(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        if not exchange:
            patch.setattr(directory, "_exchange", lambda a, b: False)
        patch.setattr(os, "rename", crashing)
        patch.setattr(directory.shutil, "rmtree", lambda *a, **k: None)  # as after a kill
        try:
            llmq.save(new, target)
        except KeyboardInterrupt:
            assert not exchange
    loaded = _output(llmq.load(target))
    assert torch.equal(loaded, _output(old)) or torch.equal(loaded, _output(new))
    llmq.save(new, target)
    assert torch.equal(_output(llmq.load(target)), _output(new))


# -- hostile files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "m"
    llmq.save(_model(), folder)
    return folder


def _copied(saved: Path, target: Path) -> Path:
    target.mkdir()
    for file in saved.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def _described(folder: Path, **changes: object) -> None:
    """Change the description as someone would who also knows how to renew its checksum."""
    description = json.loads((folder / DESCRIPTION).read_text()) | changes
    description["sha256"] = digest(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))


def test_missing_directories_and_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no llmq checkpoint"):
        llmq.load(tmp_path / "nowhere")
    for name in (TENSORS, DESCRIPTION):
        folder = _copied(saved, tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match="missing"):
            llmq.load(folder)


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(name: str, share: float, saved: Path, tmp_path: Path) -> None:
    folder = _copied(saved, tmp_path / "m")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=name):
        llmq.load(folder)


def test_altered_bytes(saved: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    folder = _copied(saved, tmp_path / "m")
    for name in (TENSORS, DESCRIPTION):
        original = (folder / name).read_bytes()
        for _ in range(40):
            content = bytearray(original)
            place = generator.randrange(len(content))
            content[place] ^= 1 << generator.randrange(8)
            (folder / name).write_bytes(content)
            try:
                altered = json.loads(content) != json.loads(original)
            except ValueError:
                altered = True
            if altered:
                with pytest.raises(ValueError, match=name):
                    llmq.load(folder)
        (folder / name).write_bytes(original)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"format_version": None}, "format version None"),
        ({"architecture": "os.system"}, "no model class"),
        ({"architecture": "pipeline"}, "no model class"),
        ({"architecture": "AutoModel"}, "no model class"),
        ({"architecture": None}, "no model class"),
        ({"config": 3}, "describes no model"),
        (
            {"config": {"hidden_size": -1}},
            "describes no model|do not belong|divide|positive|negative",
        ),
        ({"layers": {"model.nothing.here": {}}}, "describes no model|layer"),
        ({"layers": {}}, "do not belong together"),
        ({"aliases": {"lm_head.weight": "no.such"}}, "missing tensor"),
        ({"module_attributes": {"model": {"forward": "x"}}}, "integers"),
        ({"tensors_sha256": "0" * 64}, "truncated or altered"),
    ],
    ids=str,
)
def test_lying_descriptions(changes: dict, message: str, saved: Path, tmp_path: Path) -> None:
    folder = _copied(saved, tmp_path / "m")
    _described(folder, **changes)
    with pytest.raises(ValueError, match=message):
        llmq.load(folder)


def test_layers_that_lie_about_their_shapes(saved: Path, tmp_path: Path) -> None:
    folder = _copied(saved, tmp_path / "m")
    layers = json.loads((folder / DESCRIPTION).read_text())["layers"]
    layers[next(iter(layers))]["shapes"]["weight"] = [1 << 40, 1 << 40]
    _described(folder, layers=layers)
    with pytest.raises(ValueError, match="other shapes"):
        llmq.load(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"a": 1}', b"\xff\xfe", b"[" * 100_000])
def test_foreign_descriptions(content: bytes, saved: Path, tmp_path: Path) -> None:
    folder = _copied(saved, tmp_path / "m")
    (folder / DESCRIPTION).write_bytes(content)
    with pytest.raises(ValueError, match=DESCRIPTION):
        llmq.load(folder)


def test_nothing_is_unpickled(saved: Path, tmp_path: Path) -> None:
    folder = _copied(saved, tmp_path / "m")
    torch.save({"weight": torch.zeros(1)}, folder / TENSORS)
    with pytest.raises(ValueError, match="truncated or altered"):
        llmq.load(folder)
