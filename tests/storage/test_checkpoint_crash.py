"""A save that is killed, at any step: the old checkpoint is there, or the new one, whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import llmq
from llmq.storage import directory

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

# Forks once a step of saving: the child is killed as it takes that step, the parent looks on.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers, llmq
from llmq.storage import directory

target, way, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if way == "renames":
    directory._exchange = lambda a, b: False

def make(scheme):
    torch.manual_seed(len(scheme))
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, vocab_size=64, bos_token_id=1, eos_token_id=2)
    return llmq.quantize(transformers.LlamaForCausalLM(config).eval(), scheme=scheme)

models = {scheme: make(scheme) for scheme in ("w8a8", "w4a16-g32")}
ids = torch.arange(8)[None]
with torch.inference_mode():
    expected = {scheme: model(ids).logits for scheme, model in models.items()}

def holds():
    with torch.inference_mode():
        logits = llmq.load(target)(ids).logits
    found = [scheme for scheme, y in expected.items() if torch.equal(y, logits)]
    assert len(found) == 1, "a mixture"
    return found[0]

def child(step):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in ("import", "object.__getattr__", "exec", "compile", "marshal.loads"):
            return
        if event.startswith(("os.", "shutil.", "open", "ctypes.call", "fcntl.", "glob.")):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
    if step:
        sys.addaudithook(hook)
    llmq.save(models["w4a16-g32"], target)
    os._exit(0)

outcomes = {"w8a8": 0, "w4a16-g32": 0}
generator = random.Random(seed)
step = 0
while True:
    step += 1
    llmq.save(models["w8a8"], target)
    (target / "tokenizer.json").write_text("{}")
    pid = os.fork()
    if pid == 0:
        try:
            child(0 if way == "delays" else step)
        finally:
            os._exit(9)
    if way == "delays":
        time.sleep(generator.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    outcomes[holds()] += 1
    assert (target / "tokenizer.json").read_text() == "{}"
    if os.WIFEXITED(status) and way != "delays":
        assert os.WEXITSTATUS(status) == 0
        break
    if way == "delays" and step == 40:
        break
llmq.save(models["w8a8"], target)
print(step, outcomes["w8a8"], outcomes["w4a16-g32"], *os.listdir(target.parent))
"""


@pytest.mark.parametrize("way", ["exchange", "renames", "delays"])
def test_killed_at_every_step(way: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "m"), way, "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    steps, old, new, *left = done.stdout.split()
    assert left == ["m"]  # what the killed ones left, the next save swept
    assert int(old) + int(new) == int(steps)
    if way != "delays":
        # It was killed in the middle of much: two files, their syncs, two directories, the swap.
        assert int(steps) > 15
        assert int(old) > 10 and int(new) > 2


def test_a_failed_save_leaves_the_old_one_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import families

    target = tmp_path / "m"
    llmq.save(families.make("llama"), target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        llmq.save(families.make("llama"), target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_a_save_in_progress_is_not_swept_by_another(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with directory.replaced(target, marker="x", ours=("x",)) as folder:
        (folder / "x").write_text("first")
        with directory.replaced(target, marker="x", ours=("x",)) as other:
            (other / "x").write_text("second")
        assert folder.exists()
        assert (target / "x").read_text() == "second"
    assert (target / "x").read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("exchange", [True, False])
def test_links_folders_and_modes_are_carried_over(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(directory, "_exchange", lambda a, b: False)
    real = tmp_path / "real"
    (real / "logs").mkdir(parents=True)
    (real / "x").write_text("old")
    (real / "logs" / "a").write_text("a")
    (real / "link").symlink_to("nowhere")
    real.chmod(0o750)
    link = tmp_path / "m"
    link.symlink_to(real)
    with directory.replaced(link, marker="x", ours=("x",)) as folder:
        (folder / "x").write_text("new")
    assert link.is_symlink() and not real.is_symlink()
    assert (link / "x").read_text() == "new"
    assert (link / "logs" / "a").read_text() == "a"
    assert os.readlink(link / "link") == "nowhere"
    assert real.stat().st_mode & 0o777 == 0o750
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "real"]


def test_a_reader_meets_whole_checkpoints_only(tmp_path: Path) -> None:
    """Another process saves over and over while this one loads."""
    from tests import families

    target = tmp_path / "m"
    models = [families.make("bert"), llmq.quantize(families.make("bert"), scheme="w8a8")]
    expected = [families.output(model, "bert") for model in models]
    llmq.save(models[0], target)
    pid = os.fork()
    if pid == 0:
        try:
            for i in range(10_000):
                llmq.save(models[i % 2], target)
        finally:
            os._exit(1)
    try:
        for _ in range(random.Random(0).randrange(25, 30)):
            found = families.output(llmq.load(target), "bert")
            assert min((found - y).abs().max() for y in expected) == 0
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
