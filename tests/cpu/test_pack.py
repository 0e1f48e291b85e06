"""pack_panels / unpack_panels: the layout of csrc/cpu/kernels.h, byte by byte and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmq.ops  # noqa: F401  defines torch.ops.llmq
from llmq.formats import uniform
from llmq.runtime import extension

# 0, 1, one above and below a panel (16 outputs) and a block (4 or 8 inputs), and past 64 KiB, where
# packing starts a second thread.
SIZES_N = (0, 1, 15, 16, 17, 33)
SIZES_K = (0, 1, 3, 4, 5, 7, 8, 9, 64, 577)


@pytest.fixture(autouse=True)
def _loaded() -> None:
    assert extension.load().loaded, extension.load().error


def _codes(N: int, K: int, bits: int) -> Tensor:
    torch.manual_seed(N * 1000 + K)
    if bits == 8:
        return torch.randint(-128, 128, (N, K), dtype=torch.int8)
    return uniform.pack_int4(torch.randint(0, 16, (N, K), dtype=torch.uint8))


def _panels8(codes: Tensor) -> Tensor:
    """Return panels8 of codes [N, K], written from the layout's description alone."""
    N, K = codes.shape
    P, K4 = math.ceil(N / 16), math.ceil(K / 4)
    padded = torch.zeros(P * 16, K4 * 4, dtype=torch.int16)
    padded[:N, :K] = codes
    unsigned = (padded + 128).to(torch.uint8)
    return unsigned.reshape(P, 16, K4, 4).permute(0, 2, 1, 3).contiguous().view(torch.int8)


def _panels4(nibbles: Tensor, K: int) -> Tensor:
    """Return panels4 of codes 0..15 [N, K], written from the layout's description alone."""
    N = nibbles.shape[0]
    P, K8 = math.ceil(N / 16), math.ceil(K / 8)
    padded = torch.zeros(P * 16, K8 * 8, dtype=torch.uint8)
    padded[:N, :K] = nibbles
    blocks = padded.reshape(P, 16, K8, 2, 4).permute(0, 2, 3, 1, 4)  # [P, K8, half, lane, j]
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).contiguous().view(torch.int8)


@pytest.mark.parametrize("K", SIZES_K)
@pytest.mark.parametrize("N", SIZES_N)
@pytest.mark.parametrize("bits", [8, 4])
def test_layout_and_round_trip(bits: int, N: int, K: int) -> None:
    codes = _codes(N, K, bits)
    packed = torch.ops.llmq.pack_panels(codes, bits)
    if bits == 8:
        assert torch.equal(packed, _panels8(codes))
    else:
        assert torch.equal(packed, _panels4(uniform.unpack_int4(codes, K).to(torch.uint8), K))
    assert torch.equal(torch.ops.llmq.unpack_panels(packed, bits, N, K), codes)


@settings(max_examples=60, deadline=None)
@given(N=st.integers(0, 70), K=st.integers(0, 90), bits=st.sampled_from([4, 8]))
def test_round_trip_of_any_shape(N: int, K: int, bits: int) -> None:
    codes = _codes(N, K, bits)
    packed = torch.ops.llmq.pack_panels(codes, bits)
    assert torch.equal(torch.ops.llmq.unpack_panels(packed, bits, N, K), codes)


@pytest.mark.parametrize("bits", [8, 4])
def test_large_and_non_contiguous_weights(bits: int) -> None:
    codes = _codes(600, 1000, bits)
    strided = codes.repeat_interleave(2, 0)[::2]
    packed = torch.ops.llmq.pack_panels(codes, bits)
    assert torch.equal(torch.ops.llmq.pack_panels(strided, bits), packed)
    assert torch.equal(torch.ops.llmq.unpack_panels(packed, bits, 600, 1000), codes)


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.int8), 2, "bits must be 8 or 4, got 2"),
        (torch.zeros(4, 4), 8, "weight must be int8"),
        (torch.zeros(4, dtype=torch.int8), 8, "2 dimensions"),
    ],
    ids=["bits", "dtype", "dimensions"],
)
def test_pack_names_what_is_wrong(weight: Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.llmq.pack_panels(weight, bits)


def test_unpack_names_a_shape_that_does_not_fit() -> None:
    packed = torch.ops.llmq.pack_panels(torch.zeros(20, 20, dtype=torch.int8), 8)
    with pytest.raises(ValueError, match="must have 3 panels for 40 output features, got 2"):
        torch.ops.llmq.unpack_panels(packed, 8, 40, 20)
