"""accelerate: the same outputs by one op a layer, on every path, and the model as it was after."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.models import fused_decoder_layer
from llmq.models.accelerate import accelerate, restore
from tests import families

tf = pytest.importorskip("transformers")

LLAMA_LIKE = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
# Rounding moves a code of w8a8's inputs now and then: 1/127 of an input, here of two layers.
LOSS = {"w8a16": 1e-5, "w8a8": 0.02, "w4a8-g32": 0.02}


def _pair(name: str, scheme: str = "w8a16", **options: Any) -> tuple[Any, Any]:
    plain = llmq.quantize(families.make(name), scheme=scheme, **options)
    fast = accelerate(copy.deepcopy(plain))
    assert len(fast.llmq_acceleration.fused) == 2, str(fast.llmq_acceleration)
    return plain, fast


def _ids(tokens: int = 13, batch: int = 2) -> Tensor:
    return torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))


def _assert_same(a: Tensor, b: Tensor, loss: float) -> None:
    assert a.shape == b.shape
    assert (a.double() - b.double()).norm() <= loss * b.double().norm()


class _Calls:
    """Counts the layers that the op runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        run: Callable[..., Any] = fused_decoder_layer.FusedCall.run

        def counted(plan: Any, *args: Any) -> Any:
            output = run(plan, *args)
            self.count += output is not None
            return output

        monkeypatch.setattr(fused_decoder_layer.FusedCall, "run", counted)

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> _Calls:
    return _Calls(monkeypatch)


@pytest.mark.parametrize("scheme", LOSS)
@pytest.mark.parametrize("name", LLAMA_LIKE)
@torch.no_grad()
def test_prefill_decode_and_generate(name: str, scheme: str, calls: _Calls) -> None:
    plain, fast = _pair(name, scheme)
    ids, loss = _ids(), LOSS[scheme]
    calls.take()
    _assert_same(fast(ids, use_cache=False).logits, plain(ids, use_cache=False).logits, loss)
    theirs, ours = plain(ids), fast(ids)
    for step in range(70):  # beyond the room that a cache gets at first
        _assert_same(ours.logits, theirs.logits, loss)
        token = theirs.logits[:, -1:].argmax(-1)
        theirs = plain(token, past_key_values=theirs.past_key_values)
        ours = fast(token, past_key_values=ours.past_key_values)
        assert ours.past_key_values.get_seq_length() == 14 + step
    assert calls.take() == 2 * 72
    for a, b in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        _assert_same(a.keys, b.keys, loss)
        _assert_same(a.values, b.values, loss)
    if scheme == "w8a16":
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(fast.generate(ids, **options), plain.generate(ids, **options))


@torch.no_grad()
def test_whole_models_in_other_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        plain = llmq.quantize(families.make("llama-tied").to(dtype), scheme="w8a8-g64", skip=())
        fast = accelerate(copy.deepcopy(plain))
        assert len(fast.llmq_acceleration.fused) == 2, str(fast.llmq_acceleration)
        _assert_same(fast(_ids()).logits, plain(_ids()).logits, 0.05)


@torch.no_grad()
def test_padding_beams_and_static_caches(calls: _Calls) -> None:
    plain, fast = _pair("qwen2")
    ids = _ids()
    seen = torch.ones_like(ids)
    seen[0, :5] = 0
    calls.take()
    ours, theirs = (m(ids, attention_mask=seen).logits for m in (fast, plain))
    _assert_same(ours[0, 5:], theirs[0, 5:], LOSS["w8a16"])
    _assert_same(ours[1], theirs[1], LOSS["w8a16"])
    assert calls.take() == 2
    for options in (
        {"attention_mask": seen, "max_new_tokens": 6},
        {"num_beams": 3, "max_new_tokens": 6},
        {"cache_implementation": "static", "max_new_tokens": 3, "disable_compile": True},
    ):
        options["do_sample"] = False
        assert torch.equal(fast.generate(ids, **options), plain.generate(ids, **options))


@torch.no_grad()
def test_sliding_windows() -> None:
    config = tf.MistralConfig(**families._LLAMA, sliding_window=5)
    torch.manual_seed(0)
    plain = llmq.quantize(tf.MistralForCausalLM(config).eval(), scheme="w8a16")
    fast = accelerate(copy.deepcopy(plain))
    assert fast.llmq_acceleration.fused
    _assert_same(fast(_ids()).logits, plain(_ids()).logits, LOSS["w8a16"])
    options = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(fast.generate(_ids(4), **options), plain.generate(_ids(4), **options))


