"""What runs on a GPU, and how an op gets there; Triton's kernels are interpreted without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmq import dispatch, gpu
from llmq.dispatch import Format
from llmq.formats import activation
from tests.helpers import assert_equal, run_python
from tests.triton_device import DEVICE, GPU

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


def _choose(op: str, M: int = 4, dtype: torch.dtype = HALF, form: Format = Format()) -> Any:  # noqa: B008
    return dispatch.choose(op, "cuda", dtype, M, 64, 128, form)


@pytest.mark.parametrize("op", dispatch.GPU_KERNELS)
def test_every_row_leads_to_a_kernel_for_any_number_of_tokens(op: str) -> None:
    for M in (1, 63, 64, 65, 1 << 20):
        kernel = _choose(op, M)
        assert kernel.name == "reference" or kernel.name.startswith(op), kernel
        assert kernel.reason
        assert (kernel.name != "reference") == (op in dispatch.TRITON_MODULES) or kernel.name == (
            f"{op}_cuda"
        )


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

    def kernel(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        calls.append(group_size)
        return activation.quantize_activation(x, group_size)

    with torch.library._scoped_library("llmq", "FRAGMENT") as library:
        library.define(f"cuda_{op}(Tensor x, int group_size) -> (Tensor, Tensor)")
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
        codes, _ = gpu.run(op, (x, 4), lambda: None, Format(activation_group=4), 1)
        assert calls == [4]
        assert_equal(codes, activation.quantize_activation(x, 4)[0])
        dispatch.choose_gpu.cache_clear()
        monkeypatch.setattr(dispatch, "_found", lambda module: False)
        assert _choose(op, 9).name == f"{op}_cuda", "with CUDA alone"


def test_triton_is_not_imported_before_it_runs() -> None:
    code = """
import sys, torch, llmq
from llmq import dispatch
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
        gpu.run("quantize_activation", (x, 0), lambda: None, Format(activation_group=0), 1)
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["llmq: quantize_activation M=3 N=1 K=32 -> quantize_activation_triton"]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_ops_run_kernels_on_the_gpu() -> None:
    x = torch.randn(3, 64, device=DEVICE, dtype=HALF)
    codes, scale = torch.ops.llmq.quantize_activation(x, 16)
    expected = activation.quantize_activation(x, 16)
    assert_equal(codes, expected[0])
    assert_equal(scale, expected[1])
