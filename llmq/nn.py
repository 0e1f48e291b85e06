"""`QuantLinear`, `SparseLinear` and `QuantEmbedding`: compressed stand-ins for torch.nn layers.

A layer's parameters are either canonical (the storage of `llmq/formats`, which `state_dict`,
pickling and other devices see) or in the layout that the kernel of its device wants; it holds one
of the two, never both, and a tensor's number of dimensions tells which.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from llmq import dispatch, ops  # noqa: F401  (ops: defines torch.ops.llmq)
from llmq.formats import bitmap, block, codebook, semi_structured, uniform
from llmq.scheme import Pattern, Scheme, parse_pattern, resolve_scheme

_FLOAT32_TENSORS = ("weight_scale", "weight_codebook")
_SPARSE_SCHEMES = "a uniform symmetric 8-bit scheme with one scale a channel or tensor"

# A tied pair shares its Parameters; pickled, both must find the same canonical twin of each.
_twins: WeakIdKeyDictionary = WeakIdKeyDictionary()

LayerT = TypeVar("LayerT", bound="_CompressedLayer")


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def _autocast(x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def linear_weight(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight [N, K] and bias [N] or None of a `Linear`, or of a `Conv1D` as in GPT-2.

    Raises:
        TypeError: if `linear` is neither.
    """
    if isinstance(linear, nn.Linear):
        return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if type(linear).__name__ == "Conv1D" and hasattr(linear, "nf"):
        return linear.weight.detach().T, linear.bias.detach()
    raise TypeError(f"expected nn.Linear or transformers' Conv1D, got {type(linear).__name__}")


