"""One linear layer a case, torch's float32 beside ours: pytest-benchmark over shapes and tokens.

    python -m pytest benchmarks/micro.py --benchmark-group-by=group --benchmark-json=micro.json

`llmq bench linear` measures the same layers interleaved in one loop, which is steadier where the
clock wanders; this one gives percentiles, and compares saved runs (`--benchmark-compare`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llmq import bench

SHAPES = ((576, 576), (1536, 576), (768, 3072), (4096, 4096))
TOKENS = (1, 16, 256)


@pytest.fixture(scope="module")
def dense(request: pytest.FixtureRequest) -> nn.Linear:
    N, K = request.param
    torch.manual_seed(0)
    return nn.Linear(K, N)


@pytest.mark.parametrize("scheme", ["float32", *bench.SCHEMES])
@pytest.mark.parametrize("M", TOKENS, ids="M={}".format)
@pytest.mark.parametrize("dense", SHAPES, ids=lambda shape: "{}x{}".format(*shape), indirect=True)
def test_linear(benchmark: Any, dense: nn.Linear, M: int, scheme: str) -> None:
    N, K = dense.weight.shape
    layer: Any = dense if scheme == "float32" else bench.make_layer(dense, scheme)
    benchmark.group = f"{N}x{K}, M={M}"
    kernel = "torch" if scheme == "float32" else layer.kernel(M).name
    benchmark.extra_info.update(bench.machine(), kernel=kernel)
    x = torch.randn(M, K)
    with torch.inference_mode():
        benchmark(layer, x)
