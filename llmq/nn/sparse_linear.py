"""`SparseLinear`: a linear layer that stores only the weights its mask keeps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.formats import bitmap, bitmap_tiles, block, semi_structured, uniform
from llmq.nn.base import (
    CompressedLayer,
    autocast,
    call,
    frozen,
    input_scale_of,
    linear_weight,
    wrong_width,
)
from llmq.nn.quant_linear import QuantLinear
from llmq.runtime import dispatch
from llmq.scheme import Pattern, Scheme, parse_pattern, resolve_scheme

_SPARSE_SCHEMES = "a uniform symmetric 8-bit scheme with one scale a channel or tensor"

_BITMAP = ("weight", "weight_bitmask", "row_offsets")

# The tensor that only this format has, and its op.
_SPARSE_OPS = {
    "weight_bitmask": "bitmap_sparse_linear",
    "weight_meta": "semi_structured_linear",
    "block_index": "block_sparse_linear",
}
_SPARSE_NAMES = (
    "weight",
    "weight_bitmask",
    "row_offsets",
    "weight_meta",
    "block_index",
    "block_offsets",
    "weight_scale",
    "input_scale",
    "bias",
)
_BESIDE = ("weight_scale", "input_scale", "bias")  # that are the same in every layout


class SparseLinear(CompressedLayer):
    """A linear layer that stores only the weights its mask keeps, int8 codes or floating point.

    Made by `from_linear` or `llmq.prune`. Its canonical tensors are those of the pattern's format
    (`llmq/formats/bitmap.py`, `semi_structured.py`, `block.py`), with `weight_scale` [N, 1] where
    values are int8, and `input_scale` [1] where activations are static. Unstructured values, int8
    or of 16 bits, are held on CUDA as bitmap tiles where the library has kernels for them; int8
    values on CPU as bitmap panels, whatever the pattern. Other floating-point values are held, and
    run, as a dense matrix. x is [..., K], y [..., N] in x's dtype; x of another width raises
    `ValueError`.

        >>> weight = torch.nn.Linear(64, 32)
        >>> mask = weight.weight.abs() > weight.weight.abs().median()
        >>> llmq.SparseLinear.from_linear(weight, scheme="w8a8", mask=mask).mask().sum()
        tensor(1024)
    """

    _resizable = ("weight", "block_index")
    weight: nn.Parameter
    weight_scale: nn.Parameter | None
    input_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: Pattern,
        scheme: Scheme | None,
        tensors: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._pattern = pattern
        self.scheme = scheme
        self._parameters.update({name: frozen(tensors.get(name)) for name in _SPARSE_NAMES})
        self._pack()

    @property
    def pattern(self) -> str:
        """Name of the sparsity pattern, as `llmq.prune` takes it."""
        return self._pattern.name

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        pattern: str | Pattern = "unstructured",
        *,
        scheme: Scheme | str | None = None,
        mask: Tensor | None = None,
        input_scale: Tensor | float | None = None,
    ) -> SparseLinear:
        """Keep the weights under `mask` of a dense or already compressed linear layer.

        Args:
            linear: `Linear` or `Conv1D`; or a `QuantLinear` or `SparseLinear`, whose int8 codes
                and scales are then kept as they are.
            pattern: what the mask obeys: `"unstructured"`, `"2:4"`, `"block"` or `"block-RxC"`.
            scheme: quantizes the values too; None keeps them as `linear` has them.
            mask: bool [N, K], True where a weight stays; None keeps those that are not zero.
            input_scale: the step of its inputs' codes, where a scheme's static activations are
                new; compressed layers keep their own.

        Raises:
            TypeError: if `linear` is no linear layer.
            ValueError: if the mask does not obey the pattern, the scheme cannot be sparse, or the
                input scale is missing, given for a dynamic scheme, or not finite and above 1e-30.
        """
        parsed = parse_pattern(pattern)
        if parsed.kind in ("structured", "layers"):
            raise ValueError(
                f"pattern {parsed.name} shrinks the model itself; use llmq.prune(model, "
                f'pattern="{parsed.name}")'
            )
        wanted = None if scheme is None else _sparse_scheme(resolve_scheme(scheme))
        if isinstance(linear, (QuantLinear, SparseLinear)):
            if wanted is not None and linear.scheme not in (None, wanted):
                raise ValueError(
                    f"layer is already {linear.scheme.name}; it cannot become {wanted.name}"
                )
            if mask is None and isinstance(linear, SparseLinear):
                mask = linear.mask()
            bias = None if linear.bias is None else linear.bias.data
            if linear.scheme is None:
                assert isinstance(linear, SparseLinear)
                values, weight_scale = linear.values_and_mask()[0], None
            else:
                wanted = _sparse_scheme(linear.scheme)
                values, weight_scale = _int8_values(linear)
                if input_scale is None and linear.input_scale is not None:
                    input_scale = linear.input_scale.data
        else:
            values, bias = linear_weight(linear)
            weight_scale = None
        if mask is None:
            mask = values != 0
        if wanted is not None and weight_scale is None:
            kept = torch.where(mask, values, values.new_zeros(()))
            encoded = uniform.encode(kept, bits=8, granularity=wanted.granularity)
            values, weight_scale = encoded.weight, encoded.weight_scale
        tensors = _encode_sparse(parsed, values, mask)
        tensors |= input_scale_of(wanted, input_scale, values.device)
        if weight_scale is not None:
            tensors["weight_scale"] = weight_scale
        if bias is not None:
            tensors["bias"] = bias
        layer = cls(values.shape[1], values.shape[0], parsed, wanted, tensors)
        return layer.train(linear.training)

    @property
    def op(self) -> str:
        """Name of the op in `torch.ops.llmq` that computes this layer as it is held now."""
        if self.scheme is None and self._is_dense():
            return "dense"
        for tensor, op in _SPARSE_OPS.items():
            if self._parameters[tensor] is not None:
                return op
        raise AssertionError("a SparseLinear without positions")

    def _is_dense(self) -> bool:
        return tuple(self.weight.shape) == (self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if (x.shape or (-1,))[-1] != self.in_features:  # a scalar has no width
            raise wrong_width(self.op, x, self.in_features)
        if self.scheme is None and self._is_dense():
            return F.linear(x, self.weight, self.bias)
        x = autocast(x)
        if self.scheme is None and self._in_tiles() and x.dtype != self.weight.dtype:
            with torch.autocast(x.device.type, enabled=False):
                weight = self.values_and_mask()[0]
            return F.linear(x, weight, self.bias)  # casts under autocast, else refuses
        group = self._activation_group()
        p, ops = self._parameters, torch.ops.llmq
        last = (p["weight_scale"], p["bias"], group, p["input_scale"])
        if p["weight_bitmask"] is not None:
            op = ops.bitmap_sparse_linear.default
            return call(op, x, p["weight"], p["weight_bitmask"], p["row_offsets"], *last)
        if p["weight_meta"] is not None:
            op = ops.semi_structured_linear.default
            return call(op, x, p["weight"], p["weight_meta"], *last)
        op = ops.block_sparse_linear.default
        return call(op, x, p["weight"], p["block_index"], p["block_offsets"], *last)

    def _activation_group(self) -> int | None:
        if self.scheme is None or self.scheme.activations is None:
            return None
        return self.scheme.activation_group_size or 0

    def _held(self) -> dict[str, Tensor]:
        return {n: p.data for n, p in self._parameters.items() if p is not None}

    def _in_panels(self) -> bool:
        bitmask = self._parameters.get("weight_bitmask")
        return bitmask is not None and bitmask.dim() > 2

    def _in_tiles(self) -> bool:
        bitmask = self._parameters.get("weight_bitmask")
        return bitmask is not None and bitmask.dim() == 4

    def _bitmap(self) -> dict[str, Tensor]:
        """Return the held tensors, panels or tiles as a canonical bitmap, of any pattern."""
        tensors = self._held()
        if self._in_panels():
            panels = torch.ops.llmq.unpack_bitmap_panels
            unpack = bitmap_tiles.unpack if self._in_tiles() else panels
            weight, bitmask, offsets = (tensors[name] for name in _BITMAP)
            plain = unpack(weight, bitmask, offsets, self.out_features, self.in_features)
            tensors.update(zip(_BITMAP, plain, strict=True))
        return tensors

    def values_and_mask(self) -> tuple[Tensor, Tensor]:
        """Return the stored values at their places, zeros elsewhere, and where; both [N, K]."""
        N, K = self.out_features, self.in_features
        if self.scheme is None and self._is_dense():
            return self.weight.data, _decode_mask(self._pattern, self._held(), N, K)
        pattern = Pattern("unstructured") if self._in_panels() else self._pattern
        return _decode_sparse(pattern, self._bitmap(), N, K)

    def dequantize(self) -> Tensor:
        """Return the weight that is stored, zeros included, float32 [N, K]."""
        values = self.values_and_mask()[0].float()
        return values if self.weight_scale is None else values * self.weight_scale.data

    def mask(self) -> Tensor:
        """Return which weights are stored, bool [N, K]; a stored weight may still be zero."""
        return self.values_and_mask()[1]

    def canonical(self) -> dict[str, Tensor]:
        tensors = self._bitmap()
        dense = self.scheme is None and self._is_dense()
        if dense or (self._in_panels() and self._pattern.kind != "unstructured"):
            encoded = _encode_sparse(self._pattern, *self.values_and_mask())
            kept = {n: tensors[n] for n in _BESIDE if n in tensors}
            tensors = encoded | kept
        return tensors

    def bytes(self) -> int:
        fixed = [self._parameters[n] for n in _BESIDE]
        size = sum(p.numel() * p.element_size() for p in fixed if p is not None)
        if self._pattern.kind != "unstructured" or self.weight.is_meta:
            return super().bytes()
        counted = self.scheme is None or self._in_tiles()
        kept = int(self.mask().sum()) if counted else self._kept_codes()
        bits = self.out_features * ((self.in_features + 7) // 8)
        offsets = 8 * (self.out_features + 1)
        return size + kept * self.weight.element_size() + bits + offsets

    def _kept_codes(self) -> int:
        row_offsets = self._parameters["row_offsets"]
        assert row_offsets is not None
        return int(row_offsets[-1])

    def _panels(self) -> dict[str, Tensor] | None:
        tensors = self._held()
        N, K = self.out_features, self.in_features
        weight = tensors["weight"]
        if N == 0 or K == 0 or weight.is_meta:
            return None
        if self._in_panels() or (self.scheme is None and self._is_dense()):
            return None
        if self._pattern.kind == "unstructured" and dispatch.keeps_tiles(
            weight.device, self.scheme, N, K, weight.numel(), weight.dtype
        ):
            bitmask, offsets = tensors["weight_bitmask"], tensors["row_offsets"]
            return tensors | bitmap_tiles.pack(weight, bitmask, offsets, K)._asdict()
        if self.scheme is None:
            tensors["weight"] = _decode_sparse(self._pattern, tensors, N, K)[0]
            return tensors
        if not dispatch.keeps_panels(weight.device, self.scheme):
            return None
        if self._pattern.kind != "unstructured":
            values, mask = _decode_sparse(self._pattern, tensors, N, K)
            kept = {n: tensors[n] for n in _BESIDE if n in tensors}
            tensors = kept | _encode_sparse(Pattern("unstructured"), values, mask)
        packed = torch.ops.llmq.pack_bitmap_panels(*(tensors[n] for n in _BITMAP), K)
        return tensors | dict(zip(_BITMAP, packed, strict=True))

    def _op_shape(self) -> dispatch.OpShape:
        bits, group = 8 * self.weight.element_size(), self._activation_group()
        return dispatch.OpShape(bits, 0, group, self._in_tiles())

    def kernel(self, M: int, dtype: torch.dtype = torch.float32) -> dispatch.Kernel:
        """Return the kernel that runs for M tokens of `dtype`, with the reason."""
        N, K = self.out_features, self.in_features
        return dispatch.choose(self.op, self.weight.device, dtype, M, N, K, self._op_shape())

    def config(self) -> dict[str, Any]:
        """Return what `empty_layer` needs to make a layer of these shapes, ready for JSON."""
        tensors = self.canonical()
        return {
            "type": "SparseLinear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": None if self.bias is None else str(self.bias.dtype).removeprefix("torch."),
            "scheme": None if self.scheme is None else asdict(self.scheme),
            "pattern": self.pattern,
            "dtype": str(tensors["weight"].dtype).removeprefix("torch."),
            "shapes": {name: list(t.shape) for name, t in tensors.items()},
        }

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pattern={self.pattern}, scheme={self.scheme.name if self.scheme else None}, "
            f"bias={self.bias is not None}"
        )


def _sparse_scheme(scheme: Scheme) -> Scheme:
    if scheme.method != "uniform" or scheme.bits != 8 or not scheme.symmetric:
        raise ValueError(f"sparse values need {_SPARSE_SCHEMES}, got {scheme.name}")
    if scheme.granularity == "group":
        raise ValueError(f"sparse values need {_SPARSE_SCHEMES}, got {scheme.name}")
    return scheme


def _int8_values(layer: QuantLinear | SparseLinear) -> tuple[Tensor, Tensor]:
    """Return the int8 codes [N, K] and scales [N, 1] of a layer that has such."""
    assert layer.weight_scale is not None
    if isinstance(layer, QuantLinear):
        return layer.canonical()["weight"], layer.weight_scale.data
    return layer.values_and_mask()[0], layer.weight_scale.data


def _encode_sparse(pattern: Pattern, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
    if pattern.kind == "unstructured":
        return bitmap.encode(values, mask)._asdict()
    if pattern.kind == "2:4":
        return semi_structured.encode(values, mask)._asdict()
    assert pattern.block is not None
    return block.encode(values, pattern.block, mask)._asdict()


def _decode_mask(pattern: Pattern, tensors: dict[str, Tensor], N: int, K: int) -> Tensor:
    if pattern.kind == "unstructured":
        return bitmap.decode_mask(tensors["weight_bitmask"], K)
    if pattern.kind == "2:4":
        return semi_structured.decode_mask(tensors["weight_meta"], K)
    assert pattern.block is not None
    return block.decode_mask(tensors["block_index"], tensors["block_offsets"], K, N, pattern.block)


def _decode_sparse(
    pattern: Pattern, tensors: dict[str, Tensor], N: int, K: int
) -> tuple[Tensor, Tensor]:
    """Return values [N, K] and mask [N, K] of canonical tensors."""
    mask = _decode_mask(pattern, tensors, N, K)
    weight = tensors["weight"]
    if pattern.kind == "unstructured":
        values = bitmap.decode(weight, tensors["weight_bitmask"], tensors["row_offsets"], K)
    elif pattern.kind == "2:4":
        values = semi_structured.decode(weight, tensors["weight_meta"], K)
    else:
        values = block.decode(weight, tensors["block_index"], tensors["block_offsets"], K, N)
    return values, mask
