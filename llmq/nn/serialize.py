"""Makes a compressed layer from its description, for checkpoints."""

from __future__ import annotations

from typing import Any

import torch

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
