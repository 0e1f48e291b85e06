"""evaluate and compare: figures equal to what a few lines of torch give, on any kind of model."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmq
from llmq.evaluation import html
from llmq.evaluation.compare import Report
from llmq.evaluation.evaluate import model_bytes
from llmq.evaluation.layer_errors import LayerError, by_kind

tf = pytest.importorskip("transformers")
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def llama(**more: object) -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **SIZE, num_attention_heads=4, vocab_size=96, bos_token_id=1, eos_token_id=2, **more
    )
    return tf.LlamaForCausalLM(config).eval()


def _tokens(count: int = 1100) -> Tensor:
    return torch.randint(96, (count,), generator=torch.Generator().manual_seed(0))


def test_perplexity_of_running_text() -> None:
    model, tokens = llama(), _tokens()
    metrics = llmq.evaluate(model, tokens)
    nll, count = 0.0, 0
    with torch.inference_mode():
        for window in tokens.split(512):
            logits = model(window[None]).logits[0, :-1]
            nll += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            count += window.numel() - 1
    assert metrics.tokens == count
    assert metrics.nll == pytest.approx(nll / count, rel=1e-5)
    assert metrics.perplexity == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert metrics.tokens_per_second > 0
    assert "perplexity" in str(metrics)
    assert json.loads(json.dumps(metrics.to_dict()))["tokens"] == count


def test_text_with_a_tokenizer_is_the_same_as_its_tokens() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 96 for c in text]}

    text = "The quick brown fox jumps over the lazy dog. " * 5
    expected = llmq.evaluate(llama(), torch.tensor(tokenizer(text)["input_ids"]))
    assert llmq.evaluate(llama(), (text, tokenizer)).nll == pytest.approx(expected.nll)
    assert llmq.evaluate(llama(), ([text], tokenizer)).tokens == expected.tokens


def test_labels_that_do_not_count_are_left_out() -> None:
    model, ids = llama(), _tokens(20)[None]
    labels = ids.clone()
    labels[:, :10] = -100
    metrics = llmq.evaluate(model, [{"input_ids": ids, "labels": labels}])
    assert metrics.tokens == 10


def test_encoder_decoder_labels_are_their_own_positions() -> None:
    torch.manual_seed(0)
    config = tf.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=96,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = tf.T5ForConditionalGeneration(config).eval()
    ids = _tokens(24).reshape(2, 12)
    metrics = llmq.evaluate(model, [{"input_ids": ids, "labels": ids}])
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss
    assert metrics.nll == pytest.approx(float(loss), rel=1e-5)


def test_classifiers_have_accuracy_and_no_perplexity() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(50, 4)
    labels = model(x).argmax(-1)
    labels[:10] = (labels[:10] + 1) % 3
    metrics = llmq.evaluate(model, [(x[:20], labels[:20]), (x[20:], labels[20:])])
    assert metrics.accuracy == pytest.approx(0.8)
    assert metrics.perplexity is None


def test_modes_and_weights_stay() -> None:
    model = llama().train()
    model.model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    llmq.evaluate(model, _tokens(30))
    assert model.training
    assert not model.model.norm.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("skip", [None, ()], ids=["default-skip", "nothing-skipped"])
def test_bytes_are_those_of_a_checkpoint(tied: bool, skip: tuple | None, tmp_path: Path) -> None:
    model = llmq.quantize(llama(tie_word_embeddings=tied), scheme="w8a8", skip=skip)
    llmq.save(model, tmp_path / "m")
    header = 100_000
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size - header < model_bytes(model) <= size


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), ValueError, "empty"),
        (torch.zeros(1, dtype=torch.int64), ValueError, "empty"),
        (torch.zeros(5), TypeError, "token ids"),
        ([], ValueError, "no label"),
        ("text", TypeError, "token ids"),
        ([3], TypeError, "a batch must be"),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.int64)}], ValueError, "no labels"),
    ],
    ids=str,
)
def test_refuses_data_that_it_cannot_measure(
    data: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llmq.evaluate(llama(), data)


def test_compare_with_itself_finds_no_difference() -> None:
    model = llama()
    report = llmq.compare(model, copy.deepcopy(model), _tokens())
    assert report.kl == pytest.approx(0.0, abs=1e-6)
    assert report.agreement == 1.0
    assert report.layers == []


def test_compare_measures_divergence_and_layers() -> None:
    original = llama()
    compressed = llmq.quantize(copy.deepcopy(original), scheme="w4a16-g32")
    tokens = _tokens(600)
    report = llmq.compare(original, compressed, tokens)
    total = 0.0
    with torch.inference_mode():
        for window in tokens.split(512):
            p, q = (m(window[None]).logits[0, :-1].log_softmax(-1) for m in (original, compressed))
            total += float((p.exp() * (p - q)).sum())
    assert report.kl == pytest.approx(total / 598, rel=1e-3)
    assert report.bytes_after < report.bytes_before
    assert len(report.layers) == 14
    assert all(0.005 < layer.output_error < 0.3 for layer in report.layers)
    assert "largest output errors" in str(report)


def test_compare_bare_encoders_by_their_embeddings() -> None:
    torch.manual_seed(0)
    config = tf.BertConfig(**SIZE, num_attention_heads=4, vocab_size=96)
    original = tf.BertModel(config).eval()
    compressed = llmq.quantize(copy.deepcopy(original), scheme="w8a8")
    ids = _tokens(40).reshape(4, 10)
    report = llmq.compare(original, compressed, [{"input_ids": ids}])
    assert report.kl is None
    assert report.original is None
    assert report.cosine is not None
    assert 0.99 < report.cosine < 1.0


class Outside(HTMLParser):
    """Collects what a page would fetch from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("link", "img", "iframe"):
            self.found.append(tag)
        self.found += [v for n, v in attrs if n == "src" and v]


