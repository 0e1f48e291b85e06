"""`llmq tune`: measures the tiles that Triton kernels may take on this GPU, and keeps the best.

Kernels choose without it (`llmq_kernels.configs.heuristic`); nothing ever measures unasked. What is
found is kept in `$LLMQ_CACHE/tuned/<gpu>.json` (`~/.cache/llmq` by default), shape by shape, and
used from then on by every process that starts.
"""

from __future__ import annotations

import functools
import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from llmq.nn import QuantLinear
from llmq.scheme import resolve_scheme

SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))  # N, K of Llama-3-8B
TOKENS = (1, 16, 64, 512, 4096)
SCHEMES = ("w8a8", "w8a8-g64", "w8a16", "w4a16-g128")


def main(args: Namespace) -> None:
    """Run the command."""
    tuned = tune(args.shape or SHAPES, args.tokens or TOKENS, args.scheme or SCHEMES)
    print(json.dumps(tuned.entries, indent=1) if args.json else tuned)


class Problem(NamedTuple):
    """A product whose tile is to be chosen: its key in the file, and how it is run."""

    family: str
    group: int
    run: Callable[[Any], Any]  # with an llmq_kernels.configs.Config


class Tuned(NamedTuple):
    """What was found: the `file`, one entry a product, and what could not be measured."""

    file: Path
    entries: list[dict[str, Any]]
    refused: list[str]

    def __str__(self) -> str:
        lines = [f"{'N×K':<14}{'M':>6}  {'kernel':<20}{'before':>10}{'tuned':>10}  µs, tile"]
        for e in self.entries:
            c = e["config"]
            tile = f"{c['BLOCK_M']}×{c['BLOCK_N']}×{c['BLOCK_K']}, {c['SPLITS']} splits"
            shape = f"{e['N']}×{e['K']}"
            lines.append(
                f"{shape:<14}{e['M']:>6}  {e['family']:<20}{e['heuristic_us']:>10.1f}"
                f"{e['us']:>10.1f}  {tile}"
            )
        lines += [f"left out: {line}" for line in self.refused]
        return "\n".join([*lines, str(self.file)])


def tune(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    tokens: Iterable[int] = TOKENS,
    schemes: Iterable[str] = SCHEMES,
    *,
    device: torch.device | str = "cuda",
    seconds: Callable[[Callable[[], Any]], float] | None = None,
) -> Tuned:
    """Measure every tile for every product, and keep the fastest of each.

    Args:
        shapes: (N, K) of layers.
        tokens: M; a choice serves up to so many tokens.
        schemes: names of presets with a Triton kernel that has tiles to choose.
        device: a GPU.
        seconds: measures one call; Triton's benchmark with a cold L2 by default.

    Raises:
        ValueError: without a GPU, or if a scheme's kernel has nothing to tune.
    """
    place = torch.device(device)
    if seconds is None and (place.type != "cuda" or not torch.cuda.is_available()):
        raise ValueError(f"tuning measures on a CUDA GPU; there is none, got device {place}")
    from llmq_kernels import configs

    measure = seconds or _seconds
    products = [(N, K, M, s) for N, K in shapes for s in schemes for M in sorted(tokens)]
    capability, sms, name = configs.gpu(place)
    entries, refused = [], []
    for N, K, M, scheme in tqdm(products, desc="tune", unit="product", leave=False):
        problem = _problem(scheme, M, N, K, place)
        choice = configs.heuristic(problem.family, M, N, K, capability, sms, problem.group)
        found: dict[Any, float] = {}
        candidates = configs.candidates(problem.family, M, N, K, capability, problem.group)
        for config in dict.fromkeys((choice, *candidates)):
            try:
                found[config] = measure(functools.partial(problem.run, config))
            except Exception as error:  # noqa: PERF203  (too much shared memory, say)
                if config == choice:
                    refused.append(f"{scheme} {N}×{K} M={M}: {error}")
        if choice not in found:
            continue
        best = min(found, key=lambda config: found[config])
        entries.append(
            {
                "family": problem.family,
                "N": N,
                "K": K,
                "M": M,
                "group": problem.group,
                "config": configs.as_json(best),
                "us": found[best] * 1e6,
                "heuristic_us": found[choice] * 1e6,
            }
        )
    import triton

    record = {"torch": torch.__version__, "triton": triton.__version__}
    return Tuned(configs.save_tuned(name, entries, record), entries, refused)


def _problem(scheme_name: str, M: int, N: int, K: int, device: torch.device) -> Problem:
    """Return the product that a layer of the scheme computes for M tokens."""
    from llmq_kernels import int8_gemm, weight_only_gemm

    scheme = resolve_scheme(scheme_name)
    scheme.check_fits(N, K)
    if scheme.method != "uniform":
        raise ValueError(f"{scheme_name}: its kernel takes the tiles of w{scheme.bits}a16")
    dense = nn.Linear(K, N, bias=False, device=device, dtype=torch.bfloat16)
    layer = QuantLinear.from_linear(dense, scheme).canonical()
    weight, scale = layer["weight"], layer["weight_scale"]
    zero_point = layer.get("weight_zero_point")
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    groups = scale.shape[1]
    if scheme.activations is None:
        return Problem(
            "weight_only_gemm",
            K // groups if groups > 1 else 0,
            lambda config: weight_only_gemm.float_gemm(
                x, weight, scale, zero_point, None, None, scheme.bits, config
            ),
        )
    codes, x_scale = int8_gemm.quantize_activation(x, scheme.activation_group_size or 0)
    operands = (codes, x_scale, weight, scale)
    groups = math.lcm(groups, x_scale.shape[1])
    if groups == 1 and scheme.bits == 8 and zero_point is None:
        return Problem(
            "int8_gemm",
            0,
            lambda config: int8_gemm.int8_gemm(*operands, None, torch.bfloat16, config),
        )
    return Problem(
        "grouped_int8_gemm",
        K // groups,
        lambda config: int8_gemm.grouped_int8_gemm(
            *operands, zero_point, None, torch.bfloat16, scheme.bits, config
        ),
    )


def _seconds(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=25, return_mode="median")) * 1e-3
