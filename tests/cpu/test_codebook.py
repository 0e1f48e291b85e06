"""codebook_linear on every instruction set, against float64 sums in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.formats import codebook
from llmq.formats.uniform import pack_int4
from llmq.ops.reference import pack_scales
from tests.cpu.isas import GROUPED_SHAPES, available, each_isa, float_tolerance
from tests.helpers import assert_within

ops = torch.ops.llmq


def _encode(N: int, K: int, bits: int, group: int | None, shared: bool) -> codebook.CodebookWeight:
    """Random codes, so that every entry is used, under codebooks of any order and sign."""
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    stored = codes.view(torch.int8) if bits == 8 else pack_int4(codes.view(torch.int8))
    table = torch.randn(1 if shared else N, 2**bits)
    scale = torch.rand(N, 1 if group is None else K // group) * torch.logspace(-2, 1, N)[:, None]
    return codebook.CodebookWeight(stored, table, scale)


def _split_entries(x: Tensor, encoded: codebook.CodebookWeight, bits: int) -> Tensor | float:
    """How far y may be off where a shared 8-bit codebook is split into integers, for one token.

    Entries are off by half a unit, 2⁻²⁴ of the largest, as if they had been stored as float32 of
    that size; twice that leaves room for the scale's rounding.
    """
    if bits != 8 or len(x) != 1 or len(encoded.weight_codebook) != 1 or x.numel() == 0:
        return 0.0
    scale = encoded.weight_scale.double()
    inputs = x.double().abs().reshape(scale.shape[1], -1).sum(1)
    return 2**-23 * encoded.weight_codebook.abs().max().double() * (scale @ inputs)[None]


def _check(x: Tensor, encoded: codebook.CodebookWeight, bias: Tensor | None, bits: int) -> None:
    weight, table, scale = encoded
    dense = codebook.decode(*encoded, bits=bits, K=x.shape[-1]).double()
    expected = x.double() @ dense.T + (0 if bias is None else bias.double())
    tolerance = float_tolerance(x, dense, bias, expected) + _split_entries(x, encoded, bits)
    for isa in each_isa():
        for stored in (weight, ops.pack_panels(weight, bits)):
            y = ops.codebook_linear(x, stored, table, scale, bias, bits)
            assert y.dtype == x.dtype
            assert_within(y, expected, tolerance, f"{isa}, {stored.dim()}-D weight")
            if scale.shape[0] % 16 == 0:
                same = ops.codebook_linear(x, stored, table, pack_scales(scale), bias, bits)
                assert torch.equal(same, y), f"{isa}, scales in panels"


def test_every_instruction_set_of_this_cpu_runs() -> None:
    assert list(each_isa()) == available()


@pytest.mark.parametrize("shared", [True, False], ids=("one-codebook", "one-a-row"))
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", GROUPED_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(shape: tuple[int, int, int, int | None], bits: int, shared: bool) -> None:
    M, N, K, group = shape
    torch.manual_seed(M * 7919 + N * 31 + K)
    encoded = _encode(N, K, bits, group, shared)
    x = torch.randn(M, K) * torch.logspace(-2, 2, M)[:, None]
    _check(x, encoded, torch.randn(N) if M % 2 else None, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=("bfloat16", "float16"))
def test_dtypes(dtype: torch.dtype, bits: int) -> None:
    torch.manual_seed(0)
    encoded = _encode(40, 96, bits, 32, shared=True)
    for M in (1, 14):
        for bias in (None, torch.randn(40).to(dtype)):
            _check(torch.randn(M, 96).to(dtype), encoded, bias, bits)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 6), "groups")
    group = data.draw(st.integers(1, 70), "group")
    M, N = data.draw(st.integers(1, 30), "M"), data.draw(st.integers(1, 50), "N")
    bits = data.draw(st.sampled_from((8, 4)), "bits")
    torch.manual_seed(data.draw(st.integers(0, 2**16), "seed"))
    encoded = _encode(N, groups * group, bits, group, data.draw(st.booleans(), "shared"))
    x = torch.randn(M, groups * group) * 10 ** torch.empty(M, 1).uniform_(-3, 3)
    _check(x, encoded, torch.randn(N) if data.draw(st.booleans(), "bias") else None, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("M", [1, 12])
def test_every_entry_is_looked_up_exactly(M: int, bits: int) -> None:
    """One input at a time is 1, so y is the weight itself, or nearer to it than any other entry."""
    K = 256
    codes = torch.stack([torch.arange(K).roll(n) % 2**bits for n in range(33)]).to(torch.uint8)
    stored = codes.view(torch.int8) if bits == 8 else pack_int4(codes.view(torch.int8))
    table = torch.linspace(-1, 1, 2**bits)[torch.randperm(2**bits)][None]
    encoded = codebook.CodebookWeight(stored, table, torch.full((33, 1), 0.5))
    dense = codebook.decode(*encoded, bits=bits, K=K)
    identity = torch.eye(K)
    for isa in each_isa():
        rows = [ops.codebook_linear(x, *encoded, None, bits) for x in identity.split(M)]
        error = (torch.cat(rows) - dense.T).abs().max()
        split = _split_entries(identity[:M], encoded, bits)
        # The input is split in the same way, and units and scale are rounded when multiplied.
        assert error <= 3 * torch.as_tensor(split).max(), isa


@pytest.mark.parametrize("top", [1.0, 0.25, 2.0**-40, 64.0])
def test_entries_of_16_bits_are_exact(top: float) -> None:
    """Entries on the grid that codebook.encode uses come out right to the last bits, however small.

    The largest entry must not decide what the smallest loses, as it does with three digits of a
    unit of its size.
    """
    steps = torch.randperm(1 << 14)[:255] - (1 << 13)
    table = (torch.cat((torch.tensor([1 << 14]), steps)).float() * 2.0**-14 * top)[None]
    codes = torch.arange(256).repeat(4, 1).to(torch.uint8)
    encoded = codebook.CodebookWeight(codes.view(torch.int8), table, torch.ones(4, 1))
    dense = codebook.decode(*encoded, bits=8, K=256)
    for isa in each_isa():
        rows = [ops.codebook_linear(x, *encoded, None, 8) for x in torch.eye(256).split(1)]
        # Rounded: the digits' sum, the unit, and the product with the input's scale.
        assert_within(torch.cat(rows), dense.T.double(), dense.T.abs().double() * 4 * 2**-24, isa)


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_special_inputs_are_not_lost(special: float, M: int) -> None:
    encoded = _encode(20, 64, 8, 32, shared=True)
    x = torch.randn(M, 64)
    x[0, 5] = special
    for isa in each_isa():
        y = ops.codebook_linear(x, *encoded, None, 8)
        assert not y[0].isfinite().any(), isa
        assert y[1:].isfinite().all(), isa
