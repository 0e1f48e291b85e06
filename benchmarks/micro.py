"""One linear layer a case, torch's float32 beside ours: pytest-benchmark over shapes and tokens.

    python -m pytest benchmarks/micro.py -k int8 --benchmark-group-by=group

`llmq bench linear` measures the same layers interleaved in one loop, which is steadier where the
clock wanders; this one gives percentiles, keeps runs (`--benchmark-json`) and sets one beside
another (`--benchmark-compare`).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.peers import PEERS
from llmq.commands import bench

SHAPES = ((576, 576), (1536, 576), (768, 3072), (4096, 4096))
TOKENS = (1, 16, 256)
# By peers' family, so that `-k int8` or `-k weight4` selects.
CASES = {
    f"{peer.family}-{name}": peer
    for name, peer in PEERS.items()
    if name.startswith(("llmq", "torch float32", "torch bfloat16"))
}


@pytest.fixture(scope="module")
def dense(request: pytest.FixtureRequest) -> nn.Linear:
    N, K = request.param
    torch.manual_seed(0)
    return nn.Linear(K, N)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("M", TOKENS, ids="M={}".format)
@pytest.mark.parametrize("dense", SHAPES, ids=lambda shape: "{}x{}".format(*shape), indirect=True)
def test_linear(benchmark: Any, dense: nn.Linear, M: int, case: str) -> None:
    N, K = dense.weight.shape
    layer: Any = CASES[case].make(copy.deepcopy(dense), torch.get_num_threads())
    benchmark.group = f"{N}x{K}, M={M}"
    kernel = layer.kernel(M).name if hasattr(layer, "kernel") else case
    benchmark.extra_info.update(bench.machine(), kernel=kernel)
    x = torch.randn(M, K)
    with torch.inference_mode():
        benchmark(layer, x)
