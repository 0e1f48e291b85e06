"""decoder_layer on every instruction set, against plain PyTorch around the same linear layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq.nn import QuantLinear
from llmq.ops import decoder
from tests.cpu.isas import DTYPES, ROUNDOFF
from tests.helpers import assert_within, generator

op = torch.ops.llmq.decoder_layer

# B, T, heads of q, heads of k, D, K, I, tokens before. One below and above a tile of 32 queries and
# a block of 96 keys; D that registers divide and do not; passes of more than 256 tokens.
SHAPES = (
    (1, 1, 1, 1, 2, 4, 4, 0),
    (1, 1, 9, 3, 64, 64, 96, 40),
    (3, 1, 4, 2, 20, 32, 17, 5),
    (1, 1, 20, 1, 16, 32, 64, 100),
    (1, 7, 9, 3, 64, 64, 96, 0),
    (2, 16, 4, 2, 32, 36, 64, 3),
    (1, 33, 4, 4, 6, 31, 65, 63),
    (1, 97, 2, 1, 128, 48, 40, 0),
    (1, 12, 6, 2, 80, 64, 64, 181),
    (2, 131, 3, 1, 8, 16, 32, 0),
)


def _arguments(
    shape: tuple[int, ...],
    scheme: str = "w8a16",
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    head_norms: bool = False,
    mask: Tensor | None = None,
) -> list[Any]:
    B, T, H, heads, D, K, inner, start = shape
    g = generator(sum(shape))
    sizes = [(K, H * D), (K, heads * D), (K, heads * D), (H * D, K)]
    sizes += [(K, inner), (K, inner), (inner, K)]
    layers = []
    for inputs, outputs in sizes:
        linear = nn.Linear(inputs, outputs, bias=bias)
        with torch.no_grad():
            for p in linear.parameters():
                p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(inputs))
        layers.append(QuantLinear.from_linear(linear, scheme))
    chosen = layers[0].scheme
    group = -1 if chosen.activations is None else chosen.activation_group_size or 0
    angles = torch.randn(1, T, D, generator=g)
    caches = [torch.randn(B, heads, start + T + 3, D, generator=g).to(dtype) for _ in range(2)]
    norms = [torch.rand(n, generator=g) + 0.5 for n in (K, K, *([D, D] if head_norms else []))]
    zeros = [m.weight_zero_point for m in layers]
    return [
        torch.randn(B, T, K, generator=g).to(dtype),
        norms,
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        *caches,
        mask,
        [m.weight for m in layers],
        [m.weight_scale for m in layers],
        [] if zeros[0] is None else zeros,
        [m.bias for m in layers] if bias else [],
        [chosen.bits] * 7,
        [group] * 7,
        start,
        1e-5,
        D**-0.5,
    ]


def _check(arguments: list[Any], flips: float = 0.0) -> None:
    """Compare output and caches; `flips`: how far codes that round the other way move a token.

    Sums of n terms in other orders differ by √n roundings (Higham & Mary, 2019); the longest here
    are over K, I, D or keys, they follow each other eight deep, and weights or scores carry the
    error on: 32 times √n roundings of a token's largest value.
    """
    ours = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
    y = op(*ours)
    theirs = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
    expected = decoder.decoder_layer(*theirs)
    x, keys = arguments[0], arguments[4]
    longest = max(keys.shape[2], x.shape[-1], arguments[8][4].shape[0], arguments[2].shape[-1])
    rounding = 32 * math.sqrt(longest) * 2**-24 + flips
    rounding += 0 if x.dtype == torch.float32 else 4 * ROUNDOFF[x.dtype]
    for what, a, b in (
        ("keys", ours[4], theirs[4]),
        ("values", ours[5], theirs[5]),
        ("y", y, expected),
    ):
        assert a.dtype == x.dtype
        size = b.double().abs().amax(-1, keepdim=True)
        assert_within(a, b, (rounding * size).expand_as(b), f"{what}, {torch.ops.llmq.cpu_isa()}")
    start, end = arguments[13], arguments[13] + x.shape[1]
    for at in (4, 5):
        assert torch.equal(ours[at][:, :, :start], arguments[at][:, :, :start])
        assert torch.equal(ours[at][:, :, end:], arguments[at][:, :, end:])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_decoder_layer(isa: str, shape: tuple[int, ...]) -> None:
    _check(_arguments(shape))
    _check(_arguments(shape, bias=True, head_norms=True))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:6:2], ids=lambda shape: "x".join(map(str, shape)))
def test_dtypes(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _check(_arguments(shape, dtype=dtype))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-g64", "w4a8-g32", "w4a16-g32"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_schemes(isa: str, scheme: str, bias: bool) -> None:
    # Inputs that differ by a rounding may get neighbouring codes, 1/127 of the largest input.
    flips = 0.0 if scheme.startswith("w4a16") else 2 / 127
    _check(_arguments((1, 5, 4, 2, 32, 64, 192, 3), scheme, bias=bias), flips)
    _check(_arguments((1, 1, 4, 2, 32, 128, 256, 9), scheme, bias=bias), flips)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_masks(isa: str, kind: torch.dtype) -> None:
    for B, T, start in ((2, 1, 8), (2, 40, 0)):
        shape = (B, T, 4, 2, 32, 64, 96, start)
        seen = torch.rand(B, 1, T, start + T, generator=generator(1)) > 0.4
        seen[..., 0] = True
        mask = seen if kind == torch.bool else torch.zeros(seen.shape, dtype=kind)
        if kind != torch.bool:
            mask = mask.masked_fill(~seen, torch.finfo(kind).min)
        _check(_arguments(shape, mask=mask))
        _check(_arguments(shape, mask=mask[:1].expand(-1, 4, -1, -1)))


def test_threads(threads: int) -> None:
    _check(_arguments((2, 300, 6, 3, 32, 96, 256, 0), "w8a16", bias=True))
    _check(_arguments((2, 300, 6, 3, 32, 96, 256, 0), "w8a8"), flips=2 / 127)


def test_empty_prompt() -> None:
    arguments = _arguments((1, 1, 2, 1, 8, 16, 16, 0))
    arguments[0] = arguments[0][:, :0]
    arguments[2], arguments[3] = arguments[2][:, :0], arguments[3][:, :0]
    assert op(*arguments).shape == (1, 0, 16)


def test_opcheck() -> None:
    for scheme in ("w8a8", "w4a16-g32"):
        arguments = _arguments((2, 3, 4, 2, 32, 64, 64, 2), scheme)
        torch.library.opcheck(op, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
