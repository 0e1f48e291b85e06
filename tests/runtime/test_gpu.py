"""What runs on a GPU, and how an op gets there; Triton's kernels are interpreted without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq.formats import activation
from llmq.nn import QuantLinear, SparseLinear
from llmq.ops.dense import CodebookLinear, Int8Linear, WeightOnlyLinear
from llmq.ops.sparse import BitmapSparseLinear, BlockSparseLinear, SemiStructuredLinear
from llmq.runtime import dispatch, gpu
from llmq.runtime.dispatch import OpShape
from tests.helpers import assert_equal, assert_within, generator, run_python
from tests.ops.test_ops import BIAS_AT, CASES, K, N
from tests.triton.device import DEVICE, GPU

HALF = torch.bfloat16


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget what was chosen, before and after a test that changes what there is to choose from."""
    caches = (dispatch.choose_gpu, dispatch.has_cuda, dispatch.capability, dispatch._found)
    for cache in (*caches, gpu._function):
        cache.cache_clear()
    yield
    for cache in (*caches, gpu._function):
        cache.cache_clear()


def _choose(op: str, M: int = 4, dtype: torch.dtype = HALF, op_shape: OpShape = OpShape()) -> Any:  # noqa: B008
    return dispatch.choose(op, "cuda", dtype, M, 64, 128, op_shape)


@pytest.mark.parametrize("op", dispatch.GPU_KERNELS)
def test_every_row_leads_to_a_kernel_for_any_number_of_tokens(op: str) -> None:
    for M in (1, 63, 64, 65, 1 << 20):
        kernel = _choose(op, M)
        assert kernel.name == "reference" or kernel.name.startswith(op), kernel
        assert kernel.reason
        assert (kernel.name != "reference") == (op in dispatch.TRITON_MODULES)


def test_the_reference_serves_what_no_kernel_takes(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _choose("quantize_activation", M=0).reason == "empty product"
    assert "float64" in _choose("quantize_activation", dtype=torch.float64).reason
    assert _choose("unheard_of").reason == "no kernel for unheard_of on GPUs"
    dispatch.choose_gpu.cache_clear()
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "capability", lambda index: (7, 5))
    kernel = _choose("quantize_activation")
    assert kernel.name == "reference" and "8.0, this GPU has 7.5" in kernel.reason
    dispatch.choose_gpu.cache_clear()
    monkeypatch.setattr(dispatch, "_found", lambda module: module != "triton")
    assert "triton not installed" in _choose("quantize_activation").reason
    assert not dispatch.has_fast_int8("cuda")


