"""weight_only_linear on every instruction set, against float64 sums in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.formats import activation, uniform
from llmq.ops.reference import pack_scales
from tests.cpu.isas import (
    DTYPES,
    GROUPED_SHAPES,
    available,
    each_isa,
    float_tolerance,
    stored_tolerance,
)
from tests.helpers import assert_within

ops = torch.ops.llmq


def _encode(N: int, K: int, bits: int, group: int | None, symmetric: bool) -> uniform.UniformWeight:
    """A weight whose outputs differ in size and, asymmetric, sit mostly on one side of zero."""
    weight = torch.randn(N, K) * torch.logspace(-2, 1, N)[:, None]
    if not symmetric:
        weight = weight.abs() - 0.1 * weight.abs().amax(-1, keepdim=True) if K else weight
    granularity = "channel" if group is None else "group"
    return uniform.encode(
        weight, bits=bits, granularity=granularity, group_size=group, symmetric=symmetric
    )


def _layouts(weight: Tensor, bits: int) -> dict[str, Tensor]:
    return {"rows": weight, "panels": ops.pack_panels(weight, bits)}


def _expected(
    x: Tensor,
    encoded: uniform.UniformWeight,
    bias: Tensor | None,
    bits: int,
    activation_group: int | None,
) -> tuple[Tensor, Tensor]:
    """y in float64 for x [M, K], and how far float32 kernels may be from it."""
    K = x.shape[-1]
    shift = 0 if bias is None else bias.double()
    dense = uniform.decode(*encoded, bits=bits, K=K).double()
    if activation_group is None or K == 0:
        expected = x.double() @ dense.T + shift
        return expected, float_tolerance(x, dense, bias, expected)
    codes, x_scale = activation.quantize_activation(x, activation_group)
    inputs = codes.double() * x_scale.double().repeat_interleave(K // x_scale.shape[1], 1)
    expected = inputs @ dense.T + shift
    # Dots are exact. Each of S segments rounds its dot, the product of two scales, their product
    # and the sum of all before it: S + 4 roundings of no more than the sum of the magnitudes.
    segments = K // torch.gcd(
        torch.tensor(K // x_scale.shape[1]), torch.tensor(K // encoded.weight_scale.shape[1])
    )
    magnitude = inputs.abs() @ dense.abs().T
    magnitude += 0 if bias is None else bias.double().abs()
    tolerance = (int(segments) + 4) * 2**-24 * magnitude + 2**-126
    return expected, stored_tolerance(tolerance, expected, x.dtype)


def _check(
    x: Tensor,
    encoded: uniform.UniformWeight,
    bias: Tensor | None,
    bits: int,
    activation_group: int | None,
) -> None:
    expected, tolerance = _expected(x, encoded, bias, bits, activation_group)
    weight, scale, zero = encoded
    for isa in each_isa():
        for layout, stored in _layouts(weight, bits).items():
            y = ops.weight_only_linear(x, stored, scale, zero, bias, bits, activation_group)
            assert y.dtype == x.dtype
            assert_within(y, expected, tolerance, f"{isa}, {layout}")
            if scale.shape[0] % 16 == 0:
                panels = [None if t is None else pack_scales(t) for t in (scale, zero)]
                same = ops.weight_only_linear(x, stored, *panels, bias, bits, activation_group)
                assert torch.equal(same, y), f"{isa}, {layout}, scales in panels"


def test_every_instruction_set_of_this_cpu_runs() -> None:
    assert list(each_isa()) == available()
    assert "portable" in available()


@pytest.mark.parametrize("symmetric", [True, False], ids=("symmetric", "asymmetric"))
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", GROUPED_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(shape: tuple[int, int, int, int | None], bits: int, symmetric: bool) -> None:
    M, N, K, group = shape
    torch.manual_seed(M * 7919 + N * 31 + K)
    encoded = _encode(N, K, bits, group, symmetric)
    x = torch.randn(M, K) * torch.logspace(-2, 2, M)[:, None]
    bias = torch.randn(N) if M % 2 else None
    halves = K // 2 if K % 2 == 0 else K
    for activation_group in {None, 0, group or 0, halves}:
        _check(x, encoded, bias, bits, activation_group)


@pytest.mark.parametrize("activation_group", [None, 0, 32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes(dtype: torch.dtype, bits: int, activation_group: int | None) -> None:
    torch.manual_seed(0)
    encoded = _encode(40, 96, bits, 32, symmetric=False)
    for M in (1, 14):
        x = torch.randn(M, 96).to(dtype)
        for bias in (None, torch.randn(40).to(dtype)):
            _check(x, encoded, bias, bits, activation_group)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 6), "groups")
    group = data.draw(st.integers(1, 70), "group")
    K = groups * group
    M, N = data.draw(st.integers(1, 30), "M"), data.draw(st.integers(1, 50), "N")
    bits = data.draw(st.sampled_from((8, 4)), "bits")
    divisors = [d for d in range(1, K + 1) if K % d == 0]
    activation_group = data.draw(st.sampled_from([None, 0, *divisors]), "activation group")
    torch.manual_seed(data.draw(st.integers(0, 2**16), "seed"))
    encoded = _encode(N, K, bits, group, data.draw(st.booleans(), "symmetric"))
    x = torch.randn(M, K) * 10 ** torch.empty(M, K).uniform_(-3, 3)
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)), "dtype")
    bias = torch.randn(N) if data.draw(st.booleans(), "bias") else None
    _check(x.to(dtype), encoded, bias, bits, activation_group)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("M", [1, 2, 5, 12, 27])
def test_integers_are_exact(M: int, bits: int) -> None:
    """Scales of 1 and sums below 2²⁴ leave nothing to round: all 256 or 16 codes, all zeros."""
    torch.manual_seed(M)
    N, K = 21, 128
    low, high = (-128, 128) if bits == 8 else (0, 16)
    codes = torch.randint(low, high, (N, K), dtype=torch.int8)
    stored = codes if bits == 8 else uniform.pack_int4(codes)
    zero = torch.randint(low, high, (N, 4), dtype=torch.int8)
    x = torch.randint(-127, 128, (M, K)).float()
    x[:, ::32] = 127  # every group's scale is 1
    expected = x @ (codes.float() - zero.float().repeat_interleave(K // 4, 1)).T
    for isa in each_isa():
        for layout, weight in _layouts(stored, bits).items():
            for group in (0, 32, 64):
                y = ops.weight_only_linear(x, weight, torch.ones(N, 4), zero, None, bits, group)
                assert torch.equal(y, expected), (isa, layout, group)


@pytest.mark.parametrize("bits", [8, 4])
def test_worst_dot_does_not_overflow(bits: int) -> None:
    K = 70_000  # 255 · 127 · K is past 2³¹
    codes = torch.full((3, K), 127 if bits == 8 else 15, dtype=torch.int8)
    stored = codes if bits == 8 else uniform.pack_int4(codes)
    zero = torch.tensor([[-128 if bits == 8 else 0]] * 3, dtype=torch.int8)
    encoded = uniform.UniformWeight(stored, torch.ones(3, 1), zero)
    for sign in (1, -1):
        _check(torch.full((2, K), float(sign)), encoded, None, bits, 0)


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e35, 1e-35, 0.0])
def test_special_inputs(special: float, M: int) -> None:
    """What int8 digits cannot hold is computed in float32; NaN and infinity are never lost."""
    torch.manual_seed(0)
    encoded = _encode(20, 64, 4, 32, symmetric=True)
    dense = uniform.decode(*encoded, bits=4, K=64)
    x = torch.randn(M, 64) * (special if 0 < special < 1 else 1)
    x[0, 5] = special
    expected = x.double() @ dense.double().T
    for isa in each_isa():
        y = ops.weight_only_linear(x, *encoded, None, 4)
        finite = expected.isfinite()
        assert not y[~expected.isfinite()].isfinite().any(), isa
        bound = 2**-18 * (x.double().abs().nan_to_num(0, 0, 0) @ dense.double().abs().T) + 1e-44
        assert ((y.double() - expected).abs() <= bound)[finite].all(), isa
        coded = ops.weight_only_linear(x, *encoded, None, 4, 0)
        assert coded[0].isnan().all() == (not torch.isfinite(x[0]).all()), isa


def test_inputs_of_any_stride_and_rank() -> None:
    encoded = _encode(20, 64, 8, 32, symmetric=False)
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    flat = x.reshape(6, 64)
    bias = torch.randn(40)[::2]
    for _ in each_isa():
        y = ops.weight_only_linear(x, *encoded, bias, 8)
        assert torch.equal(y.reshape(6, 20), ops.weight_only_linear(flat, *encoded, bias, 8))
        one = ops.weight_only_linear(x[0, 0], *encoded, bias, 8)
        assert one.shape == (20,)
        torch.testing.assert_close(one, y[0, 0])


def test_two_threads_agree_with_one() -> None:
    encoded = _encode(300, 512, 4, 64, symmetric=False)
    x = torch.randn(90, 512)
    before = torch.get_num_threads()
    for _ in each_isa():
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.weight_only_linear(x, *encoded, None, 4))
            results.append(ops.weight_only_linear(x[:1], *encoded, None, 4))
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])
