"""The ops of sparse weights: unstructured (bitmap), 2:4, blocks.

They differ in how values and positions are stored; decoded to [N, K], they compute the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats import bitmap, bitmap_tiles, block, semi_structured
from llmq.ops.checks import check_sparse
from llmq.ops.define import define
from llmq.ops.reference import coded_linear, float_linear
from llmq.runtime.dispatch import Format


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
        # In panels the offsets are of panels, not of rows; those always come with a scale. In tiles
        # they are of strips of 32 rows, of which there are whole ones without a scale.
        if self.weight_scale is not None:
            return self.weight_scale.shape[0]
        strips = self.weight_bitmask.dim() == 4
        return 32 * self.row_offsets.shape[0] if strips else self.row_offsets.numel() - 1

    def check(self) -> int:
        inputs = (self.activation_group_size, self.activation_scale)
        op, N = "bitmap_sparse_linear", self._rows()
        check_sparse(op, self.x, self.weight, N, self.weight_scale, self.bias, *inputs)
        return N

    @property
    def form(self) -> Format:
        tiles = self.weight_bitmask.dim() == 4
        return Format(8 * self.weight.element_size(), 0, self.activation_group_size, tiles)

    def _values(self) -> Tensor:
        stored = (self.weight, self.weight_bitmask, self.row_offsets)
        K = self.x.shape[-1]
        if self.weight_bitmask.dim() == 3:
            stored = torch.ops.llmq.unpack_bitmap_panels(*stored, self._rows(), K)
        elif self.weight_bitmask.dim() == 4:
            stored = bitmap_tiles.unpack(*stored, self._rows(), K)
        return bitmap.decode(*stored, K)

    def reference(self) -> Tensor:
        inputs = (self.activation_group_size, self.activation_scale)
        return _sparse_linear(self.x, self._values(), self.weight_scale, self.bias, *inputs)

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
        inputs = (self.activation_group_size, self.activation_scale)
        op, N = "semi_structured_linear", self.weight.shape[0]
        check_sparse(op, self.x, self.weight, N, self.weight_scale, self.bias, *inputs)
        return N

    @property
    def form(self) -> Format:
        return Format(8 * self.weight.element_size(), 0, self.activation_group_size)

    def _values(self) -> Tensor:
        return semi_structured.decode(self.weight, self.weight_meta, self.x.shape[-1])

    def reference(self) -> Tensor:
        inputs = (self.activation_group_size, self.activation_scale)
        return _sparse_linear(self.x, self._values(), self.weight_scale, self.bias, *inputs)

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
        inputs = (self.activation_group_size, self.activation_scale)
        op, N = "block_sparse_linear", self._rows()
        check_sparse(op, self.x, self.weight, N, self.weight_scale, self.bias, *inputs)
        return N

    @property
    def form(self) -> Format:
        return Format(8 * self.weight.element_size(), 0, self.activation_group_size)

    def _values(self) -> Tensor:
        K, N = self.x.shape[-1], self._rows()
        return block.decode(self.weight, self.block_index, self.block_offsets, K, N)

    def reference(self) -> Tensor:
        inputs = (self.activation_group_size, self.activation_scale)
        return _sparse_linear(self.x, self._values(), self.weight_scale, self.bias, *inputs)

    def dense(self) -> Tensor:
        return _scaled(self._values(), self.weight_scale)


define(
    "block_sparse_linear(Tensor x, Tensor weight, Tensor block_index, Tensor block_offsets, "
    "Tensor? weight_scale=None, Tensor? bias=None, int? activation_group_size=None, "
    "Tensor? activation_scale=None) -> Tensor",
    BlockSparseLinear,
)
