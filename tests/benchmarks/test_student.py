"""Students: fewer layers of the same model, whole in themselves, that learn from their teacher."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmq
from benchmarks.student import make_student
from llmq.calibrate.data import calls_of
from llmq.models.blocks import running
from llmq.pruning.depth import influences
from tests import families
from tests.helpers import assert_raises, generator

tf = pytest.importorskip("transformers")

DEEP = {**families.CAUSAL, **families.ENCODERS, **families.SEQ2SEQ}
NAMES = (
    *("llama-tied", "gpt2", "opt", "gemma2", "qwen3", "mixtral", "bert", "distilbert"),
    *("t5", "bart", "switch"),
)


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (rows, length), generator=generator(seed))


def model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return DEEP[family]().eval()


def deep_llama(layers: int = 6) -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # so that outputs depend on the layers
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return made


def run(made: Any, ids: Tensor) -> Tensor:
    seq2seq = made.config.is_encoder_decoder
    with torch.inference_mode():
        output = made(input_ids=ids, labels=ids) if seq2seq else made(input_ids=ids)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("family", NAMES)
def test_a_student_is_a_model_of_its_own(family: str, tmp_path: Path) -> None:
    teacher = model(family)
    before = run(teacher, tokens())
    student: Any = make_student(teacher, 1)
    assert sum(p.numel() for p in student.parameters()) < sum(
        p.numel() for p in teacher.parameters()
    )
    found = run(student, tokens())
    assert found.shape == before.shape
    assert not torch.equal(found, before)
    assert torch.equal(run(teacher, tokens()), before)
    llmq.save(student, tmp_path / "m")
    assert torch.equal(run(llmq.load(tmp_path / "m"), tokens()), found)
    if hasattr(student, "generate") and student.can_generate():
        written = student.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False)
        assert written.shape[0] == 2
        again = student.generate(
            input_ids=tokens(), max_new_tokens=5, do_sample=False, use_cache=False
        )
        assert torch.equal(written, again)


def test_a_student_computes_what_its_layers_do() -> None:
    teacher: Any = deep_llama(4)
    student = make_student(teacher, 2)  # the first and the last
    ids = tokens()
    inner = teacher.model.layers
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for i in (1, 2):
            stack.enter_context(running(inner[i], lambda h, *_a, **_k: h))
        expected = teacher(ids).logits
    assert torch.equal(run(student, ids), expected)


@pytest.mark.parametrize(
    ("layers", "kept"), [(1, [0]), (2, [0, 5]), (3, [0, 3, 5]), (5, [0, 1, 3, 4, 5])]
)
def test_layers_are_taken_evenly(layers: int, kept: list[int]) -> None:
    teacher: Any = deep_llama()
    student: Any = make_student(teacher, layers)
    for i, of in enumerate(kept):
        left = student.model.layers[i].mlp.up_proj.weight
        assert torch.equal(left, teacher.model.layers[of].mlp.up_proj.weight)
        assert left is not teacher.model.layers[of].mlp.up_proj.weight
        assert student.model.layers[i].self_attn.layer_idx == i
    assert student.config.num_hidden_layers == layers


def test_data_tells_which_layers_hardly_matter() -> None:
    teacher: Any = deep_llama()
    with torch.no_grad():
        for i in (2, 3):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                teacher.model.layers[i].get_submodule(name).weight.mul_(1e-3)
    data = [tokens(2, 30, seed) for seed in range(3)]
    found = influences(teacher, calls_of(teacher, data))
    assert set(sorted(found, key=found.__getitem__)[:2]) == {"model.layers.2", "model.layers.3"}
    # Of a layer in the middle, by hand.
    with torch.inference_mode():
        states = [teacher(ids, output_hidden_states=True).hidden_states for ids in data]
    cosines = torch.cat([nn.functional.cosine_similarity(s[4], s[5], dim=-1) for s in states])
    assert found["model.layers.4"] == pytest.approx(1 - float(cosines.mean()), rel=1e-3)
    student = make_student(teacher, 4, data=data)
    assert llmq.compare(teacher, student, data).kl < 1e-3
    even = make_student(teacher, 4)
    assert llmq.compare(teacher, even, data).kl > 10 * llmq.compare(teacher, student, data).kl


def test_a_student_learns_from_its_teacher_and_can_be_compressed() -> None:
    teacher = deep_llama()
    starts = torch.randint(100, (8, 1), generator=generator(0))
    ids = (starts + torch.arange(16)) % 100 + 3
    llmq.fine_tune(teacher, [ids], steps=30, lr=3e-3)
    student = make_student(teacher, 3)
    before = llmq.compare(teacher, student, ids).kl
    alone = {"teacher_weight": 1.0, "hidden_weight": 0.5}
    llmq.fine_tune(student, [ids], steps=60, lr=3e-3, teacher=teacher, **alone)
    after = llmq.compare(teacher, student, ids).kl
    assert before is not None
    assert after is not None
    assert after < 0.3 * before
    small = llmq.quantize(copy.deepcopy(student), scheme="w8a8")
    assert llmq.compare(student, small, ids).kl < 0.1


def test_refuses_what_it_cannot_make() -> None:
    teacher = deep_llama(2)
    for layers in (0, 2, 3):
        assert_raises(lambda n=layers: make_student(teacher, n), ValueError, "layers must be 1 … 1")
    assert_raises(lambda: make_student(teacher, 1.5), TypeError, "must be an integer")
    assert_raises(lambda: make_student(model("albert"), 1), ValueError, "has no list of layers")
    assert_raises(lambda: make_student(nn.Linear(4, 4), 1), ValueError, "has no list of layers")
