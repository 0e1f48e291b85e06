"""Runs an installed llmq on its compiled kernels; prints a hash of what each op computed.

    python tools/smoke.py [FOLDER]     # fails too if the kernels that run are not below FOLDER

`make check-wheel` and `make torch-versions` run it.

Only the public interface is used, so that it says of any installation whether it works.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from pathlib import Path

import torch

import llmq

N, K = 129, 192  # not a multiple of the kernels' tiles
SCHEMES = ("w8a8", "w8a8-g64", "w8a16", "w4a16-g64", "w8a16-quantile", "w4a16-quantile-g64")


def digest(y: torch.Tensor) -> str:
    return hashlib.sha256(y.detach().numpy().tobytes()).hexdigest()[:12]


def check(name: str, layer: torch.nn.Module, x: torch.Tensor, tolerance: float) -> None:
    """Compare the layer's kernel with a product of its decoded weight."""
    y = layer(x).detach()
    expected = torch.nn.functional.linear(x, layer.dequantize(), layer.bias)
    error = ((y - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        sys.exit(f"{name}: relative error {error:.2g}, more than {tolerance}")
    print(f"{name:<24} {digest(y)}")


def main() -> None:
    """Run every op, or exit with one line that says what failed."""
    kernels = next(part for part in llmq.doctor().parts if part.name == "C++ kernels")
    if not kernels.ok:
        sys.exit(f"no kernels: {kernels.found}")
    expected = Path(*sys.argv[1:2]).resolve()
    if len(sys.argv) > 1 and expected not in Path(kernels.path).resolve().parents:
        sys.exit(f"the kernels of {kernels.path} run, not those below {expected}")
    print(f"torch {torch.__version__}, kernels {kernels.path}", file=sys.stderr)
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(K, N))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(5, K, generator=generator)
    for scheme in SCHEMES:
        layer = llmq.quantize(copy.deepcopy(model), scheme=scheme, skip=())[0]
        # One rounding of an activation to 8 bits is 0.4 % of the largest; float sums are 1e-6.
        check(scheme, layer, x, 0.02 if "a8" in scheme else 1e-5)
    for pattern in ("unstructured", "2:4"):
        sparse = llmq.quantize(copy.deepcopy(model), scheme="w8a8", skip=())
        layer = llmq.prune(sparse, 0.5, pattern=pattern, skip=())[0]
        check(f"w8a8 {pattern}", layer, x, 0.02)


if __name__ == "__main__":
    main()