@torch.no_grad()
def test_caches_keep_what_was_given_out() -> None:
    plain, fast = _pair("llama")
    ids, more = _ids(), _ids(4)
    cache = fast(ids).past_key_values
    before = cache.layers[0].keys
    kept = before.clone()
    cropped = copy.deepcopy(cache)
    fast(more[:, :1], past_key_values=cache)
    assert torch.equal(before, kept)
    cropped.crop(-3)
    view = cropped.layers[0].keys
    copied = view.clone()
    ours = fast(more[:, :1], past_key_values=cropped).logits
    theirs = plain(ids[:, :-3]).past_key_values
    _assert_same(ours, plain(more[:, :1], past_key_values=theirs).logits, LOSS["w8a16"])
    assert torch.equal(view, copied)
    fast(more[:, 1:2], past_key_values=cache)
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.layers[1].values, cache.layers[1].values)
    cache.crop(-2)
    fast(more[:, 2:3], past_key_values=cache)
    assert torch.equal(before, kept)
    cache.reset()
    assert cache.get_seq_length() == 0
    _assert_same(fast(ids, past_key_values=cache).logits, plain(ids).logits, LOSS["w8a16"])


def test_gradients_training_and_hooks_run_the_model_itself(calls: _Calls) -> None:
    plain, fast = _pair("qwen3")
    ids = _ids()
    calls.take()
    fast(ids, labels=ids).loss.backward()
    assert fast.model.norm.weight.grad is not None
    with torch.no_grad():
        expected = plain(ids).logits
        fast.train()
        fast(ids)
        fast.eval()
        assert calls.take() == 0
        outputs = []
        handle = fast.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda *given: outputs.append(given[2])
        )
        fast(ids)
        assert len(outputs) == 1 and calls.take() == 1
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            fast(ids)
        assert calls.take() == 0
        states = fast(ids, output_hidden_states=True).hidden_states
        assert len(states) == 3 and calls.take() == 2
        fast.set_attn_implementation("eager")
        assert len(fast(ids, output_attentions=True).attentions) == 2 and calls.take() == 0
        _assert_same(fast(ids).logits, expected, LOSS["w8a16"])
        assert calls.take() == 2
        fast.model.layers[1].mlp.up_proj = nn.Linear(64, 128)
        fast(ids)
        assert calls.take() == 1


@torch.no_grad()
def test_compiled() -> None:
    plain, fast = _pair("llama")
    compiled = torch.compile(
        lambda ids: fast(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager"
    )
    _assert_same(compiled(_ids()), plain(_ids()).logits, LOSS["w8a16"])


@torch.no_grad()
def test_nothing_of_the_model_changes(tmp_path: Any) -> None:
    plain, fast = _pair("llama-tied", "w8a8", skip=())
    kinds = [type(m) for m in plain.modules()]
    assert all(isinstance(m, kind) for m, kind in zip(fast.modules(), kinds, strict=True))
    for (name, a), (other, b) in zip(
        fast.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    llmq.save(fast, tmp_path / "saved")
    expected = plain(_ids()).logits
    for other_model in (
        llmq.load(tmp_path / "saved"),
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
    ):
        assert [type(m) for m in other_model.modules()] == kinds
        assert torch.equal(other_model(_ids()).logits, expected)
    first = fast(_ids()).logits
    fast.load_state_dict(fast.state_dict())
    assert torch.equal(fast.to(torch.float32)(_ids()).logits, first)
    restore(accelerate(fast))
    assert [type(m) for m in fast.modules()] == kinds and not hasattr(fast, "llmq_acceleration")
    assert torch.equal(fast(_ids()).logits, expected)


@pytest.mark.parametrize("name", sorted(families.ALL.keys() - set(LLAMA_LIKE)))
def test_other_models_are_left_alone(name: str) -> None:
    model = llmq.quantize(families.make(name), scheme="w8a8")
    expected = families.output(model, name)
    accelerate(model)
    assert not model.llmq_acceleration.fused
    assert torch.equal(families.output(model, name), expected)


def test_reasons_are_given() -> None:
    def reasons(model: Any) -> str:
        return str(accelerate(model).llmq_acceleration)

    assert "q_proj is Linear" in reasons(families.make("llama"))
    quantile = llmq.quantize(families.make("llama"), scheme="w8a16-quantile")
    assert "codebook_linear" in reasons(quantile)
    data: Any = [families.inputs("llama")]
    static = llmq.quantize(families.make("llama"), scheme="w8a8-static", data=data)
    expected = families.output(static, "llama")
    assert "q_proj has a static input scale" in reasons(static)
    assert torch.equal(families.output(static, "llama"), expected)
    odd = llmq.quantize(families.make("llama"), scheme="w8a16")
    odd.model.layers[0].self_attn.scaling = 0.3  # which the op is told
    odd.model.layers[1].mlp.forward = lambda x: x
    assert odd.model.layers[1].mlp(torch.ones(1)) == 1
    report = reasons(odd)
    assert "1 decoder layers run as one op each" in report and "something else" in report
    hooked = llmq.quantize(families.make("llama"), scheme="w8a16")
    hooked.model.layers[0].mlp.register_forward_hook(lambda *given: None)
    assert "hooks" in reasons(hooked)


def test_what_is_no_decoder_and_what_is_no_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    assert accelerate(model) is model and not model.llmq_acceleration.fused
    assert str(model.llmq_acceleration).startswith("nothing to accelerate")
    assert restore(model) is model and not hasattr(model, "llmq_acceleration")
    for verb in (accelerate, restore):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
            verb("smollm2")