def test_report_is_written_as_json_and_as_one_page(tmp_path: Path) -> None:
    original = llama()
    compressed = llmq.quantize(copy.deepcopy(original), scheme="w8a8")
    report = llmq.compare(original, compressed, _tokens(40))
    assert json.loads(report.to_json(tmp_path / "r.json"))["kl"] == report.kl
    page = report.to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == page
    outside = Outside()
    outside.feed(page)
    assert outside.found == []
    assert page.count("<table") == 3
    assert "14 layers" in page


def test_layers_are_grouped_by_kind_and_depth() -> None:
    errors = {"encoder.block.1.layer.0.q": 0.1, "decoder.block.0.layer.0.q": 0.2, "lm_head": 0.3}
    layers = [LayerError(name, "w8a8", error, "int8") for name, error in errors.items()]
    assert by_kind(layers) == {
        "encoder.block layer.q": {1: 0.1},
        "decoder.block layer.q": {0: 0.2},
        "lm_head": {0: 0.3},
    }
    experts = [LayerError(f"layers.3.experts.{i}.w1", "w8a8", i / 10, "") for i in range(3)]
    assert by_kind(experts) == {"experts.w1": {3: 0.2}}


def test_text_lists_every_layer_on_request() -> None:
    layers = [LayerError(f"layers.{i}.q", "w8a8", i / 100, "int8") for i in range(30)]
    report = Report(None, None, 2, 1, None, None, 0.9, layers)
    assert "layers.1.q" not in str(report)
    assert str(report).count("layers.") == 5
    assert report.text(layers=True).count("layers.") == 30


@pytest.mark.parametrize("low", [-5.0, 0.01, 40.0, 2000.0])
def test_charts_keep_every_point_inside(low: float) -> None:
    points = [html.Point("a <b>", 10, low), html.Point("b", 123, 1900)]
    found = html.scatter(points, "tokens/s", 0.1)
    places = [float(v) for v in re.findall(r"(?:left|bottom):([-0-9.]+)%", found)]
    assert places and all(0 <= place <= 100 for place in places)
    assert "a &lt;b&gt;" in found


def test_bars_say_what_is_slower() -> None:
    found = html.bars("float32", ["float32", "x"], {"prefill": [100, 60]}, "tok/s")
    assert found.count("slower than float32") == 1
    assert html.heat_maps({"": {"q": {0: 0.0}}}, "layer") == ""
