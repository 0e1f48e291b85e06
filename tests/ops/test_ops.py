"""Every op of `torch.ops.llmq`: schema, fake, reference, backward, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import llmq.nn  # noqa: F401  (defines the ops)
from llmq.formats import activation, bitmap, block, codebook, semi_structured, uniform
from llmq.scheme import PRESETS, Scheme, parse_pattern, resolve_scheme

N, K = 24, 64
STATIC = torch.tensor([0.015])  # of normal inputs, of which some are beyond 127 steps


def _weight(seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def _cases() -> dict[str, tuple[str, tuple, Tensor]]:
    """name → (op, arguments after x with bias None, float32 weight that they stand for)."""
    weight = _weight()
    channel = uniform.encode(weight, bits=8, granularity="channel")
    cases = {
        "int8": ("int8_linear", (channel.weight, channel.weight_scale, None, 0)),
        "int8-g16": ("int8_linear", (channel.weight, channel.weight_scale, None, 16)),
        "int8-static": ("int8_linear", (channel.weight, channel.weight_scale, None, 0, STATIC)),
    }
    dense = {name: uniform.decode(*channel, bits=8, K=K) for name in cases}
    for bits in (8, 4):
        for symmetric in (True, False):
            for group in (None, 0, 16):
                encoded = uniform.encode(
                    weight, bits=bits, granularity="group", group_size=16, symmetric=symmetric
                )
                name = f"weight-only-{bits}-{'sym' if symmetric else 'asym'}-a{group}"
                cases[name] = ("weight_only_linear", (*encoded, None, bits, group))
                dense[name] = uniform.decode(*encoded, bits=bits, K=K)
        table = codebook.encode(weight, bits=bits, granularity="channel")
        cases[f"codebook-{bits}"] = ("codebook_linear", (*table, None, bits))
        dense[f"codebook-{bits}"] = codebook.decode(*table, bits=bits, K=K)
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(1)) < 0.5
    pairs = torch.arange(K).remainder(4).lt(2).expand(N, K)
    blocks = mask[::8, ::8].repeat_interleave(8, 0).repeat_interleave(8, 1)
    for values, scale, kind, *inputs in (
        (weight, None, "float", None),
        (channel.weight, channel.weight_scale, "int8", 16),
        (channel.weight, channel.weight_scale, "int8-static", 0, STATIC),
    ):
        kept = {"bitmap": mask, "semi": pairs, "block": blocks}
        stored = {
            "bitmap": ("bitmap_sparse_linear", tuple(bitmap.encode(values, mask))),
            "semi": ("semi_structured_linear", tuple(semi_structured.encode(values, pairs))),
            "block": ("block_sparse_linear", tuple(block.encode(values, (8, 8), blocks))),
        }
        for name, (op, tensors) in stored.items():
            cases[f"{name}-{kind}"] = (op, (*tensors, scale, None, *inputs))
            full = values.float() if scale is None else values.float() * scale
            dense[f"{name}-{kind}"] = torch.where(kept[name], full, 0.0)
    return {name: (*case, dense[name]) for name, case in cases.items()}


CASES = _cases()
BIAS_AT = {
    "int8_linear": 2,
    "weight_only_linear": 3,
    "codebook_linear": 3,
    "bitmap_sparse_linear": 4,
    "semi_structured_linear": 3,
    "block_sparse_linear": 4,
}


def _call(name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
    op, args, _ = CASES[name]
    args = list(args)
    args[BIAS_AT[op]] = bias
    return getattr(torch.ops.llmq, op)(x, *args)


def _inputs(name: str) -> tuple[int | None, Tensor | None]:
    """The activation group and scale of a case."""
    op, args, _ = CASES[name]
    if isinstance(args[-1], Tensor):
        return args[-2], args[-1]
    return (args[-1] if op != "codebook_linear" else None), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (0,), (1,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_product_with_decoded_weight(name: str, shape: tuple, dtype: torch.dtype) -> None:
    x = torch.randn(*shape, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = _call(name, x, bias)
    inputs = x.float()
    group, given = _inputs(name)
    if group is not None:
        codes, scale = activation.quantize_activation(x, group, given)
        inputs = (codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)
    dense = CASES[name][2]
    expected = inputs.double() @ dense.double().T + bias.double()
    assert y.dtype == dtype and y.shape == (*shape, N)
    # K sums of float32, in any order, then one rounding to dtype.
    bound = inputs.abs().double() @ dense.abs().double().T + bias.abs().double()
    tolerance = bound * K * 2.0**-23 + expected.abs() * torch.finfo(dtype).eps
    difference = (y.double() - expected).abs()
    assert (difference <= tolerance).all(), f"largest excess {(difference - tolerance).max()}"


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    op, args, _ = CASES[name]
    x = torch.randn(3, K, requires_grad=True)
    torch.library.opcheck(getattr(torch.ops.llmq, op), (x, *args))


def test_opcheck_quantize_activation() -> None:
    tests = ("test_schema", "test_faketensor")
    for inputs in ((16,), (0, STATIC)):
        torch.library.opcheck(
            torch.ops.llmq.quantize_activation, (torch.randn(3, K), *inputs), test_utils=tests
        )


@pytest.mark.parametrize("name", CASES)
def test_gradients_go_through_the_decoded_weight(name: str) -> None:
    x = torch.randn(2, 3, K, requires_grad=True)
    bias = torch.randn(N, requires_grad=True)
    grad = torch.randn(2, 3, N)
    _call(name, x, bias).backward(grad)
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ CASES[name][2])
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_a_graph_break(name: str) -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def product(x: Tensor) -> Tensor:
        return _call(name, x * 2) + 1

    x = torch.randn(3, K)
    torch.testing.assert_close(product(x), _call(name, x * 2) + 1)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_names_are_read_back(name: str) -> None:
    assert resolve_scheme(name).name == name


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 3},
        {"method": "log"},
        {"granularity": "row"},
        {"granularity": "group"},
        {"group_size": 32},
        {"granularity": "group", "group_size": 0},
        {"activations": "fixed"},
        {"activations": "static", "bits": 4},
        {"activations": "static", "symmetric": False},
        {"activations": "static", "granularity": "group", "group_size": 32},
        {"activations": "static", "activation_group_size": 64},
        {"activations": "static", "method": "quantile"},
        {"activation_group_size": 64},
        {"method": "quantile", "symmetric": False},
        {"method": "quantile", "activations": "dynamic"},
        {
            "granularity": "group",
            "group_size": 32,
            "activations": "dynamic",
            "activation_group_size": 48,
        },
    ],
    ids=str,
)
def test_scheme_refuses_contradictions(fields: dict) -> None:
    with pytest.raises(ValueError, match="Scheme"):
        Scheme(**fields)


def test_static_schemes_have_names_of_their_own() -> None:
    assert resolve_scheme("w8a8-static") == Scheme(activations="static")
    assert Scheme(activations="static", granularity="tensor").name == "w8a8-tensor-static"


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="w8a8"):
        resolve_scheme("w7a7")
    with pytest.raises(TypeError, match="preset name"):
        resolve_scheme(8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2:4"):
        parse_pattern("3:4")
    with pytest.raises(TypeError, match="string"):
        parse_pattern(24)  # type: ignore[arg-type]
