"""What the description and tensors of a compressed layer must be, and making a layer of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmq.formats.activation import SMALLEST
from llmq.nn.base import CompressedLayer
from llmq.nn.quant_embedding import QuantEmbedding
from llmq.nn.quant_linear import QuantLinear
from llmq.nn.sparse_linear import SparseLinear
from llmq.scheme import Scheme, parse_pattern

_FIXED_DTYPES = {
    "weight_scale": torch.float32,
    "weight_codebook": torch.float32,
    "weight_zero_point": torch.int8,
    "input_scale": torch.float32,
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
                factor=float(config["factor"]),
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


def check_layer(name: str, layer: CompressedLayer, tensors: dict[str, Tensor]) -> None:
    """Raise unless canonical `tensors` are what `layer` holds, with finite scales.

    Where a sparse weight's values are is checked by its format, as it is decoded or packed.

    Args:
        name: of the layer in its model, for errors.
        layer: with or without values.
        tensors: canonical tensors by name.

    Raises:
        ValueError: naming the layer and the tensor.
    """
    shapes = _shapes(name, layer, tensors)
    if shapes.keys() != tensors.keys():
        missing, unknown = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
        raise ValueError(
            f"layer {name}: expected tensors {sorted(shapes)}; missing {sorted(missing)}, "
            f"unexpected {sorted(unknown)}"
        )
    for tensor, value in tensors.items():
        shape = list(value.shape)
        if shapes[tensor] and shape not in shapes[tensor]:
            would_do = " or ".join(map(str, shapes[tensor]))
            raise ValueError(f"layer {name}: {tensor} has shape {shape}, expected {would_do}")
        parameter = layer._parameters.get(tensor)
        if parameter is not None and parameter.dtype != value.dtype:
            raise ValueError(f"layer {name}: {tensor} is {value.dtype}, expected {parameter.dtype}")
    for tensor in ("weight_scale", "weight_codebook"):
        if tensor in tensors and not bool(torch.isfinite(tensors[tensor]).all()):
            raise ValueError(f"layer {name}: {tensor} has NaN or infinite values")
    if "input_scale" in tensors:
        scale = tensors["input_scale"]
        if not bool(((scale > SMALLEST) & torch.isfinite(scale)).all()):
            raise ValueError(
                f"layer {name}: input_scale is {scale.tolist()}, expected a finite number above "
                f"{SMALLEST}"
            )


def _shapes(
    name: str, layer: CompressedLayer, tensors: dict[str, Tensor]
) -> dict[str, list[list[int]]]:
    """Return the tensors that `layer` must have, each with the shapes it may have; none for any."""
    if isinstance(layer, QuantEmbedding):
        N, K = layer.num_embeddings, layer.embedding_dim
        return {"weight": [[N, K]], "weight_scale": [[N, 1]]}
    assert isinstance(layer, (QuantLinear, SparseLinear))
    N, K, scheme = layer.out_features, layer.in_features, layer.scheme
    shapes: dict[str, list[list[int]]] = {}
    if layer.bias is not None:
        shapes["bias"] = [[N]]
    if scheme is not None:
        scheme.check_fits(N, K, name)
        groups = 1 if scheme.group_size is None else K // scheme.group_size
        shapes["weight_scale"] = [[N, groups]]
        if scheme.activations == "static":
            shapes["input_scale"] = [[1]]
    if isinstance(layer, SparseLinear):
        return shapes | _sparse_shapes(layer, tensors)
    assert scheme is not None
    shapes["weight"] = [[N, K if scheme.bits == 8 else -(-K // 2)]]
    if not scheme.symmetric:
        shapes["weight_zero_point"] = shapes["weight_scale"]
    if scheme.method == "quantile":
        shapes["weight_codebook"] = [[rows, 1 << scheme.bits] for rows in (1, N)]
    return shapes


def _sparse_shapes(layer: SparseLinear, tensors: dict[str, Tensor]) -> dict[str, list[list[int]]]:
    N, K = layer.out_features, layer.in_features
    pattern = parse_pattern(layer.pattern)
    if pattern.kind == "unstructured":
        return {"weight": [], "weight_bitmask": [[N, -(-K // 8)]], "row_offsets": [[N + 1]]}
    if pattern.kind == "2:4":
        return {"weight": [[N, K // 2]], "weight_meta": [[N, -(-K // 8)]]}
    assert pattern.block is not None
    R, C = pattern.block
    blocks = tensors["block_index"].numel() if "block_index" in tensors else 0
    return {
        "weight": [[blocks, R, C]],
        "block_index": [[blocks]],
        "block_offsets": [[N // R + 1]],
    }
