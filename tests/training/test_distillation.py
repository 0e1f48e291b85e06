"""fine_tune beyond the plain loop: low-rank updates, learned scales, teachers, validation."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmq
from llmq.nn import QuantLinear, SparseLinear
from llmq.scheme import Scheme
from llmq.training.losses import Teacher, loss_of
from llmq.training.straight_through import Master
from tests import families
from tests.helpers import assert_equal, assert_raises, generator

tf = pytest.importorskip("transformers")


def llama(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def ids(rows: int = 8, seed: int = 0) -> Tensor:
    # Counting modulo 40: learnable in a few steps.
    starts = torch.randint(40, (rows, 1), generator=generator(seed))
    return (starts + torch.arange(16)) % 40 + 3


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


LAYERS = {
    "w8a8": lambda m: QuantLinear.from_linear(m, "w8a8"),
    "w8a8-g64": lambda m: QuantLinear.from_linear(m, "w8a8-g64"),
    "w4a16-g32": lambda m: QuantLinear.from_linear(m, "w4a16-g32"),
    "w4-symmetric": lambda m: QuantLinear.from_linear(
        m, Scheme(bits=4, granularity="group", group_size=32)
    ),
    "asymmetric": lambda m: QuantLinear.from_linear(m, Scheme(symmetric=False)),
    "quantile": lambda m: QuantLinear.from_linear(m, "w4a16-quantile-g32"),
    "sparse": lambda m: SparseLinear.from_linear(m, mask=m.weight.abs() > 0.05),
    "sparse w8a8": lambda m: SparseLinear.from_linear(m, scheme="w8a8", mask=m.weight.abs() > 0.05),
}


def _linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 24)


@pytest.mark.parametrize("scales", [False, True], ids=["fresh-scales", "learned-scales"])
@pytest.mark.parametrize("rank", [None, 3], ids=["full", "lora"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_coded_is_what_was_trained(name: str, rank: int | None, scales: bool) -> None:
    layer = LAYERS[name](_linear())
    if scales and name == "quantile":
        assert_raises(
            lambda: Master(layer, rank, learn_scales=True), ValueError, "no scales to learn"
        )
        return
    master = Master(layer, rank, learn_scales=scales, generator=generator(0))
    start = master.rounded()
    torch.testing.assert_close(start, layer.dequantize(), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        for parameter in (p for p in master.parameters() if p.requires_grad):
            update = 0.05 * torch.randn(parameter.shape, generator=generator(1))
            if parameter is master.weight and master.mask is not None:
                update *= master.mask
            parameter += update
    x = torch.randn(5, 64, generator=generator(2))
    merged = master.encoded()
    assert type(merged) is type(layer)
    torch.testing.assert_close(master.rounded(), merged.dequantize(), rtol=1e-6, atol=1e-7)
    assert float((merged.dequantize() - layer.dequantize()).norm()) > 0.1
    # Dot products of 64 terms, in other orders; 8-bit activations are rounded alike.
    torch.testing.assert_close(master(x), merged(x), rtol=2e-5, atol=2e-5)
    if isinstance(layer, SparseLinear):
        assert_equal(merged.mask(), layer.mask())
        assert not merged.dequantize()[~layer.mask()].any()
    master.write(layer)
    assert same(state(layer), state(merged))


def test_learned_scales_have_the_published_gradient() -> None:
    layer = QuantLinear.from_linear(_linear(), "w4a16-g32")
    master = Master(layer, learn_scales=True)
    scale, zero = layer.weight_scale.data, layer.canonical()["weight_zero_point"].float()
    with torch.no_grad():
        master.weight += 0.1 * torch.randn(24, 64, generator=generator(3))
    master.rounded().sum().backward()
    w = master.weight.detach().unflatten(1, (2, 32))
    steps = w / layer.canonical()["weight_scale"][..., None]
    low, high = -zero[..., None], 15 - zero[..., None]
    inside = (steps.round() >= low) & (steps.round() <= high)
    # Esser et al., eq. 3: round(v) − v inside, the end of the range outside; here times the scale,
    # as its logarithm is what trains.
    slope = torch.where(inside, steps.round() - steps, steps.round().clamp(low, high))
    expected = slope.sum(-1) * layer.canonical()["weight_scale"]
    assert master.log_factor is not None
    assert not inside.all()
    torch.testing.assert_close(master.log_factor.grad, expected, rtol=1e-4, atol=1e-5)
    assert_equal(master.weight.grad, inside.float().flatten(1))
    assert scale is not None


def test_learned_scales_find_a_better_grid() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=False)
    linear.weight.data[:, 0] = 0.4  # an outlier in each output, of an input that is always zero
    x = torch.randn(256, 64)
    x[:, 0] = 0
    data = [(x, linear(x).detach())]
    losses = []
    for learn in (False, True):
        model = nn.Sequential(copy.deepcopy(linear))
        llmq.quantize(model, scheme=Scheme(bits=4, granularity="channel"), skip=())
        llmq.fine_tune(model, data, steps=300, lr=5e-3, learn_scales=learn)
        losses.append(float(F.mse_loss(model(x), data[0][1])))
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("step", ["w8a8", "w4a16-g32", "sparse-w8a8", "float"])
def test_lora_trains_linear_layers_and_nothing_else(step: str) -> None:
    model = llama()
    if step == "sparse-w8a8":
        llmq.quantize(llmq.prune(model, 0.5), scheme="w8a8")
    elif step != "float":
        llmq.quantize(model, scheme=step)
    before = state(model)
    masks = {n: m.mask() for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    wants = [p.requires_grad for p in model.parameters()]
    history = llmq.fine_tune(model, [ids()], steps=40, method="lora", rank=4, lr=2e-2)
    assert history.losses[-1] < 0.9 * history.losses[0]
    after = state(model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved
    assert all("_proj" in name and "bias" not in name for name in moved)
    assert [p.requires_grad for p in model.parameters()] == wants
    for name, mask in masks.items():
        assert_equal(model.get_submodule(name).mask(), mask)
    if step == "float":
        for name in moved:
            rank = int(torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-3))
            assert 1 <= rank <= 4


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["float", "w8a8"])
def test_what_fails_leaves_the_model_as_it_was(kind: str, method: str) -> None:
    model = llmq.prune(llama(), 0.5)
    if kind != "float":
        llmq.quantize(model, scheme=kind)
    before, wants = state(model), [p.requires_grad for p in model.parameters()]
    batches = _Breaking([ids(4, seed) for seed in range(8)])
    with pytest.raises(InterruptionError):
        llmq.fine_tune(model, batches, method=method, lr=0.1)
    assert same(before, state(model))
    assert [p.requires_grad for p in model.parameters()] == wants


# -- teachers --------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_its_parts() -> None:
    teacher, student = llama(), llmq.prune(llama(), 0.5)
    batch = ids()
    with torch.no_grad():
        own = float(loss_of(student, batch, None))
        kl = float(loss_of(student, batch, Teacher(teacher, 1.0)))
        mixed = float(loss_of(student, batch, Teacher(teacher, 0.3, 2.0)))
        outputs = [m(batch, output_hidden_states=True) for m in (teacher, student)]
    asked, given = (o.hidden_states for o in outputs)
    hidden = sum(
        float((g - a).square().sum() / a.square().sum()) for g, a in zip(given, asked, strict=True)
    ) / len(given)
    p, q = (o.logits.log_softmax(-1) for o in outputs)
    assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert mixed == pytest.approx(0.7 * own + 0.3 * kl + 2.0 * hidden, rel=1e-4)
    with torch.no_grad():
        assert float(loss_of(teacher, batch, Teacher(teacher, 1.0, 1.0))) == pytest.approx(0)


@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_teacher_has_labels_only_where_its_decoder_reads_them(seq2seq: bool) -> None:
    teacher = families.SEQ2SEQ["t5"]().eval() if seq2seq else llama()
    student, seen = copy.deepcopy(teacher), []
    teacher.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append({*kwargs}), with_kwargs=True
    )
    batch = {"input_ids": ids(4), "labels": ids(4, 1)}
    loss_of(student, batch, Teacher(teacher))
    assert ["labels" in names for names in seen] == [seq2seq]


def test_padding_teaches_nothing() -> None:
    torch.manual_seed(0)
    teacher, student = (families.SEQ2SEQ["t5"]().eval() for _ in range(2))
    short = {"input_ids": ids(4), "labels": ids(4, 1)}
    padded = dict(short, labels=F.pad(short["labels"], (0, 5), value=-100))
    of = Teacher(teacher, 1.0)
    with torch.no_grad():
        assert float(loss_of(student, padded, of)) == pytest.approx(
            float(loss_of(student, short, of)), rel=1e-4
        )


def test_a_shallow_student_matches_layers_evenly_and_learns() -> None:
    teacher = llama(4)
    llmq.fine_tune(teacher, [ids()], steps=30, lr=3e-3)
    student = llama(2)
    data = [{"input_ids": ids(8, seed)} for seed in range(4)]
    before = llmq.compare(teacher, student, ids(4, 9)).kl
    llmq.fine_tune(student, data, steps=60, lr=3e-3, teacher=teacher, hidden_weight=1.0)
    after = llmq.compare(teacher, student, ids(4, 9)).kl
    assert before is not None
    assert after is not None
    assert after < 0.3 * before
    with torch.no_grad():
        asked, given = (
            m(ids(), output_hidden_states=True).hidden_states for m in (teacher, student)
        )
        even = sum(
            float((given[i] - asked[2 * i]).square().sum() / asked[2 * i].square().sum())
            for i in range(3)
        )
        found = loss_of(student, {"input_ids": ids()}, Teacher(teacher, 1.0, 3.0))
        alone = loss_of(student, {"input_ids": ids()}, Teacher(teacher, 1.0, 0.0))
    assert float(found - alone) == pytest.approx(even, rel=1e-4)


# -- the loop --------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_large_batch() -> None:
    whole, parts = (llmq.quantize(llama(), scheme="w8a8") for _ in range(2))
    llmq.fine_tune(whole, [ids(8)], steps=3, lr=1e-3)
    history = llmq.fine_tune(parts, [ids(8)[:4], ids(8)[4:]], steps=3, lr=1e-3, accumulate=2)
    assert len(history.losses) == 3
    for name, tensor in state(whole).items():
        # Adam divides by the gradient's own size, so that rounding in tiny ones shows.
        assert float((tensor.float() - state(parts)[name].float()).abs().mean()) < 1e-2, name
    assert len(llmq.fine_tune(parts, [ids()] * 5, accumulate=2).losses) == 3


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_recomputing_blocks_changes_nothing(family: str) -> None:
    torch.manual_seed(0)
    make = {**families.CAUSAL, **families.SEQ2SEQ}[family]
    model = llmq.quantize(make().eval(), scheme="w8a8")
    again = copy.deepcopy(model)
    batch = {"input_ids": ids(), "labels": ids(8, 1)}
    blocks = {n: 0 for n, m in again.named_modules() if n.endswith((".layers.0", ".block.0"))}
    for name in blocks:

        def count(_m: nn.Module, _i: object, name: str = name) -> None:
            blocks[name] += 1

        inner = next(
            m for n, m in again.named_modules() if n.startswith(f"{name}.") and "norm" in n
        )
        inner.register_forward_pre_hook(count)
    torch.manual_seed(1)
    plain = llmq.fine_tune(model, [batch], steps=3)
    torch.manual_seed(1)
    recomputed = llmq.fine_tune(again, [batch], steps=3, gradient_checkpointing=True)
    assert recomputed.losses == plain.losses
    assert same(state(model), state(again))
    assert blocks
    assert all(calls == 6 for calls in blocks.values())


def test_bfloat16_learns_alike() -> None:
    models = [llmq.quantize(llama(), scheme="w8a8") for _ in range(2)]
    plain, mixed = (
        llmq.fine_tune(m, [ids()], steps=30, lr=3e-3, dtype=dtype)
        for m, dtype in zip(models, (None, torch.bfloat16), strict=True)
    )
    assert mixed.losses[0] == pytest.approx(plain.losses[0], rel=0.01)
    assert mixed.losses != plain.losses
    assert mixed.losses[-1] == pytest.approx(plain.losses[-1], rel=0.1)
    assert all(t.dtype != torch.bfloat16 for t in state(models[1]).values())


def test_the_best_parameters_are_kept() -> None:
    model = llmq.quantize(llama(), scheme="w8a8")
    held = ids(4, 5)
    history = llmq.fine_tune(model, [ids()], steps=40, lr=3e-3, validation=[held], validate_every=7)
    assert [step for step, _ in history.validation] == [0, 7, 14, 21, 28, 35, 40]
    best = min(history.validation, key=lambda entry: entry[1])
    assert best[0] == history.best_step
    with torch.no_grad():
        assert float(loss_of(model, held, None)) == pytest.approx(best[1], rel=1e-4)
    assert "validation" in str(history)


def test_training_that_never_helps_leaves_the_model_as_it_was() -> None:
    model = llama()
    llmq.fine_tune(model, [ids()], steps=60, lr=3e-3)
    before = state(model)
    noise = torch.randint(48, (8, 16), generator=generator(0))
    history = llmq.fine_tune(model, [noise], steps=10, lr=1e-2, validation=[ids()])
    assert history.best_step == 0
    assert same(before, state(model))


class InterruptionError(Exception):
    pass


class _Breaking(list):
    def __iter__(self):
        for i, batch in enumerate(super().__iter__()):
            if i == 5:
                raise InterruptionError
            yield batch


def test_the_best_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["llmq.training.loop"], "_SAVE_EVERY", 0.0)
    batches = [ids(4, seed) for seed in range(8)]
    whole, parted = (llmq.quantize(llama(), scheme="w8a8") for _ in range(2))
    kind = {"validation": [ids(4, 50)], "validate_every": 2, "method": "lora"}
    expected = llmq.fine_tune(whole, batches, **kind)
    with pytest.raises(InterruptionError):
        llmq.fine_tune(parted, _Breaking(batches), checkpoint_dir=tmp_path, **kind)
    history = llmq.fine_tune(parted, batches, checkpoint_dir=tmp_path, **kind)
    assert history.resumed_at == 5
    assert history.validation == expected.validation
    assert history.best_step == expected.best_step
    assert same(state(parted), state(whole))


def test_an_interruption_from_the_keyboard_loses_no_step(tmp_path: Path) -> None:
    class Stopped(list):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == 3:
                    raise KeyboardInterrupt
                yield batch

    batches = [ids(4, seed) for seed in range(5)]
    model = llmq.quantize(llama(), scheme="w8a8")
    with pytest.raises(KeyboardInterrupt):
        llmq.fine_tune(model, Stopped(batches), checkpoint_dir=tmp_path)
    assert llmq.fine_tune(model, batches, checkpoint_dir=tmp_path).resumed_at == 3


def test_an_interruption_loses_no_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    module = sys.modules["llmq.training.loop"]
    genuine, calls = module._validate, []

    def stopped(*args: object) -> float:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return genuine(*args)

    monkeypatch.setattr(module, "_validate", stopped)
    model = llmq.quantize(llama(), scheme="w8a8")
    kind = {"validation": [ids(4, 9)], "validate_every": 2, "checkpoint_dir": tmp_path}
    batches = [ids(4, seed) for seed in range(6)]
    with pytest.raises(KeyboardInterrupt):
        llmq.fine_tune(model, batches, **kind)
    history = llmq.fine_tune(model, batches, **kind)
    assert history.resumed_at == 2
    assert [step for step, _ in history.validation] == [0, 2, 4, 6]


def test_padding_of_a_bare_encoder_teaches_nothing() -> None:
    torch.manual_seed(0)
    teacher, student = (families.ENCODERS["bert"]().eval() for _ in range(2))
    short = {"input_ids": ids(4), "attention_mask": torch.ones(4, 16, dtype=torch.int64)}
    padded = {name: F.pad(tensor, (0, 5)) for name, tensor in short.items()}
    of = Teacher(teacher, 1.0, 1.0)
    with torch.no_grad():
        expected = float(loss_of(student, short, of))
        assert expected > 0
        assert float(loss_of(student, padded, of)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"accumulate": 1.5}, TypeError, "accumulate must be an integer"),
        ({"teacher_weight": 1.5}, ValueError, "teacher_weight must be at most 1"),
        ({"teacher_weight": -1}, ValueError, "teacher_weight must be a number of 0"),
        ({"hidden_weight": math.nan}, ValueError, "hidden_weight must be at most inf"),
        ({"hidden_weight": 1.0}, ValueError, "needs a teacher"),
        ({"dtype": torch.float16}, ValueError, "torch.bfloat16"),
        ({"validation": []}, ValueError, "validation is empty"),
        ({"validation": "text"}, TypeError, "validation must be an iterable"),
        ({"learn_scales": True}, ValueError, "no scales to learn"),
    ],
    ids=str,
)
def test_refuses_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    model = llmq.quantize(llama(), scheme="w8a16-quantile")
    assert_raises(lambda: llmq.fine_tune(model, [ids()], **arguments), error, message)


def test_refuses_a_teacher_of_another_width() -> None:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    other = tf.LlamaForCausalLM(config)
    assert_raises(
        lambda: llmq.fine_tune(llama(), [ids()], teacher=other, hidden_weight=1.0),
        ValueError,
        "one hidden size",
    )
    assert llmq.fine_tune(llama(), [ids()], teacher=other).losses
