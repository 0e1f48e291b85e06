"""bitmap_sparse_linear and its packing on every instruction set, against plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.formats import bitmap
from tests.cpu.isas import DTYPES, each_isa, float_tolerance, int8_product
from tests.helpers import assert_within

ops = torch.ops.llmq

# M, N, K, activation group (0: a token). One above and below a tile of 4 or 12 tokens, a panel of
# 16 outputs, 4 panels, a block of 4 inputs and its 64 bytes; primes.
SHAPES = (
    (0, 16, 8, 0),
    (3, 0, 8, 0),
    (3, 5, 0, 0),
    (1, 1, 1, 0),
    (1, 16, 4, 0),
    (1, 17, 20, 4),
    (2, 15, 3, 0),
    (3, 31, 19, 0),
    (4, 64, 64, 16),
    (5, 65, 5, 5),
    (6, 63, 7, 0),
    (7, 64, 64, 32),
    (13, 48, 60, 4),
    (3, 33, 30, 5),  # groups that end inside a block
    (2, 17, 12, 1),
    (11, 37, 101, 0),
    (12, 81, 68, 4),
    (25, 20, 36, 0),
    (1, 576, 576, 64),
    (70, 130, 1024, 256),
)
# Fraction of weights dropped; 0 and 1 leave full and empty blocks.
SPARSITIES = (0.0, 0.5, 0.97, 1.0)


class Case(NamedTuple):
    """A weight's codes where its mask is set and 0 elsewhere, and the rest of a linear layer."""

    x: Tensor
    values: Tensor  # int8 [N, K]; kept zeros among them
    mask: Tensor  # bool [N, K]
    scale: Tensor
    bias: Tensor

    def canonical(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(bitmap.encode(self.values, self.mask))

    def panels(self) -> tuple[Tensor, Tensor, Tensor]:
        return ops.pack_bitmap_panels(*self.canonical(), self.values.shape[1])


def _case(M: int, N: int, K: int, sparsity: float, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(M * 7919 + N * 31 + K)
    x = (torch.randn(M, K) * torch.logspace(-2, 2, M)[:, None]).to(dtype)  # rows of many sizes
    mask = torch.rand(N, K) >= sparsity
    if N > 2 and sparsity > 0:
        mask[N // 2] = False  # an empty row between others
    values = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    values[torch.rand(N, K) < 0.1] = 0  # codes that are zero and kept all the same
    values[~mask] = 0
    return Case(x, values, mask, torch.rand(N, 1) * 0.01 + 1e-4, torch.randn(N))


def _check_codes(case: Case, group: int, stored: tuple[Tensor, Tensor, Tensor]) -> None:
    expected, tolerance = int8_product(case.x, case.values, case.scale, case.bias, group)
    y = ops.bitmap_sparse_linear(case.x, *stored, case.scale, case.bias, group)
    assert y.dtype == case.x.dtype
    assert_within(y, expected, tolerance, ops.cpu_isa())


def _check_floats(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, stored: tuple[Tensor, ...]
) -> None:
    """Compare floating-point activations with a float64 product; weight [N, K] is what it means."""
    expected = x.double() @ weight.double().T + bias.double()
    y = ops.bitmap_sparse_linear(x, *stored, scale, bias)
    assert y.dtype == x.dtype
    assert_within(y, expected, float_tolerance(x, weight, bias, expected), ops.cpu_isa())


# packing


def _panels_by_hand(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bitmap panels of a case, written from the layout's description alone."""
    N, K = case.values.shape
    P, K4 = math.ceil(N / 16), math.ceil(K / 4)

    def blocks(matrix: Tensor) -> Tensor:  # [P, K4, 64]
        padded = matrix.new_zeros(P * 16, K4 * 4)
        padded[:N, :K] = matrix
        return padded.reshape(P, 16, K4, 4).permute(0, 2, 1, 3).reshape(P, K4, 64)

    kept = blocks(case.mask)
    powers = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    masks = (kept.reshape(P, K4, 8, 8) * powers).sum(-1, dtype=torch.uint8)
    flipped = (blocks(case.values).int() + 128).to(torch.uint8)[kept]
    padding = torch.full((64,), 0x80, dtype=torch.uint8)
    offsets = torch.zeros(P + 1, dtype=torch.int64)
    offsets[1:] = kept.sum((1, 2)).cumsum(0)
    return torch.cat([flipped, padding]).view(torch.int8), masks, offsets


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("K", [0, 1, 3, 4, 5, 8, 9, 63, 257])
@pytest.mark.parametrize("N", [0, 1, 15, 16, 17, 70])
def test_layout_and_round_trip(N: int, K: int, sparsity: float) -> None:
    case = _case(1, N, K, sparsity)
    canonical, panels = case.canonical(), case.panels()
    for packed, expected in zip(panels, _panels_by_hand(case), strict=True):
        assert packed.dtype == expected.dtype and torch.equal(packed, expected)
    for back, original in zip(ops.unpack_bitmap_panels(*panels, N, K), canonical, strict=True):
        assert back.dtype == original.dtype and torch.equal(back, original)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 90), st.floats(0, 1), st.integers(0, 2**31))
def test_round_trip_of_any_shape(N: int, K: int, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(N, K, generator=generator) >= sparsity
    values = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator)
    stored = bitmap.encode(values, mask)
    panels = ops.pack_bitmap_panels(*stored, K)
    for back, original in zip(ops.unpack_bitmap_panels(*panels, N, K), stored, strict=True):
        assert torch.equal(back, original)


def _broken_storage() -> dict[str, tuple[tuple[Tensor, Tensor, Tensor], int, str]]:
    weight, mask, offsets = _case(1, 20, 24, 0.5).canonical()
    more, shifted, backwards = mask.clone(), offsets.clone(), offsets.clone()
    more[3, 1] ^= 4
    shifted[5] += 1
    backwards[0] = 1
    together = "do not belong together"
    return {
        "a bit more": ((weight, more, offsets), 24, together),
        "a value less": ((weight[:-1], mask, offsets), 24, together),
        "shifted row": ((weight, mask, shifted), 24, together),
        "first row late": ((weight, mask, backwards), 24, together),
        "wrong K": ((weight, mask, offsets), 33, "expected 17 to 24 input features, got 33"),
        "row missing": ((weight, mask[:-1], offsets), 24, r"row_offsets must be .*\[20\]"),
        "offsets int32": (
            (weight, mask, offsets.int()),
            24,
            "row_offsets must be int64",
        ),
        "mask int8": ((weight, mask.view(torch.int8), offsets), 24, "weight_bitmask must be uint8"),
    }


@pytest.mark.parametrize("name", _broken_storage())
def test_broken_canonical_storage_is_refused(name: str) -> None:
    stored, K, message = _broken_storage()[name]
    with pytest.raises(ValueError, match=message):
        ops.pack_bitmap_panels(*stored, K)
    with pytest.raises(ValueError, match=r"weight_bitmask|together|row_offsets|input features"):
        ops.bitmap_sparse_linear(torch.zeros(1, K), *stored, torch.ones(20, 1), None, 0)
    floats = stored[0].float(), *stored[1:]
    with pytest.raises(ValueError, match=r"weight_bitmask|together|row_offsets|input features"):
        ops.bitmap_sparse_linear(torch.zeros(1, K), *floats)


def test_broken_panels_are_refused() -> None:
    weight, mask, offsets = _case(1, 20, 24, 0.5).panels()
    outside, falling = mask.clone(), offsets.clone()
    outside[1, 0, 7] = 255  # outputs 30 and 31 of 20
    falling[1] = offsets[2] + 1
    for stored, message in (
        ((weight, outside, offsets), "do not belong together"),
        ((weight[:-1], mask, offsets), "must rise from 0"),
        ((weight, mask, falling), "must rise from 0"),
        (
            (weight, mask[:1], offsets),
            "weight_bitmask must have 2 panels for 20",
        ),
        ((weight, mask, offsets[:2]), r"row_offsets must be int64 \[3\], got int64 \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.unpack_bitmap_panels(*stored, 20, 24)
    for stored in ((weight[:-1], mask, offsets), (weight, mask, falling)):
        with pytest.raises(ValueError, match="must rise from 0"):
            ops.bitmap_sparse_linear(torch.zeros(1, 24), *stored, torch.ones(20, 1), None, 0)


# int8 values


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_int8_activations(isa: str, shape: tuple[int, int, int, int], sparsity: float) -> None:
    M, N, K, group = shape
    for dtype in DTYPES:
        case = _case(M, N, K, sparsity, dtype)
        _check_codes(case, group, case.panels())
        _check_codes(case, 0, case.canonical())


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_float_activations(isa: str, shape: tuple[int, int, int, int], sparsity: float) -> None:
    M, N, K, _ = shape
    for dtype in DTYPES:
        case = _case(M, N, K, sparsity, dtype)
        weight = case.values.double() * case.scale.double()
        for stored in (case.panels(), case.canonical()):
            _check_floats(case.x, weight, case.bias, case.scale, stored)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    M, N, K = (data.draw(st.integers(1, top)) for top in (20, 90, 140))
    group = data.draw(st.sampled_from([0, *(g for g in range(1, K + 1) if K % g == 0)]))
    case = _case(M, N, K, data.draw(st.floats(0, 1)), data.draw(st.sampled_from(DTYPES)))
    weight = case.values.double() * case.scale.double()
    for _ in each_isa():
        _check_codes(case, group, case.panels())
        _check_floats(case.x, weight, case.bias, case.scale, case.panels())


@pytest.mark.parametrize("M", [*range(1, 15), 24])
@pytest.mark.parametrize(("K", "group"), [(64, 0), (576, 64), (4096, 0)])
def test_dots_are_exact(isa: str, M: int, K: int, group: int) -> None:
    """Inputs that are their own codes and scales of 1 leave the integer dots in y."""
    case = _case(M, 83, K, 0.5)
    x = torch.randint(-127, 128, (M, K)).float()
    x.unflatten(1, (-1, group or K))[..., 0] = 127  # makes every scale exactly 1
    dots = x.double() @ case.values.double().T
    assert dots.abs().max() < 2**24
    y = ops.bitmap_sparse_linear(x, *case.panels(), torch.ones(83, 1), None, group)
    assert torch.equal(y.double(), dots)


@pytest.mark.parametrize("w", [-128, 127])
@pytest.mark.parametrize("code", [-127, 127])
@pytest.mark.parametrize("M", [1, 7])
def test_extreme_codes_neither_saturate_nor_overflow(isa: str, M: int, w: int, code: int) -> None:
    K = 70_000  # 255 · 127 · K is past 2³¹: the unsigned sums wrap, and come back
    stored = bitmap.encode(torch.full((18, K), w, dtype=torch.int8))
    panels = ops.pack_bitmap_panels(*stored, K)
    y = ops.bitmap_sparse_linear(
        torch.full((M, K), float(code)), *panels, torch.ones(18, 1), None, 0
    )
    assert torch.equal(y, torch.full((M, 18), float(w * code * K)))


def test_inputs_of_any_layout(isa: str) -> None:
    K, N = 36, 21
    case = _case(1, N, K, 0.5)
    weight = case.values.double() * case.scale.double()
    x = torch.randn(2, 3, K)
    views = (
        x,  # 3-D
        x[0, 0],  # 1-D
        torch.randn(K, 5).T,
        torch.randn(5, 2 * K)[:, ::2],
        torch.randn(1, K).expand(4, K),
        torch.randn(6, K + 1)[:, 1:],  # rows that start off a 16-byte boundary
    )
    for view in views:
        _check_codes(case._replace(x=view), 12, case.panels())
        _check_floats(view, weight, case.bias, case.scale, case.panels())


def test_canonical_tensors_of_any_layout(isa: str) -> None:
    case = _case(3, 21, 36, 0.5)
    weight, mask, offsets = case.canonical()
    strided = torch.stack([weight, weight], 1)[:, 0], mask.T.contiguous().T, offsets
    _check_codes(case, 0, strided)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_of_any_type_or_none(isa: str, bias_dtype: torch.dtype) -> None:
    case = _case(3, 21, 36, 0.5)
    weight = case.values.double() * case.scale.double()
    case = case._replace(bias=case.bias.to(bias_dtype))
    _check_codes(case, 0, case.panels())
    _check_floats(case.x, weight, case.bias, case.scale, case.panels())
    for group in (0, None):
        without = ops.bitmap_sparse_linear(case.x, *case.panels(), case.scale, None, group)
        zero = torch.zeros(21, dtype=bias_dtype)
        given = ops.bitmap_sparse_linear(case.x, *case.panels(), case.scale, zero, group)
        assert torch.equal(without, given)


# floating-point activations beyond what three digits hold


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-38, 1e38])
def test_special_inputs_with_floats(isa: str, value: float) -> None:
    case = _case(3, 37, 64, 0.5)
    x = case.x.clone()
    x[1] = 0 if abs(value) < 1 else x[1]
    x[1, 5] = value
    weight = case.values.double() * case.scale.double()
    expected = x.double() @ weight.T
    y = ops.bitmap_sparse_linear(x, *case.panels(), case.scale)
    finite = expected.isfinite()
    assert torch.equal(y[~finite].double().nan_to_num(), expected[~finite].nan_to_num())
    assert finite[0].all()
    tolerance = float_tolerance(x.nan_to_num(0, 0, 0), weight, None, expected)
    assert_within(y[finite], expected[finite], tolerance[finite], isa)


@pytest.mark.parametrize("group", [0, 16])
def test_special_inputs_with_codes(isa: str, group: int) -> None:
    case = _case(8, 37, 64, 0.5)
    case.x[1, 3], case.x[4, 60], case.x[6] = float("nan"), -float("inf"), 0
    y = ops.bitmap_sparse_linear(case.x, *case.panels(), case.scale, case.bias, group)
    assert y[[1, 4]].isnan().all()
    good = [0, 2, 3, 5, 6, 7]
    _check_codes(case._replace(x=case.x[good]), group, case.panels())
    assert torch.equal(y[6], case.bias)


def test_an_outlier_costs_other_segments_nothing(isa: str) -> None:
    """Three digits are relative to the largest input of 256, not of the row."""
    case = _case(1, 33, 1024, 0.5)
    x = case.x.clone()
    x[0, 700] = 1e6
    case.values[:, 512:768] = 0  # the outlier and its segment do not reach y
    case.mask[:, 512:768] = False
    weight = case.values.double() * case.scale.double()
    y = ops.bitmap_sparse_linear(x, *case.panels(), case.scale)
    x[0, 700] = 0
    expected = x.double() @ weight.T
    assert_within(y, expected, float_tolerance(x, weight, None, expected), isa)


# floating-point values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_float_values(shape: tuple[int, ...], value_dtype: torch.dtype, dtype: torch.dtype) -> None:
    M, N, K, _ = shape
    case = _case(M, N, K, 0.6, dtype)
    weight = (torch.randn(N, K) * case.mask).to(value_dtype)
    _check_floats(case.x, weight, case.bias, None, bitmap.encode(weight, case.mask))


# threads and errors


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1536, 576), (40, 700, 900), (600, 130, 300)])
@pytest.mark.parametrize("group", [None, 0, 100])
def test_threads_change_nothing(isa: str, M: int, N: int, K: int, group: int | None) -> None:
    group = 0 if group and K % group else group
    case = _case(M, N, K, 0.5, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        panels = case.panels()
        results.append(ops.bitmap_sparse_linear(case.x, *panels, case.scale, case.bias, group))
    torch.set_num_threads(before)
    assert torch.equal(*results)
