"""quantize_activation and int8_linear on every instruction set, against plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmq.ops  # noqa: F401  defines torch.ops.llmq
from llmq import extension
from llmq.formats import activation

ops = torch.ops.llmq
ISA_FLAGS = {
    "portable": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_vbmi2"},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
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


def _cpu_flags() -> set[str]:
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


@pytest.fixture(params=ISA_FLAGS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; fails if this CPU has it and the library does not run it."""
    assert extension.load().loaded, extension.load().error
    if not ISA_FLAGS[request.param] <= _cpu_flags():
        pytest.skip(f"this CPU has no {request.param}")
    before = ops.cpu_isa()
    ops.set_cpu_isa(request.param)
    assert ops.cpu_isa() == request.param
    yield request.param
    ops.set_cpu_isa(before)


def _each_isa() -> Iterator[str]:
    """The same for hypothesis, which does not run fixtures again for each example."""
    before = ops.cpu_isa()
    for name, flags in ISA_FLAGS.items():
        if flags <= _cpu_flags():
            ops.set_cpu_isa(name)
            yield name
    ops.set_cpu_isa(before)


def _assert_close(y: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    assert y.shape == expected.shape
    wrong = ~((y.double() - expected).abs() <= tolerance)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        pytest.fail(f"y{at} = {y[at].item()}, expected {expected[at].item()} ± {tolerance[at]}")


def _check_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, group: int, stored: Tensor
) -> None:
    """Compare int8_linear with float64 sums of exact dots, computed from the reference's codes."""
    K, N = x.shape[-1], weight.shape[0]
    codes, x_scale = activation.quantize_activation(torch.atleast_2d(x).flatten(0, -2), group)
    G = x_scale.shape[1]
    exact = torch.einsum(
        "mgk,ngk->mgn",
        codes.double().reshape(codes.shape[0], G, K // G),
        weight.double().reshape(N, G, K // G),
    )
    terms = exact * x_scale.double()[:, :, None] * scale.double()[:, 0]
    expected = terms.sum(1) + (0 if bias is None else bias.double())
    # Float32 rounds each group's dot, its product with x_scale and its addition, then the products
    # and sums with weight_scale and bias: G + 4 roundings of values no larger than `magnitude`.
    magnitude = terms.abs().sum(1) + (0 if bias is None else bias.double().abs())
    tolerance = (G + 4) * 2**-24 * magnitude
    if x.dtype != torch.float32:  # and the store rounds once more; 2⁻²⁴ is float16's least value
        tolerance += ROUNDOFF[x.dtype] * (expected.abs() + tolerance) + 2**-24
    y = ops.int8_linear(x, stored, scale, bias, group)
    assert y.dtype == x.dtype
    _assert_close(y, expected.reshape(*x.shape[:-1], N), tolerance.reshape(*x.shape[:-1], N))


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


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_int8_linear_of_any_shape(data: st.DataObject) -> None:
    M, N, K = (data.draw(st.integers(1, top)) for top in (20, 90, 140))
    group = data.draw(st.sampled_from([0, *(g for g in range(1, K + 1) if K % g == 0)]))
    dtype = data.draw(st.sampled_from(DTYPES))
    x, weight, scale, bias = _inputs(M, N, K, dtype)
    for _ in _each_isa():
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9)}, r"weight must be \[5, 9\].*got \[5, 8\]"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
        ({"weight": torch.zeros(5, 8)}, "weight must be int8"),
        ({"weight_scale": torch.ones(5)}, r"weight_scale must be \[N, 1\]"),
        ({"weight_scale": torch.ones(5, 1).half()}, "weight_scale must be contiguous float32"),
        ({"bias": torch.zeros(4)}, r"bias must be \[5\], got \[4\]"),
        ({"activation_group_size": 3}, "activation group size 3 does not divide K=8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_what_was_given(change: dict[str, object], message: str) -> None:
    given = {
        "x": torch.zeros(2, 8),
        "weight": torch.zeros(5, 8, dtype=torch.int8),
        "weight_scale": torch.ones(5, 1),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        ops.int8_linear(**{**given, **change})


# -- quantize_activation --------------------------------------------------------------------------


def _check_quantize(x: Tensor, group: int) -> None:
    codes, scale = ops.quantize_activation(x, group)
    expected_codes, expected_scale = activation.quantize_activation(x, group)
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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=70))
def test_quantize_activation_of_any_floats(values: list[float]) -> None:
    x = torch.tensor(values)
    for _ in _each_isa():
        for dtype in DTYPES:
            _check_quantize(x.to(dtype), 0)
            _check_quantize(x.to(dtype), 1)


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


def _run_script(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def test_llmq_isa_forces_and_llmq_print_kernels_tells_once(isa: str) -> None:
    result = _run_script(LLMQ_ISA=isa, LLMQ_PRINT_KERNELS="1")
    assert result.stdout.splitlines() == [f"llmq: int8_linear M=2 N=3 K=8 -> {isa}"], result.stderr


def test_an_isa_that_does_not_run_is_named() -> None:
    with pytest.raises(ValueError, match="instruction set 'sse9' does not run here; portable"):
        ops.set_cpu_isa("sse9")
    result = _run_script(LLMQ_ISA="sse9")
    assert result.returncode != 0
    assert "instruction set 'sse9' does not run here" in result.stderr
