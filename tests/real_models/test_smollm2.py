"""What compression costs a real language model: SmolLM2-135M on technical English."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.commands import demo, smollm2
from llmq.evaluation.evaluate import model_bytes
from llmq.models.accelerate import accelerate
from llmq.nn import CompressedLayer

pytest.importorskip("transformers")
pytest.importorskip("gguf")

# Perplexity may rise by at most this share, data-free and rounded to nearest. One scale a token
# makes w8a8 feel the last bits of torch's own float kernels, by which codes flip: it rises by 2.9 %
# with those for AVX2, 3.2 % with no vectors, 3.9 % with those for AVX-512 on an Emerald Rapids.
ALLOWED = {"w8a16": 0.003, "w8a8-g64": 0.008, "w8a8": 0.045, "w4a16-g32": 0.22}
# A codebook is at least as good as evenly spaced levels of the same bits and groups.
RIVALS = {"w8a16-quantile": "w8a16", "w4a16-quantile-g32": "w4a16-g32"}


@pytest.fixture(scope="module")
def original() -> tuple[Any, Tensor]:
    try:
        model, tokenizer = smollm2.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return model, demo.text_tokens(tokenizer)[0]


@pytest.fixture(scope="module")
def perplexity(original: tuple[Any, Tensor]) -> Callable[[str], float]:
    model, tokens = original
    known: dict[str, float] = {}

    def measured(scheme: str) -> float:
        if scheme not in known:
            compressed = model
            if scheme != "float32":
                compressed = llmq.quantize(copy.deepcopy(model), scheme=scheme)
            result = llmq.evaluate(compressed, tokens).perplexity
            assert result is not None
            known[scheme] = result
        return known[scheme]

    return measured


def test_original_is_read_rightly(perplexity: Callable[[str], float]) -> None:
    assert perplexity("float32") == pytest.approx(14.693, abs=0.01)


@pytest.mark.parametrize("scheme", ALLOWED)
def test_perplexity_stays(scheme: str, perplexity: Callable[[str], float]) -> None:
    assert perplexity(scheme) <= perplexity("float32") * (1 + ALLOWED[scheme])


@pytest.mark.parametrize("scheme", RIVALS)
def test_quantile_is_no_worse_than_uniform(scheme: str, perplexity: Callable[[str], float]) -> None:
    assert perplexity(scheme) <= perplexity(RIVALS[scheme])


def test_what_is_fast_stays_within_a_percent(
    original: tuple[Any, Tensor], perplexity: Callable[[str], float]
) -> None:
    model, tokens = original
    whole = llmq.quantize(copy.deepcopy(model), scheme="w8a8-g64", skip=())
    assert len(accelerate(whole).llmq_acceleration.fused) == 30
    lost = llmq.evaluate(whole, tokens).perplexity
    assert lost is not None and lost <= 1.01 * perplexity("float32")


def _linear_bytes(model: nn.Module) -> int:
    return sum(
        module.bytes()
        if isinstance(module, CompressedLayer)
        else sum(p.numel() * p.element_size() for p in module.parameters())
        for name, module in model.named_modules()
        if name != "lm_head" and isinstance(module, (nn.Linear, CompressedLayer))
    )


def test_bytes(original: tuple[Any, Tensor]) -> None:
    model, tokens = original
    linear, whole = _linear_bytes(model), model_bytes(model)
    assert whole == pytest.approx(538e6, rel=0.01)
    int8 = llmq.quantize(copy.deepcopy(model), scheme="w8a8")
    assert _linear_bytes(int8) <= 0.26 * linear
    sparse = llmq.prune(int8, 0.5)
    assert _linear_bytes(sparse) <= 0.165 * linear
    del int8, sparse
    everything = llmq.quantize(copy.deepcopy(model), scheme="w8a8", skip=())
    assert model_bytes(everything) <= 0.26 * whole
    assert everything.lm_head.weight is everything.model.embed_tokens.weight
    # Embedding and output layer too: still the same model.
    change = llmq.compare(model, everything, tokens[:512])
    assert change.kl is not None
    assert change.kl < 0.1


def test_generates_sense(original: tuple[Any, Tensor]) -> None:
    model, _ = original
    _, tokenizer = smollm2.load()
    compressed = llmq.quantize(copy.deepcopy(model), scheme="w8a8-g64")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        output = compressed.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
