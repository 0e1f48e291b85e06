"""fine_tune: learns, keeps masks and codes, resumes, and undoes itself when it fails."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.formats import codebook, rtn
from llmq.nn import QuantLinear, SparseLinear
from llmq.scheme import PRESETS, Scheme, resolve_scheme
from llmq.training.straight_through import Master

tf = pytest.importorskip("transformers")
SMALL = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SMALL,
    )
    return tf.LlamaForCausalLM(config).eval()


MODELS = {
    "llama": llama,
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, **SMALL)),
    "bert": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=48,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            vocab_size=48,
            decoder_start_token_id=0,
        )
    ),
}
STEPS = {
    "w8a8": lambda m: llmq.quantize(m, scheme="w8a8"),
    "w4a16-g32": lambda m: llmq.quantize(m, scheme="w4a16-g32"),
    "quantile": lambda m: llmq.quantize(m, scheme="w4a16-quantile-g32"),
    "sparse": lambda m: llmq.prune(m, 0.5),
    "sparse-w8a8": lambda m: llmq.quantize(llmq.prune(m, 0.5), scheme="w8a8"),
    "2:4": lambda m: llmq.prune(m, pattern="2:4"),
    "block": lambda m: llmq.prune(m, 0.5, pattern="block-16x16"),
}


def _ids() -> Tensor:
    # Counting modulo 40: learnable in a few steps.
    starts = torch.randint(40, (8, 1), generator=torch.Generator().manual_seed(0))
    return (starts + torch.arange(16)) % 40 + 3


def _batches(name: str) -> list:
    ids = _ids()
    if name == "bert":
        return [{"input_ids": ids, "labels": (ids[:, 0] % 2)}]
    return [{"input_ids": ids, "labels": ids}]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MODELS)
def test_learns_and_stays_compressed(name: str, step: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    skip = ("lm_head",) if hasattr(model, "lm_head") else ("classifier",)
    model = (
        STEPS[step](model)
        if step != "block"
        else llmq.prune(model, 0.5, pattern="block-16x16", skip=skip)
    )
    masks = {n: m.mask() for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    kinds = {n: type(m) for n, m in model.named_modules()}
    before = _state(model)
    history = llmq.fine_tune(model, _batches(name), epochs=30, lr=3e-3)
    assert len(history.losses) == len(history.learning_rates) == 30
    assert history.losses[-1] < 0.8 * history.losses[0]
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert not model.training
    after = _state(model)
    assert before.keys() == after.keys()
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert not _same(before, after)
    for layer, mask in masks.items():
        module = model.get_submodule(layer)
        assert torch.equal(module.mask(), mask), layer
        assert not module.dequantize()[~mask].any(), layer
    assert all(p.grad is None for p in model.parameters())


def test_zeros_survive_saving_and_loading(tmp_path: Path) -> None:
    model = STEPS["sparse-w8a8"](llama())
    llmq.fine_tune(model, [_ids()], steps=5)
    llmq.save(model, tmp_path / "m")
    loaded = llmq.load(tmp_path / "m")
    assert _same(model.state_dict(), loaded.state_dict())
    for module in loaded.modules():
        if isinstance(module, SparseLinear):
            assert int(module.mask().sum()) == module.mask().numel() // 2
            assert not module.dequantize()[~module.mask()].any()


@pytest.mark.parametrize("name", [*PRESETS, "w8a8-tensor", "w8-g16-asym"])
def test_training_rounds_as_encoding_does(name: str) -> None:
    own = {
        "w8a8-tensor": Scheme(granularity="tensor"),
        "w8-g16-asym": Scheme(granularity="group", group_size=16, symmetric=False),
    }
    scheme = own.get(name) or resolve_scheme(name)
    linear = nn.Linear(128, 24)
    static = 0.1 if scheme.activations == "static" else None
    layer = QuantLinear.from_linear(linear, scheme, input_scale=static)
    table = None if layer.weight_codebook is None else layer.weight_codebook.data
    rounded = rtn.fake_quantize(linear.weight.detach(), scheme, table)
    if table is None:
        expected = layer.dequantize()
    else:
        settings = {"granularity": scheme.granularity, "group_size": scheme.group_size}
        encoded = codebook.encode(
            linear.weight.detach(), bits=scheme.bits, **settings, weight_codebook=table
        )
        expected = codebook.decode(*encoded, bits=scheme.bits, K=128)
    torch.testing.assert_close(rounded, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", [None, "w8a8"])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_step_trains_no_weight_that_is_pruned(rank: int | None, scheme: str | None) -> None:
    """What training computes with is the layer that it makes: pruned weights are 0 throughout."""
    torch.manual_seed(0)
    kept = torch.rand(16, 32) < 0.5
    layer = SparseLinear.from_linear(nn.Linear(32, 16), "unstructured", scheme=scheme, mask=kept)
    master = Master(layer, rank)
    optimizer = torch.optim.SGD([p for p in master.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        master(torch.randn(8, 32)).square().sum().backward()
        optimizer.step()
    rounded = master.rounded().detach()
    assert not rounded[~kept].any()
    assert not torch.equal(rounded, layer.dequantize())
    torch.testing.assert_close(rounded, master.encoded().dequantize(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("pattern", [None, "unstructured"])
def test_training_codes_inputs_on_the_static_scale(pattern: str | None, learn_scales: bool) -> None:
    linear = nn.Linear(64, 24)
    given: dict[str, Any] = {"scheme": "w8a8-static", "input_scale": 0.01}
    layer: QuantLinear | SparseLinear = QuantLinear.from_linear(linear, **given)
    if pattern is not None:
        layer = SparseLinear.from_linear(linear, pattern, **given, mask=torch.rand(24, 64) < 0.5)
    master = Master(layer, learn_scales=learn_scales)
    x = torch.randn(50, 64)  # of which a fifth saturate
    # Float32 sums of 64 products in another order.
    torch.testing.assert_close(master(x), layer(x), rtol=1e-4, atol=1e-5)
    again = master.encoded()
    assert again.scheme == layer.scheme
    assert torch.equal(again.input_scale, layer.input_scale)
    torch.testing.assert_close(again(x), layer(x), rtol=1e-4, atol=1e-5)


def test_learns_from_a_teacher_alone() -> None:
    teacher = llama()
    model = llmq.prune(copy.deepcopy(teacher), 0.5)
    batches = [{"input_ids": _ids()}]
    before = llmq.compare(teacher, model, _ids()).kl
    llmq.fine_tune(model, batches, steps=40, lr=1e-3, teacher=teacher)
    after = llmq.compare(teacher, model, _ids()).kl
    assert before is not None
    assert after is not None
    assert after < 0.5 * before


def test_trains_plain_modules_on_pairs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    llmq.quantize(model, scheme="w8a8")
    x = torch.randn(64, 8)
    history = llmq.fine_tune(model, [(x, x[:, :3].argmax(-1))], steps=60, lr=1e-2)
    assert history.losses[-1] < 0.5 * history.losses[0]
    floats = llmq.fine_tune(model, [(x, x[:, :3])], steps=60, lr=1e-2)
    assert floats.losses[-1] < floats.losses[0]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_takes_any_number_of_steps(count: int) -> None:
    model = STEPS["w8a8"](llama())
    history = llmq.fine_tune(model, [_ids(), _ids()[:4], _ids()[0]], steps=count)
    assert len(history.losses) == count
    assert "steps" in str(history)


def test_reads_a_generator_once_for_all_epochs() -> None:
    model = STEPS["w8a8"](llama())
    history = llmq.fine_tune(model, (_ids() for _ in range(2)), epochs=3)
    assert len(history.losses) == 6


class InterruptionError(Exception):
    pass


def _interrupting(count: int):
    class Batches(list):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == count:
                    raise InterruptionError
                yield batch

    return Batches


def test_resumes_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["llmq.training.loop"], "_SAVE_EVERY", 0.0)
    batches = [_ids().roll(i, 1) for i in range(8)]
    whole = STEPS["sparse-w8a8"](llama())
    parted = copy.deepcopy(whole)
    start = _state(parted)
    expected = llmq.fine_tune(whole, batches)
    with pytest.raises(InterruptionError):
        llmq.fine_tune(parted, _interrupting(5)(batches), checkpoint_dir=tmp_path)
    assert _same(_state(parted), start)
    history = llmq.fine_tune(parted, batches, checkpoint_dir=tmp_path)
    assert history.resumed_at == 5
    assert history.losses == expected.losses
    assert _same(_state(parted), _state(whole))
    assert not list(tmp_path.glob("*.safetensors"))


def test_refuses_a_state_of_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setattr(sys.modules["llmq.training.loop"], "_SAVE_EVERY", 0.0)
    model = STEPS["w8a8"](llama())
    batches = [_ids()] * 4
    with pytest.raises(InterruptionError):
        llmq.fine_tune(model, _interrupting(2)(batches), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="another model, data or options"):
        llmq.fine_tune(model, batches, epochs=2, checkpoint_dir=tmp_path)
    (tmp_path / "training.safetensors").write_bytes(b"not this")
    with pytest.raises(ValueError, match="is damaged"):
        llmq.fine_tune(model, batches, checkpoint_dir=tmp_path)


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was() -> None:
    model = STEPS["sparse-w8a8"](llama())
    before = _state(model)
    with pytest.raises(ValueError, match=r"loss is .* at step"):
        llmq.fine_tune(model, [_ids()], steps=200, lr=1e12)
    assert _same(before, _state(model))
    assert all(not isinstance(m, nn.Linear) or n == "lm_head" for n, m in model.named_modules())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"train_data": []}, ValueError, "empty"),
        ({"train_data": "text"}, TypeError, "tokenize"),
        ({"train_data": [3]}, TypeError, "a batch must be"),
        ({"train_data": [torch.zeros(3)]}, ValueError, "token ids"),
        (
            {"train_data": [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}]},
            ValueError,
            "labels",
        ),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer"),
        ({"steps": True}, TypeError, "steps must be an integer"),
        ({"lr": -1.0}, ValueError, "lr must be a positive"),
        ({"lr": math.nan}, ValueError, "lr must be a positive"),
        ({"method": "sgd"}, ValueError, "there is full, lora"),
        ({"model": 3}, TypeError, "torch.nn.Module"),
    ],
    ids=str,
)
def test_refuses_bad_arguments(kwargs: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": STEPS["w8a8"](llama()), "train_data": [_ids()]} | kwargs
    with pytest.raises(error, match=message):
        llmq.fine_tune(**arguments)


def test_refuses_a_model_without_anything_to_train() -> None:
    model = llama().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        llmq.fine_tune(model, [_ids()])


def test_a_frozen_tied_embedding_stays_tied() -> None:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
        **SMALL,
    )
    model = llmq.quantize(tf.LlamaForCausalLM(config).eval(), scheme="w8a8", skip=())
    table = model.model.embed_tokens.state_dict()["weight"].clone()
    llmq.fine_tune(model, [_ids()], steps=3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.state_dict()["weight"], table)
