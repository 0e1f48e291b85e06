"""Where tests run Triton kernels: on a GPU where there is one, else interpreted on CPU tensors.

`tests/conftest.py` says so to Triton before any kernel is imported. Triton's interpreter cuts
float32 off to bfloat16 where GPUs round, and computes with bfloat16 as if its bits were integers:
mended here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def _as_gpus_do() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert: Any = interpreter._convert_float
    builder: Any = interpreter.InterpreterBuilder
    dot, binary, cast = builder.create_dot, builder.binary_op, builder.cast_impl

    def rounding(data: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if given.name == "fp32" and wanted.name == "bf16":
            rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(data, given, wanted, mode)

    def float_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.name == "bf16":
            a, b = (self.cast_impl(t, tl.float32) for t in (a, b))
        return dot(self, a, b, *rest)

    def float_binary(self: Any, a: Any, b: Any, op: Any) -> Any:
        if a.dtype.name != "bf16":
            return binary(self, a, b, op)
        a, b = (self.cast_impl(t, tl.float32) for t in (a, b))
        return self.cast_impl(binary(self, a, b, op), tl.bfloat16)

    def by_float(self: Any, source: Any, wanted: Any) -> Any:
        pair = (source.dtype.scalar, wanted.scalar)
        if tl.bfloat16 in pair and tl.float32 not in pair:
            source = cast(self, source, tl.float32)
        return cast(self, source, wanted)

    interpreter._convert_float = rounding
    builder.cast_impl = by_float
    builder.binary_op = float_binary
    builder.create_dot = float_dot


if not GPU:
    _as_gpus_do()
