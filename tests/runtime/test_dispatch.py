"""The one table that chooses kernels, and how its choices can be seen."""

from __future__ import annotations

import pytest
import torch

from llmq.nn import QuantLinear
from llmq.runtime import dispatch, extension
from llmq.scheme import Scheme, resolve_scheme
from tests.helpers import run_python


@pytest.mark.parametrize("op", sorted(dispatch.NATIVE_CPU_OPS))
def test_cpu_ops_run_native_where_the_library_is_built(op: str) -> None:
    kernel = dispatch.choose(op, "cpu", torch.float32, 4, 8, 16)
    expected = f"{op}_{dispatch.cpu_isa()}" if extension.load().loaded else "reference"
    assert kernel.name == expected and kernel.reason


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("int8_linear", "cpu", torch.float32, 0, 8, 16), "empty"),
        (("int8_linear", "meta", torch.float32, 4, 8, 16), "no kernel for int8_linear on meta"),
        (("block_sparse_linear", "cpu", torch.float32, 4, 8, 16), "block_sparse|library"),
        (("int8_linear", "cpu", torch.float64, 4, 8, 16), "float64|library"),
    ],
    ids=str,
)
def test_reference_serves_the_rest_and_says_why(arguments: tuple, reason: str) -> None:
    kernel = dispatch.choose(*arguments)
    assert kernel.name == "reference"
    assert any(part in kernel.reason for part in reason.split("|")), kernel.reason


@pytest.mark.parametrize(
    ("scheme", "fits"),
    [
        ("w8a8", True),
        ("w8a8-g64", True),
        ("w4a16-g32", True),
        (Scheme(bits=4, granularity="group", group_size=4), False),
        (Scheme(granularity="group", group_size=2), False),
        (Scheme(activations="dynamic", activation_group_size=6), False),
    ],
    ids=str,
)
def test_panels_hold_only_groups_that_fill_their_step(scheme: str | Scheme, fits: bool) -> None:
    held = dispatch.keeps_panels(torch.device("cpu"), resolve_scheme(scheme))
    assert held == (fits and extension.load().loaded)
    assert not dispatch.keeps_panels(torch.device("cuda"), resolve_scheme(scheme))


def test_choices_are_printed_once_a_shape() -> None:
    script = (
        "import torch; from llmq import QuantLinear\n"
        "layer = QuantLinear.from_linear(torch.nn.Linear(32, 16), 'w8a8')\n"
        "for _ in range(3): layer(torch.randn(2, 32))\n"
        "layer(torch.randn(5, 32))\n"
    )
    done = run_python(script, LLMQ_PRINT_KERNELS="1")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "llmq:" in line]
    ran = dispatch.cpu_isa() or "reference"
    assert [line.split(" -> ")[0] for line in lines] == [
        "llmq: int8_linear M=2 N=16 K=32",
        "llmq: int8_linear M=5 N=16 K=32",
    ]
    assert all(line.endswith(ran) for line in lines), lines


def test_layers_tell_their_kernel() -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(32, 16), "w8a8")
    assert layer.kernel(1) == dispatch.choose("int8_linear", "cpu", torch.float32, 1, 16, 32)
