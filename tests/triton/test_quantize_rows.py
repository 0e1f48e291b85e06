"""Triton's quantize_activation against the reference, bit for bit; and fused with RMSNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.formats import activation
from tests.helpers import assert_equal, assert_within, generator
from tests.triton.device import DEVICE

quantize_rows = pytest.importorskip("llmq_kernels.quantize_rows")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (0.0, -0.0, 1e-45, 1e-31, -1e-30, 1.1e-30, 1e-20, 1.0, -3e38)
# M, K, group: one, odd, prime, one above and below a power of two, groups of no power of two.
SHAPES = ((1, 1, 0), (3, 7, 0), (2, 17, 1), (5, 63, 21), (4, 96, 48), (9, 65, 0), (70, 128, 64))


def _check(x: Tensor, group: int, config: Any = None, given: float | None = None) -> None:
    static = None if given is None else torch.tensor([given])
    on_device = None if static is None else static.to(DEVICE)
    codes, scale = quantize_rows.quantize_activation(x.to(DEVICE), group, on_device, config)
    expected = activation.quantize_activation(x, group, static)
    assert_equal(codes.cpu(), expected[0], "codes")
    assert_equal(scale.cpu(), expected[1], "scale")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K", "group"), SHAPES)
def test_equals_the_reference(M: int, K: int, group: int, dtype: torch.dtype) -> None:
    x = torch.randn(M, K, generator=generator(M)) * torch.logspace(-3, 3, M)[:, None]
    _check(x.to(dtype), group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 7), (9, 65), (70, 128)])
def test_a_given_scale_equals_the_reference(M: int, K: int, dtype: torch.dtype) -> None:
    x = torch.randn(M, K, generator=generator(M)) * torch.logspace(-3, 3, M)[:, None]
    _check(x.to(dtype), 0, given=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [None, 16])
def test_special_rows_on_a_given_scale(dtype: torch.dtype, block: int | None) -> None:
    config = None if block is None else quantize_rows.RowsConfig(2, block, num_warps=4)
    for given in (0.25, 1.0, 1e-20, 3e38, 1.1e-30, 1e-31, 0.0, -1.0, float("inf"), float("nan")):
        _check(special_rows().to(dtype), 0, config, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [0, 1, 37])
def test_special_rows(dtype: torch.dtype, group: int) -> None:
    _check(special_rows().to(dtype), group)


def special_rows() -> Tensor:
    rows = [torch.full((37,), value) for value in SPECIAL]
    normal, last = torch.randn(37, generator=generator(1)), torch.tensor(36)
    rows += [normal.index_fill(0, last, float(value)) for value in ("nan", "inf", "-inf")]
    rows.append(torch.arange(37) - 18.5)  # halves: ties that round to even
    rows.append(torch.linspace(-127, 127, 37) * 0.5)
    return torch.stack(rows)


def test_long_rows_take_two_passes() -> None:
    x = torch.randn(3, 300, generator=generator(2))
    x[1, 299] = 50
    _check(x, 0, quantize_rows.RowsConfig(ROWS=2, BLOCK=128, num_warps=4))
    _check(x, 150, quantize_rows.RowsConfig(ROWS=1, BLOCK=64, num_warps=4))


def test_reads_x_as_it_lies() -> None:
    x = torch.randn(4, 6, 40, generator=generator(3))
    for view in (x, x[..., 1::2], x.mT, x[:, :1].expand(4, 6, 40), x[:, :, 3:], x[0, 0]):
        _check(view, 0)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(dtype: torch.dtype, group: int, residual: bool) -> None:
    M, K, eps = 5, 112, 1e-5
    x, other = (torch.randn(M, 2 * K, generator=generator(s))[:, :K].to(dtype) for s in (1, 2))
    weight = (torch.rand(K, generator=generator(3)) + 0.5).to(dtype)
    added = other.to(DEVICE) if residual else None
    codes, scale, total = (
        t.cpu()
        for t in quantize_rows.rms_norm_quantize(x.to(DEVICE), weight.to(DEVICE), eps, added, group)
    )
    expected_total = x + other if residual else x
    assert_equal(total, expected_total, "sum")
    h = expected_total.double()
    normed = h * (h.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    _, expected_scale = activation.quantize_activation(normed.float(), group)
    # The product with rsqrt and the norm are each rounded to x's dtype; float32 before that rounds
    # K squares and sums, a quotient and a root.
    relative = 2 * torch.finfo(dtype).eps + (K + 8) * 2.0**-24
    assert_within(scale, expected_scale, expected_scale * relative, "scale")
    coded = (codes.float().unflatten(-1, (scale.shape[1], -1)) * scale[..., None]).flatten(-2)
    half_step = (scale * 0.5).repeat_interleave(K // scale.shape[1], 1).double()
    assert_within(coded, normed, half_step * 1.001 + normed.abs() * relative, "norm")


def test_rms_norm_says_what_it_takes() -> None:
    x = torch.zeros(2, 48, device=DEVICE)
    with pytest.raises(ValueError, match="got K=48, group_size=24"):
        quantize_rows.rms_norm_quantize(x, x[0], 1e-5, group_size=24)
    assert quantize_rows.rms_norm_quantize(x[:0], x[0], 1e-5)[0].shape == (0, 48)
