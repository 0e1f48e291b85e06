"""The ops of sparse weights: unstructured (bitmap), 2:4, blocks.

They differ in how values and positions are stored; decoded to [N, K], they compute the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats import bitmap, bitmap_tiles, block, semi_structured
from llmq.ops.checks import check, check_bias, check_sparse, check_width, shown
from llmq.ops.define import define
from llmq.ops.reference import coded_linear, float_linear
from llmq.runtime.dispatch import OpShape


def _sparse_linear(
    x: Tensor,
    values: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    group_size: int | None,
    activation_scale: Tensor | None,
) -> Tensor:
    if weight_scale is None or group_size is None:
        return float_linear(x, _scaled(values, weight_scale), bias)
    return coded_linear(x, values, weight_scale, bias, group_size, activation_scale)


def _scaled(values: Tensor, weight_scale: Tensor | None) -> Tensor:
    return values.float() if weight_scale is None else values.float() * weight_scale


def _check_scale_rows(op: str, weight_scale: Tensor | None, N: int) -> None:
    if weight_scale is not None:
        message = f"weight_scale must be float32 [{N}, 1], got {shown(weight_scale)}"
        check(weight_scale.shape[0] == N, op, message)


class BitmapSparseLinear(NamedTuple):
    x: Tensor
    weight: Tensor
    weight_bitmask: Tensor
    row_offsets: Tensor
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    activation_group_size: int | None = None
    activation_scale: Tensor | None = None

    def _rows(self) -> int:
        # Panels of 16 and tiles of 32 rows fill up with zeros, which alone a scale tells from
        # rows; panels always come with one, and tiles without one have no such rows.
        if self.weight_scale is not None:
            return self.weight_scale.shape[0]
        tiles = self.weight_bitmask.dim() == 4
        return 32 * self.weight_bitmask.shape[0] if tiles else self.row_offsets.numel() - 1

    def check(self) -> int:
        op, bitmask, offsets = "bitmap_sparse_linear", self.weight_bitmask, self.row_offsets
        K = check_sparse(op, self.x, self.weight, (bitmask, offsets), *self[4:])
        N, dim = self._rows(), bitmask.dim()
        check(
            bitmask.dtype == torch.uint8 and 2 <= dim <= 4,
            op,
            f"weight_bitmask must be uint8 [N, K / 8], panels or tiles, got {shown(bitmask)}",
        )
        inputs, rows = {2: (8, 1), 3: (4, 16), 4: (128 // self.weight.element_size(), 32)}[dim]
        check_width(op, K, bitmask.shape[1], inputs)
        units = (N + rows - 1) // rows
        check(
            bitmask.shape[0] == units,
            op,
            f"weight_bitmask must have {units} {'rows' if dim == 2 else 'panels'} for {N} output "
            f"features, got {bitmask.shape[0]}",
        )
        expected = (units, bitmask.shape[1]) if dim == 4 else (units + 1,)
        check(
            offsets.dtype == torch.int64 and tuple(offsets.shape) == expected,
            op,
            f"row_offsets must be int64 {list(expected)}, got {shown(offsets)}",
        )
        values = list(self.weight.shape)
        check(
            len(values) == 1, op, f"weight must be the kept values, one after another, got {values}"
        )
        check_bias(op, self.bias, N)
        return N

    @property
    def op_shape(self) -> OpShape:
        tiles = self.weight_bitmask.dim() == 4
        return OpShape(8 * self.weight.element_size(), 0, self.activation_group_size, tiles)

    def _values(self) -> Tensor:
        stored = (self.weight, self.weight_bitmask, self.row_offsets)
        K = self.x.shape[-1]
        if self.weight_bitmask.dim() == 3:
            stored = torch.ops.llmq.unpack_bitmap_panels(*stored, self._rows(), K)
        elif self.weight_bitmask.dim() == 4:
            stored = bitmap_tiles.unpack(*stored, self._rows(), K)
        return bitmap.decode(*stored, K)

    def reference(self) -> Tensor:
        return _sparse_linear(self.x, self._values(), *self[4:])

    def dense(self) -> Tensor:
        return _scaled(self._values(), self.weight_scale)


define(
    "bitmap_sparse_linear(Tensor x, Tensor weight, Tensor weight_bitmask, Tensor row_offsets, "
    "Tensor? weight_scale=None, Tensor? bias=None, int? activation_group_size=None, "
    "Tensor? activation_scale=None) -> Tensor",
    BitmapSparseLinear,
)


class SemiStructuredLinear(NamedTuple):
    x: Tensor
    weight: Tensor
    weight_meta: Tensor
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    activation_group_size: int | None = None
    activation_scale: Tensor | None = None

    def check(self) -> int:
        op, shape, meta = "semi_structured_linear", list(self.weight.shape), self.weight_meta
        K = check_sparse(op, self.x, self.weight, (meta,), *self[3:])
        check(len(shape) == 2, op, f"weight must be [N, K / 2], got {shape}")
        check_width(op, K, 2 * shape[1])
        N, bytes_of_row = shape[0], (K + 7) // 8
        check(
            meta.dtype == torch.uint8 and tuple(meta.shape) == (N, bytes_of_row),
            op,
            f"weight_meta must be uint8 [{N}, {bytes_of_row}], got {shown(meta)}",
        )
        _check_scale_rows(op, self.weight_scale, N)
        check_bias(op, self.bias, N)
        return N

    @property
    def op_shape(self) -> OpShape:
        return OpShape(8 * self.weight.element_size(), 0, self.activation_group_size)

    def _values(self) -> Tensor:
        return semi_structured.decode(self.weight, self.weight_meta, self.x.shape[-1])

    def reference(self) -> Tensor:
        return _sparse_linear(self.x, self._values(), *self[3:])

    def dense(self) -> Tensor:
        return _scaled(self._values(), self.weight_scale)


define(
    "semi_structured_linear(Tensor x, Tensor weight, Tensor weight_meta, "
    "Tensor? weight_scale=None, Tensor? bias=None, int? activation_group_size=None, "
    "Tensor? activation_scale=None) -> Tensor",
    SemiStructuredLinear,
)


class BlockSparseLinear(NamedTuple):
    x: Tensor
    weight: Tensor
    block_index: Tensor
    block_offsets: Tensor
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    activation_group_size: int | None = None
    activation_scale: Tensor | None = None

    def _rows(self) -> int:
        return (self.block_offsets.numel() - 1) * self.weight.shape[1]

    def check(self) -> int:
        op, shape, index = "block_sparse_linear", list(self.weight.shape), self.block_index
        K = check_sparse(op, self.x, self.weight, (index, self.block_offsets), *self[4:])
        check(len(shape) == 3, op, f"weight must be blocks [B, R, C], got {shape}")
        check(
            index.dtype == torch.int32 and tuple(index.shape) == (shape[0],),
            op,
            f"block_index must be int32 [{shape[0]}], got {shown(index)}",
        )
        C, N = shape[2], self._rows()
        check(C > 0 and K % C == 0, op, f"expected a multiple of {C} input features, got {K}")
        _check_scale_rows(op, self.weight_scale, N)
        check_bias(op, self.bias, N)
        return N

    @property
    def op_shape(self) -> OpShape:
        return OpShape(8 * self.weight.element_size(), 0, self.activation_group_size)

    def _values(self) -> Tensor:
        K, N = self.x.shape[-1], self._rows()
        return block.decode(self.weight, self.block_index, self.block_offsets, K, N)

    def reference(self) -> Tensor:
        return _sparse_linear(self.x, self._values(), *self[4:])

    def dense(self) -> Tensor:
        return _scaled(self._values(), self.weight_scale)


define(
    "block_sparse_linear(Tensor x, Tensor weight, Tensor block_index, Tensor block_offsets, "
    "Tensor? weight_scale=None, Tensor? bias=None, int? activation_group_size=None, "
    "Tensor? activation_scale=None) -> Tensor",
    BlockSparseLinear,
)