class _CompressedLayer(nn.Module):
    """Keeps canonical tensors to the outside and the device's layout inside."""

    def canonical(self) -> dict[str, Tensor]:
        """Return the canonical tensors by name, as `state_dict` holds them, bias included."""
        raise NotImplementedError

    def _panels(self) -> dict[str, Tensor] | None:
        """Return the tensors of the device's layout, or None where canonical is what runs."""
        raise NotImplementedError

    def _set(self, tensors: dict[str, Tensor]) -> None:
        """Hold exactly `tensors`; Parameters that stay keep their identity (tied layers)."""
        for name in list(self._parameters):
            if name not in tensors:
                self._parameters[name] = None
        for name, tensor in tensors.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                self._parameters[name] = _parameter(tensor)
            elif parameter.data is not tensor:
                parameter.data = tensor

    def _pack(self) -> None:
        packed = self._panels()
        if packed is not None:
            self._set(packed)

    def _unpack(self) -> None:
        self._set(self.canonical())

    def _apply(self: LayerT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerT:
        self._unpack()
        exact = {
            name: parameter.data
            for name in _FLOAT32_TENSORS
            if (parameter := self._parameters.get(name)) is not None
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            parameter = self._parameters[name]
            assert parameter is not None
            if parameter.dtype != torch.float32:  # .to(bfloat16) is for activations, not scales
                parameter.data = before.to(parameter.device)
        self._pack()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, tensor in self.canonical().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._unpack()
        for name, parameter in self._parameters.items():
            given = state_dict.get(prefix + name)
            if parameter is None or not isinstance(given, Tensor):
                continue
            # As many rows but other non-zeros: the same layer with another mask.
            other_mask = (
                isinstance(self, SparseLinear)
                and name in ("weight", "block_index")
                and given.shape[1:] == parameter.shape[1:]
            )
            if parameter.is_meta and (other_mask or given.shape == parameter.shape):
                empty = torch.empty(given.shape, dtype=parameter.dtype, device=given.device)
                self._parameters[name] = _parameter(empty)
            elif other_mask:
                parameter.data = parameter.new_empty(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        twins: dict[str, nn.Parameter | None] = dict.fromkeys(self._parameters)
        for name, tensor in self.canonical().items():
            parameter = self._parameters.get(name)
            if parameter is not None and parameter.data_ptr() == tensor.data_ptr():
                twins[name] = parameter
                continue
            twin = _twins[parameter]() if parameter is not None and parameter in _twins else None
            if twin is None or twin.shape != tensor.shape or not torch.equal(twin, tensor):
                twin = nn.Parameter(tensor, requires_grad=False)
                if parameter is not None:
                    _twins[parameter] = weakref.ref(twin)
            twins[name] = twin
        state["_parameters"] = twins
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()

    def bytes(self) -> int:
        """Bytes of the canonical tensors: what the layer takes in a checkpoint."""
        return sum(t.numel() * t.element_size() for t in self.canonical().values())


class QuantLinear(_CompressedLayer):
    """A linear layer with quantized weight: y = x Wᵀ + bias, x [..., K], y [..., N] in x's dtype.

    Made by `from_linear` or `llmq.quantize`. Parameters (`requires_grad=False`): `weight` int8,
    `weight_scale` float32 [N, groups], `weight_zero_point` int8 or None, `weight_codebook` float32
    or None, `bias` or None. Storage: `llmq/formats/uniform.py` and `codebook.py`.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    weight_codebook: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        tensors: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        for name in ("weight", "weight_scale", "weight_zero_point", "weight_codebook", "bias"):
            self.register_parameter(name, _parameter(tensors.get(name)))
        self._pack()

    @classmethod
    def from_linear(cls, linear: nn.Module, scheme: Scheme | str) -> QuantLinear:
        """Quantize a `Linear` or `Conv1D`, rounding each weight to the nearest code.

        Args:
            linear: with weight [N, K] in floating point.
            scheme: a `Scheme` or the name of a preset.

        Raises:
            TypeError: if `linear` is no linear layer.
            ValueError: if the weight is not finite or a group size does not divide K.
        """
        scheme = resolve_scheme(scheme)
        weight, bias = linear_weight(linear)
        scheme.check_fits(weight.shape[0], weight.shape[1])
        settings = {
            "bits": scheme.bits,
            "granularity": scheme.granularity,
            "group_size": scheme.group_size,
        }
        if scheme.method == "quantile":
            encoded = codebook.encode(weight, **settings)
        else:
            encoded = uniform.encode(weight, **settings, symmetric=scheme.symmetric)
        layer = cls.from_encoded(encoded, bias, scheme, in_features=weight.shape[1])
        return layer.train(linear.training)

    @classmethod
    def from_encoded(
        cls,
        encoded: uniform.UniformWeight | codebook.CodebookWeight,
        bias: Tensor | None,
        scheme: Scheme,
        *,
        in_features: int,
    ) -> QuantLinear:
        """Wrap canonical tensors that a format or an algorithm has made."""
        tensors = {n: t for n, t in encoded._asdict().items() if t is not None}
        if bias is not None:
            tensors["bias"] = bias
        return cls(in_features, encoded.weight_scale.shape[0], scheme, tensors)

    def forward(self, x: Tensor) -> Tensor:
        x = _autocast(x)
        scheme = self.scheme
        group = scheme.activation_group_size or 0
        if scheme.op == "int8_linear":
            return torch.ops.llmq.int8_linear(x, self.weight, self.weight_scale, self.bias, group)
        if scheme.op == "codebook_linear":
            return torch.ops.llmq.codebook_linear(
                x, self.weight, self.weight_codebook, self.weight_scale, self.bias, scheme.bits
            )
        return torch.ops.llmq.weight_only_linear(
            x,
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            scheme.bits,
            None if scheme.activations is None else group,
        )

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, float32 [N, K]."""
        tensors, bits, K = self.canonical(), self.scheme.bits, self.in_features
        if self.scheme.method == "quantile":
            codes, scale = tensors["weight"], tensors["weight_scale"]
            return codebook.decode(codes, tensors["weight_codebook"], scale, bits=bits, K=K)
        zero_point = tensors.get("weight_zero_point")
        return uniform.decode(
            tensors["weight"], tensors["weight_scale"], zero_point, bits=bits, K=K
        )

    def canonical(self) -> dict[str, Tensor]:
        tensors = {n: p.data for n, p in self._parameters.items() if p is not None}
        if tensors["weight"].dim() == 4:
            tensors["weight"] = torch.ops.llmq.unpack_panels(
                tensors["weight"], self.scheme.bits, self.out_features, self.in_features
            )
        return tensors

    def _panels(self) -> dict[str, Tensor] | None:
        tensors = {n: p.data for n, p in self._parameters.items() if p is not None}
        weight = tensors["weight"]
        if (
            weight.dim() == 4
            or weight.numel() == 0
            or not dispatch.keeps_panels(weight.device, self.scheme)
        ):
            return None
        tensors["weight"] = torch.ops.llmq.pack_panels(weight, self.scheme.bits)
        return tensors

    def kernel(self, M: int, dtype: torch.dtype = torch.float32) -> dispatch.Kernel:
        """Return the kernel that runs for M tokens of `dtype`, with the reason."""
        return dispatch.choose(
            self.scheme.op, self.weight.device, dtype, M, self.out_features, self.in_features
        )

    def config(self) -> dict[str, Any]:
        """Return what `empty_layer` needs to make a layer of these shapes, ready for JSON."""
        return {
            "type": "QuantLinear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": None if self.bias is None else str(self.bias.dtype).removeprefix("torch."),
            "scheme": asdict(self.scheme),
            "shapes": {name: list(t.shape) for name, t in self.canonical().items()},
        }

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme.name}, bias={self.bias is not None}"
        )


class SparseLinear(_CompressedLayer):
    """A linear layer that stores only the weights its mask keeps, int8 codes or floating point.

    Made by `from_linear` or `llmq.prune`. Its canonical tensors are those of the pattern's format
    (`llmq/formats/bitmap.py`, `semi_structured.py`, `block.py`), with `weight_scale` [N, 1] where
    values are int8. Without a sparse kernel that pays for its device, floating-point values are
    held, and run, as a dense matrix; int8 values on CPU as bitmap panels, whatever the pattern.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter | None
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
        self._parameters.update({name: _parameter(tensors.get(name)) for name in _SPARSE_NAMES})
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
    ) -> SparseLinear:
        """Keep the weights under `mask` of a dense or already compressed linear layer.

        Args:
            linear: `Linear` or `Conv1D`; or a `QuantLinear` or `SparseLinear`, whose int8 codes
                and scales are then kept as they are.
            pattern: what the mask obeys: `"unstructured"`, `"2:4"`, `"block"` or `"block-RxC"`.
            scheme: quantizes the values too; None keeps them as `linear` has them.
            mask: bool [N, K], True where a weight stays; None keeps those that are not zero.

        Raises:
            TypeError: if `linear` is no linear layer.
            ValueError: if the mask does not obey the pattern, or the scheme cannot be sparse.
        """
        parsed = parse_pattern(pattern)
        if parsed.kind == "structured":
            raise ValueError(
                "a structured pattern shrinks the matrices themselves; use llmq.prune(model, "
                'pattern="structured")'
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
                values, weight_scale = linear.dequantize(), None
                values = values.to(linear.weight.dtype)
            else:
                wanted = _sparse_scheme(linear.scheme)
                values, weight_scale = _int8_values(linear)
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
        if self.scheme is None and self._is_dense():
            return F.linear(x, self.weight, self.bias)
        x = _autocast(x)
        group = None
        if self.scheme is not None and self.scheme.activations is not None:
            group = self.scheme.activation_group_size or 0
        p = self._parameters
        if p["weight_bitmask"] is not None:
            return torch.ops.llmq.bitmap_sparse_linear(
                x,
                self.weight,
                p["weight_bitmask"],
                p["row_offsets"],
                self.weight_scale,
                self.bias,
                group,
            )
        if p["weight_meta"] is not None:
            return torch.ops.llmq.semi_structured_linear(
                x, self.weight, p["weight_meta"], self.weight_scale, self.bias, group
            )
        return torch.ops.llmq.block_sparse_linear(
            x,
            self.weight,
            p["block_index"],
            p["block_offsets"],
            self.weight_scale,
            self.bias,
            group,
        )

    def _values(self) -> Tensor:
        """Return the stored values at their places and zeros elsewhere, [N, K] in their dtype."""
        return _decode_sparse(self._pattern, self.canonical(), self.out_features, self.in_features)[
            0
        ]

    def dequantize(self) -> Tensor:
        """Return the weight that is stored, zeros included, float32 [N, K]."""
        values = self._values().float()
        return values if self.weight_scale is None else values * self.weight_scale.data

    def mask(self) -> Tensor:
        """Return which weights are stored, bool [N, K]; a stored weight may still be zero."""
        return _decode_sparse(self._pattern, self.canonical(), self.out_features, self.in_features)[
            1
        ]

    def canonical(self) -> dict[str, Tensor]:
        tensors = {n: p.data for n, p in self._parameters.items() if p is not None}
        N, K = self.out_features, self.in_features
        bitmask = tensors.get("weight_bitmask")
        if self.scheme is not None and bitmask is not None and bitmask.dim() == 3:
            names = ("weight", "weight_bitmask", "row_offsets")
            unpacked = torch.ops.llmq.unpack_bitmap_panels(*(tensors[n] for n in names), N, K)
            tensors.update(zip(names, unpacked, strict=True))
            if self._pattern.kind != "unstructured":
                plain = Pattern("unstructured")
                values, mask = _decode_sparse(plain, tensors, N, K)
                del tensors["weight_bitmask"], tensors["row_offsets"]
                tensors.update(_encode_sparse(self._pattern, values, mask))
        elif self.scheme is None and self._is_dense():
            mask = _decode_mask(self._pattern, tensors, N, K)
            tensors.update(_encode_sparse(self._pattern, tensors["weight"], mask))
        return tensors

    def _panels(self) -> dict[str, Tensor] | None:
        tensors = {n: p.data for n, p in self._parameters.items() if p is not None}
        N, K = self.out_features, self.in_features
        weight = tensors["weight"]
        if N == 0 or K == 0 or weight.is_meta:
            return None
        if self.scheme is None:
            if not self._is_dense():
                tensors["weight"] = _decode_sparse(self._pattern, tensors, N, K)[0]
            return tensors
        bitmask = tensors.get("weight_bitmask")
        if not dispatch.keeps_panels(weight.device, self.scheme) or (
            bitmask is not None and bitmask.dim() == 3
        ):
            return None
        if self._pattern.kind != "unstructured":
            values, mask = _decode_sparse(self._pattern, tensors, N, K)
            kept = {n: tensors[n] for n in ("weight_scale", "bias") if n in tensors}
            tensors = kept | _encode_sparse(Pattern("unstructured"), values, mask)
        names = ("weight", "weight_bitmask", "row_offsets")
        packed = torch.ops.llmq.pack_bitmap_panels(*(tensors[n] for n in names), K)
        return tensors | dict(zip(names, packed, strict=True))

    def kernel(self, M: int, dtype: torch.dtype = torch.float32) -> dispatch.Kernel:
        """Return the kernel that runs for M tokens of `dtype`, with the reason."""
        return dispatch.choose(
            self.op, self.weight.device, dtype, M, self.out_features, self.in_features
        )

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
    "bias",
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
    codes = layer.canonical()["weight"] if isinstance(layer, QuantLinear) else layer._values()
    return codes, layer.weight_scale.data


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


class QuantEmbedding(_CompressedLayer):
    """An embedding table kept as int8 with one scale a row: ids [...] to vectors [..., K].

    `tied_linear` gives the output layer that shares its tensors.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        tensors: dict[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.scheme = scheme
        self.dtype = dtype
        self.padding_idx = padding_idx
        self.register_parameter("weight", _parameter(tensors["weight"]))
        self.register_parameter("weight_scale", _parameter(tensors["weight_scale"]))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, scheme: Scheme | str) -> QuantEmbedding:
        """Quantize an embedding by row.

        Args:
            embedding: a plain `nn.Embedding`, weight [num_embeddings, K].
            scheme: uniform symmetric 8-bit, one scale a channel; its activations are those of the
                tied output layer.

        Raises:
            TypeError: if `embedding` is a subclass that may compute something else.
            ValueError: if the scheme is another, the weight not finite, or `max_norm` set.
        """
        scheme = resolve_scheme(scheme)
        if type(embedding) is not nn.Embedding:
            raise TypeError(f"expected nn.Embedding itself, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError("an embedding with max_norm changes its weights as it runs")
        if (
            scheme.bits != 8
            or scheme.method != "uniform"
            or not scheme.symmetric
            or scheme.granularity != "channel"
        ):
            raise ValueError(
                f"an embedding takes uniform symmetric 8-bit schemes by channel, got {scheme.name}"
            )
        scheme.check_fits(embedding.num_embeddings, embedding.embedding_dim)
        encoded = uniform.encode(embedding.weight.detach(), bits=8, granularity="channel")
        return cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            scheme,
            {"weight": encoded.weight, "weight_scale": encoded.weight_scale},
            dtype=embedding.weight.dtype,
            padding_idx=embedding.padding_idx,
        )

    def tied_linear(self, bias: Tensor | None = None) -> QuantLinear:
        """Return the output layer K → num_embeddings that shares this table's Parameters."""
        tensors = {"weight": self.weight.data, "weight_scale": self.weight_scale.data}
        if bias is not None:
            tensors["bias"] = bias
        layer = QuantLinear(self.embedding_dim, self.num_embeddings, self.scheme, tensors)
        self.weight.data = layer.weight.data
        layer.weight, layer.weight_scale = self.weight, self.weight_scale
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        # First the scales: F.embedding refuses ids out of range, plain indexing would wrap them.
        scale = F.embedding(ids, self.weight_scale)
        if self.weight.dim() == 4:
            panels = self.weight[ids // 16, :, ids % 16, :]
            codes = torch.bitwise_xor(panels.flatten(-2)[..., : self.embedding_dim], -128)
        else:
            codes = F.embedding(ids, self.weight)
        return (codes.float() * scale).to(self.dtype)

    def dequantize(self) -> Tensor:
        """Return the table that the codes stand for, float32 [num_embeddings, K]."""
        tensors = self.canonical()
        return tensors["weight"].float() * tensors["weight_scale"]

    def canonical(self) -> dict[str, Tensor]:
        tensors = {"weight": self.weight.data, "weight_scale": self.weight_scale.data}
        if self.weight.dim() == 4:
            tensors["weight"] = torch.ops.llmq.unpack_panels(
                self.weight.data, 8, self.num_embeddings, self.embedding_dim
            )
        return tensors

    def _panels(self) -> dict[str, Tensor] | None:
        # Rows are what a look-up wants; a tied output layer packs the shared Parameter for both.
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def config(self) -> dict[str, Any]:
        """Return what `empty_layer` needs to make a layer of these shapes, ready for JSON."""
        return {
            "type": "QuantEmbedding",
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "dtype": str(self.dtype).removeprefix("torch."),
            "scheme": asdict(self.scheme),
            "shapes": {name: list(t.shape) for name, t in self.canonical().items()},
        }

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"


_FIXED_DTYPES = {
    "weight_scale": torch.float32,
    "weight_codebook": torch.float32,
    "weight_zero_point": torch.int8,
    "weight_bitmask": torch.uint8,
    "weight_meta": torch.uint8,
    "row_offsets": torch.int64,
    "block_index": torch.int32,
    "block_offsets": torch.int32,
}


def empty_layer(config: dict[str, Any]) -> QuantLinear | SparseLinear | QuantEmbedding:
    """Return a layer of the shapes in `config` (a layer's `.config()`), on the meta device.

    `load_state_dict` fills it, on the device of the tensors it is given.

    Raises:
        ValueError: if the type is none of ours or a field is missing or out of range.
    """
    kind = config.get("type")
    try:
        scheme = None if config["scheme"] is None else Scheme(**config["scheme"])
        dtypes: dict[str, torch.dtype] = dict(_FIXED_DTYPES)
        dtypes["weight"] = torch.int8
        if kind == "SparseLinear" and scheme is None:
            dtypes["weight"] = _float_dtype(config["dtype"])
        if config.get("bias") is not None:
            dtypes["bias"] = _float_dtype(config["bias"])
        tensors = {
            name: torch.empty(shape, dtype=dtypes[name], device="meta")
            for name, shape in config["shapes"].items()
        }
        if kind == "QuantEmbedding":
            assert scheme is not None
            return QuantEmbedding(
                config["num_embeddings"],
                config["embedding_dim"],
                scheme,
                tensors,
                dtype=_float_dtype(config["dtype"]),
                padding_idx=config["padding_idx"],
            )
        features = (config["in_features"], config["out_features"])
        if kind == "QuantLinear":
            assert scheme is not None
            return QuantLinear(*features, scheme, tensors)
        if kind == "SparseLinear":
            return SparseLinear(*features, parse_pattern(config["pattern"]), scheme, tensors)
    except (KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"layer description is not one of llmq's: {error!r}") from error
    raise ValueError(f"unknown layer type {kind!r}; QuantLinear, SparseLinear or QuantEmbedding")


def _float_dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"expected the name of a floating-point dtype, got {name!r}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