def test_cuda_kernels_come_first_for_few_tokens(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = "quantize_activation"
    calls = []

    def kernel(x: Tensor, group_size: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        calls.append(group_size)
        return activation.quantize_activation(x, group_size)

    with torch.library._scoped_library("llmq", "FRAGMENT") as library:
        assert not dispatch.has_cuda(op), "a schema without a kernel is none"
        dispatch.has_cuda.cache_clear()
        library.impl(f"cuda_{op}", kernel, "CUDA")
        library.impl(f"cuda_{op}", kernel, "CPU")
        monkeypatch.setitem(
            dispatch.GPU_KERNELS, op, ((8, ("cuda", "triton")), (1e9, ("triton", "cuda")))
        )
        assert _choose(op, 8).name == f"{op}_cuda"
        assert _choose(op, 9).name == f"{op}_triton"
        x = torch.randn(8, 16, device=DEVICE)
        codes, _ = gpu.run(op, (x, 4), lambda: None, OpShape(activation_group=4), 1)
        assert calls == [4]
        assert_equal(codes, activation.quantize_activation(x, 4)[0])
        dispatch.choose_gpu.cache_clear()
        monkeypatch.setattr(dispatch, "_found", lambda module: False)
        assert _choose(op, 9).name == f"{op}_cuda", "with CUDA alone"


@pytest.mark.parametrize("name", CASES)
def test_every_op_gets_through_to_its_kernel(name: str) -> None:
    op, arguments, _ = CASES[name]
    arguments = list(arguments)
    arguments[BIAS_AT[op]] = bias = torch.randn(2 * N, generator=generator(1))[::2]
    kind = {
        "int8_linear": Int8Linear,
        "weight_only_linear": WeightOnlyLinear,
        "codebook_linear": CodebookLinear,
        "bitmap_sparse_linear": BitmapSparseLinear,
        "semi_structured_linear": SemiStructuredLinear,
        "block_sparse_linear": BlockSparseLinear,
    }[op]
    x = torch.randn(2, 3, K, generator=generator(2))
    call = kind(x, *(t.to(DEVICE) if isinstance(t, Tensor) else t for t in arguments))
    call = call._replace(x=x.to(DEVICE))
    y = gpu.run(op, tuple(call), _refuse, call.op_shape, call.check())
    expected = call.reference()
    # Both sum K products in float32, in other orders, as three TF32 products on a GPU; and quantize
    # the same inputs to the same codes.
    most = x.to(DEVICE).abs() @ call.dense().abs().T + bias.to(DEVICE).abs()
    tolerance = (2 * K * 2.0**-23 + (2.0**-20 if GPU else 0.0)) * 1.02 * most.double()
    assert_within(y, expected, tolerance, name)


def _refuse() -> None:
    raise AssertionError("the reference ran")


def test_empty_sizes_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_function", lambda *_: _refuse())
    for shape in ((0, 8), (3, 0)):
        x = torch.zeros(shape, device=DEVICE)
        weight = torch.zeros(4, shape[1], dtype=torch.int8, device=DEVICE)
        call = Int8Linear(x, weight, torch.ones(4, 1, device=DEVICE))
        y = gpu.run("int8_linear", tuple(call), call.reference, call.op_shape, 4)
        assert_equal(y, torch.zeros(shape[0], 4, device=DEVICE))


def test_triton_is_not_imported_before_it_runs() -> None:
    code = """
import sys, torch, llmq
from llmq.runtime import dispatch
llmq.doctor()
dispatch.choose("quantize_activation", "cuda", torch.bfloat16, 1, 1, 64)
assert "triton" not in sys.modules and not any(m.startswith("llmq_kernels") for m in sys.modules)
"""
    run_python(code)


def test_choices_are_printed(capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setenv("LLMQ_PRINT_KERNELS", "1")
    gpu._print.cache_clear()
    x = torch.randn(3, 32, device=DEVICE)
    for _ in range(2):
        gpu.run("quantize_activation", (x, 0), lambda: None, OpShape(activation_group=0), 1)
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["llmq: quantize_activation M=3 N=1 K=32 -> quantize_activation_triton"]


needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def _layer(scheme: str = "w8a8", K: int = 128, N: int = 96) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_linear(torch.nn.Linear(K, N), scheme).to(DEVICE)


@needs_gpu
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-g64", "w8a16", "w4a16-g32", "w4a8-g64"])
def test_layers_are_captured_in_graphs_and_compiled_whole(scheme: str) -> None:
    layer = _layer(scheme)
    assert layer.kernel(4, HALF).name != "reference"
    x = torch.randn(4, 128, device=DEVICE, dtype=HALF)
    with torch.inference_mode():
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert_equal(y.clone(), expected, "in a graph")
        compiled = torch.compile(layer, fullgraph=True)
        assert_equal(compiled(x), expected, "compiled")


@needs_gpu
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", None])
def test_sparse_layers_hold_what_their_kernel_reads_and_give_it_back(scheme: str | None) -> None:
    torch.manual_seed(0)
    mask = torch.rand(96, 128) < 0.4
    linear = torch.nn.Linear(128, 96, dtype=HALF if scheme is None else torch.float32)
    layer = SparseLinear.from_linear(linear, scheme=scheme, mask=mask)
    expected, weight = layer.state_dict(), layer.dequantize()
    layer = layer.to(DEVICE)
    tiles = dispatch.has_cuda("bitmap_sparse_linear")
    assert (layer.weight_bitmask.dim() == 4) == tiles
    for name, tensor in layer.state_dict().items():
        assert_equal(tensor.cpu(), expected[name], name)
    for M in (1, 64, 65):
        x = torch.randn(M, 128, device=DEVICE, dtype=HALF)
        with torch.inference_mode():
            y = layer(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(x)
            graph.replay()
            assert_equal(captured.clone(), y, "in a graph")
        product = x.cpu().float() @ weight.T + layer.bias.cpu().float()
        error = (y.cpu().float() - product).norm() / product.norm()
        assert error < 0.02, (M, layer.kernel(M, HALF))
    for name, tensor in layer.cpu().state_dict().items():
        assert_equal(tensor, expected[name], name)


@needs_gpu
def test_runs_on_the_current_stream() -> None:
    layer, x = _layer(), torch.randn(512, 128, device=DEVICE, dtype=HALF)
    expected = layer(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        doubled = x * 2
        y = layer(doubled * 0.5)
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_x_lies() -> None:
    layer, x = _layer(), torch.randn(4, 128, device=DEVICE, dtype=HALF)
    expected = layer(x)
    assert_equal(layer.to("cuda:1")(x.to("cuda:1")).cpu(), expected.cpu())


@needs_gpu
def test_more_than_2_to_the_31_elements() -> None:
    layer = _layer("w8a8", K=64, N=128)
    x = torch.randn(1, 64, device=DEVICE, dtype=HALF).expand((1 << 24) + 5, 64)
    y = layer(x)
    assert y.numel() > 1 << 31
    assert_equal(y[-3:], layer(x[:3]))


@needs_gpu
def test_gradients_flow_through_the_kernels_of_the_gpu() -> None:
    layer, x = _layer(), torch.randn(3, 128, device=DEVICE, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.dequantize().sum(0).expand(3, 128)
    torch.testing.assert_close(x.grad, expected)
