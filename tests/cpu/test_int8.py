"""quantize_activation and int8_linear on every instruction set, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.formats import activation
from tests.cpu.isas import DTYPES, each_isa, int8_product
from tests.helpers import assert_within, run_python

ops = torch.ops.llmq
SPECIAL = (0.0, -0.0, 1e-45, 1e-31, -1e-30, 1.1e-30, 1e-20, 1.0, -3e38)

# M, N, K, activation group (0: a token). One above and below a tile of 6 tokens, a panel of 16
# outputs, 4 panels and a block of 4 inputs; primes; powers of two, whose rows share cache sets.
SHAPES = (
    (0, 16, 8, 0),
    (3, 0, 8, 0),
    (3, 5, 0, 0),
    (1, 1, 1, 0),
    (1, 16, 4, 0),
    (2, 15, 3, 0),
    (5, 17, 5, 0),
    (6, 63, 7, 7),
    (7, 64, 64, 16),
    (8, 65, 31, 0),
    (12, 80, 96, 32),
    (13, 48, 60, 4),
    (3, 33, 30, 5),  # groups that end inside a block
    (2, 17, 12, 1),
    (11, 37, 101, 0),
    (16, 576, 576, 64),
    (257, 70, 128, 128),
    (70, 130, 1024, 256),
)


def _check_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: int,
    stored: Tensor,
    given: Tensor | None = None,
) -> None:
    expected, tolerance = int8_product(x, weight, scale, bias, group, given)
    y = ops.int8_linear(x, stored, scale, bias, group, given)
    assert y.dtype == x.dtype
    assert_within(y, expected, tolerance, ops.cpu_isa())


def _inputs(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(M * 7919 + N * 31 + K)
    x = (torch.randn(M, K) * torch.logspace(-2, 2, M)[:, None]).to(dtype)  # rows of many sizes
    weight = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    return x, weight, torch.rand(N, 1) * 0.01 + 1e-4, torch.randn(N)


# -- int8_linear ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_linear(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    M, N, K, group = shape
    x, weight, scale, bias = _inputs(M, N, K, dtype)
    panels = ops.pack_panels(weight, 8)
    _check_linear(x, weight, scale, bias, group, panels)
    _check_linear(x, weight, scale, None, group, weight)
    if group == 0:
        _check_linear(x, weight, scale, bias, 0, panels, torch.tensor([0.02]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_int8_linear_of_any_shape(data: st.DataObject) -> None:
    M, N, K = (data.draw(st.integers(1, top)) for top in (20, 90, 140))
    group = data.draw(st.sampled_from([0, *(g for g in range(1, K + 1) if K % g == 0)]))
    dtype = data.draw(st.sampled_from(DTYPES))
    x, weight, scale, bias = _inputs(M, N, K, dtype)
    for _ in each_isa():
        _check_linear(x, weight, scale, bias, group, ops.pack_panels(weight, 8))


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("K", [64, 576, 4096])
def test_dots_are_exact(isa: str, K: int, group: int) -> None:
    """Inputs that are their own codes and scales of 1 leave the integer dots in y."""
    torch.manual_seed(K)
    x = torch.randint(-127, 128, (9, K)).float()
    x.unflatten(1, (-1, group or K))[..., 0] = 127  # makes every scale exactly 1
    weight = torch.randint(-128, 128, (83, K), dtype=torch.int8)
    dots = x.double() @ weight.double().T
    assert dots.abs().max() < 2**24
    y = ops.int8_linear(x, ops.pack_panels(weight, 8), torch.ones(83, 1), None, group)
    assert torch.equal(y.double(), dots)


@pytest.mark.parametrize("w", [-128, 127])
@pytest.mark.parametrize("code", [-127, 127])
def test_extreme_codes_neither_saturate_nor_overflow(isa: str, w: int, code: int) -> None:
    K = 70_000  # 255 · 127 · K is past 2³¹: the unsigned sums wrap, and come back
    x = torch.full((2, K), float(code))
    weight = torch.full((18, K), w, dtype=torch.int8)
    y = ops.int8_linear(x, weight, torch.ones(18, 1))
    assert torch.equal(y, torch.full((2, 18), float(w * code * K)))


def test_inputs_of_any_layout(isa: str) -> None:
    K, N = 36, 21
    _, weight, scale, bias = _inputs(1, N, K, torch.float32)
    panels = ops.pack_panels(weight, 8)
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
        _check_linear(view, weight, scale, bias, 12, panels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_of_any_type(isa: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    x, weight, scale, bias = _inputs(3, 21, 36, dtype)
    _check_linear(x, weight, scale, bias.to(bias_dtype), 0, weight)
    strided = torch.stack([bias, bias], 1).to(bias_dtype)[:, 0]
    _check_linear(x, weight, scale, strided, 0, weight)


@pytest.mark.parametrize("group", [0, 16])
def test_infinite_and_nan_inputs_give_nan_rows_only(isa: str, group: int) -> None:
    x, weight, scale, bias = _inputs(8, 37, 64, torch.float32)
    x[1, 3], x[4, 60], x[6] = float("nan"), -float("inf"), 0
    y = ops.int8_linear(x, weight, scale, bias, group)
    assert y[[1, 4]].isnan().all()
    good = [0, 2, 3, 5, 6, 7]
    assert torch.equal(y[good], ops.int8_linear(x[good], weight, scale, bias, group))
    assert torch.equal(y[6], bias)


def test_a_given_scale_is_that_of_every_token(isa: str) -> None:
    x, weight, _, bias = _inputs(6, 37, 64, torch.float32)
    x = x.clamp(-3, 3)
    x[:, 7] = 2.54  # 127 steps, so that a scale taken from the inputs is the same
    x = x.clamp(-2.54, 2.54)
    given, ones = torch.tensor([2.54]) / 127, torch.ones(37, 1)
    y = ops.int8_linear(x, weight, ones, bias, 0, given)
    codes, _ = activation.quantize_activation(x, 0, given)
    dots = codes.double() @ weight.double().T
    assert_within(y, dots * given.double() + bias.double(), dots.abs() * 2.0**-23 + 2.0**-22, isa)
    x[2, 5], x[4, 63] = float("nan"), float("inf")
    again = ops.int8_linear(x, weight, ones, bias, 0, given)
    assert again[[2, 4]].isnan().all()
    assert torch.equal(again[[0, 1, 3, 5]], y[[0, 1, 3, 5]])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        assert ops.int8_linear(x, weight, ones, bias, 0, torch.tensor([bad])).isnan().all()


@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1536, 576), (40, 700, 900), (600, 130, 300), (256, 20, 2048)]
)
def test_threads_change_nothing(isa: str, M: int, N: int, K: int) -> None:
    x, weight, scale, bias = _inputs(M, N, K, torch.bfloat16)
    panels = ops.pack_panels(weight, 8)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.int8_linear(x, panels, scale, bias, 100 if K == 900 else 0))
    torch.set_num_threads(before)
    assert torch.equal(*results)
    _check_linear(x, weight, scale, bias, 0, panels)


# -- quantize_activation --------------------------------------------------------------------------


def _check_quantize(x: Tensor, group: int, given: Tensor | None = None) -> None:
    codes, scale = ops.quantize_activation(x, group, given)
    expected_codes, expected_scale = activation.quantize_activation(x, group, given)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale.nan_to_num(-1), expected_scale.nan_to_num(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_quantize_activation(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    M, _, K, group = shape
    _check_quantize(_inputs(M, 1, K, dtype)[0], group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_activation_of_special_rows(isa: str, dtype: torch.dtype) -> None:
    rows = [torch.full((37,), value) for value in SPECIAL]
    last = torch.tensor([36])
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        rows += [torch.randn(37).index_fill(0, last, value)]
    rows.append(torch.arange(37) - 18.5)  # halves: ties that round to even
    rows.append(torch.linspace(-127, 127, 37) * 0.5)
    x = torch.stack(rows).to(dtype)
    _check_quantize(x, 0)
    _check_quantize(x, 37)
    _check_quantize(x, 1)
    _check_quantize(x.reshape(1, *x.shape), 0)
    for static in (0.25, 1.0, 1e-20, 3e38, 1.1e-30, 1e-31, 0.0, -1.0, float("inf"), float("nan")):
        _check_quantize(x, 0, torch.tensor([static]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=70))
def test_quantize_activation_of_any_floats(values: list[float]) -> None:
    x = torch.tensor(values)
    for _ in each_isa():
        for dtype in DTYPES:
            _check_quantize(x.to(dtype), 0)
            _check_quantize(x.to(dtype), 1)
            _check_quantize(x.to(dtype), 0, torch.tensor([0.3]))


def test_quantize_activation_in_two_threads(isa: str) -> None:
    x = torch.randn(602, 700)  # past the size for which a second thread is woken
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    _check_quantize(x, 0)
    _check_quantize(x.T, 43)
    torch.set_num_threads(before)


# -- the instruction set --------------------------------------------------------------------------

_SCRIPT = """
import torch, llmq.ops
x, w = torch.ones(2, 8), torch.ones(3, 8, dtype=torch.int8)
for _ in range(2): torch.ops.llmq.int8_linear(x, w, torch.ones(3, 1))
"""


def test_llmq_isa_forces_and_llmq_print_kernels_tells_once(isa: str) -> None:
    result = run_python(_SCRIPT, LLMQ_ISA=isa, LLMQ_PRINT_KERNELS="1")
    assert result.stdout.splitlines() == [f"llmq: int8_linear M=2 N=3 K=8 -> {isa}"], result.stderr


def test_an_isa_that_does_not_run_is_named() -> None:
    with pytest.raises(ValueError, match="instruction set 'sse9' does not run here; portable"):
        ops.set_cpu_isa("sse9")
    result = run_python(_SCRIPT, check=False, LLMQ_ISA="sse9")
    assert result.returncode != 0
    assert "instruction set 'sse9' does not run here" in result.stderr
