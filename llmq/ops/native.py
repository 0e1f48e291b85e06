"""The ops that only the compiled library implements; their meaning is in `csrc`.

The CPU kernels' layouts of weights and their instruction set; and CUDA kernels, which take the
arguments of the op that they stand for and are called by `runtime/gpu.py`.
"""

from __future__ import annotations

from llmq.ops.define import library
from llmq.runtime import extension

library.define("pack_panels(Tensor weight, int bits) -> Tensor")
library.define("unpack_panels(Tensor packed, int bits, int N, int K) -> Tensor")
library.define(
    "pack_bitmap_panels(Tensor weight, Tensor weight_bitmask, Tensor row_offsets, int K) "
    "-> (Tensor, Tensor, Tensor)"
)
library.define(
    "unpack_bitmap_panels(Tensor weight, Tensor weight_bitmask, Tensor panel_offsets, int N, "
    "int K) -> (Tensor, Tensor, Tensor)"
)
library.define("cpu_isa() -> str")
library.define("set_cpu_isa(str isa) -> ()")

library.define(
    "cuda_quantize_activation(Tensor x, int group_size, Tensor? activation_scale=None) "
    "-> (Tensor, Tensor)"
)
library.define(
    "cuda_int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "int activation_group_size, Tensor? activation_scale=None) -> Tensor"
)
library.define(
    "cuda_weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_zero_point, Tensor? bias, int bits, int? activation_group_size) -> Tensor"
)
library.define(
    "cuda_semi_structured_linear(Tensor x, Tensor weight, Tensor weight_meta, "
    "Tensor? weight_scale, Tensor? bias, int? activation_group_size, "
    "Tensor? activation_scale=None) -> Tensor"
)
library.define(
    "cuda_bitmap_sparse_linear(Tensor x, Tensor weight, Tensor weight_bitmask, Tensor row_offsets, "
    "Tensor? weight_scale, Tensor? bias, int? activation_group_size, "
    "Tensor? activation_scale=None) -> Tensor"
)
library.define(
    "cuda_expand_bitmap(Tensor weight, Tensor weight_bitmask, Tensor row_offsets, int N, int K) "
    "-> Tensor"
)

extension.load()
