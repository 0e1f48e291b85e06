"""Compressed stand-ins for torch.nn layers."""

import llmq.ops  # noqa: F401  (defines torch.ops.llmq, which the layers call)
from llmq.nn.base import CompressedLayer, dense_weight, is_conv1d, linear_bytes, linear_weight
from llmq.nn.low_rank_linear import LowRankLinear
from llmq.nn.quant_embedding import QuantEmbedding, embedding_factor
from llmq.nn.quant_linear import QuantLinear
from llmq.nn.serialize import empty_layer
from llmq.nn.sparse_linear import SparseLinear

__all__ = [
    "CompressedLayer",
    "LowRankLinear",
    "QuantEmbedding",
    "QuantLinear",
    "SparseLinear",
    "dense_weight",
    "embedding_factor",
    "empty_layer",
    "is_conv1d",
    "linear_bytes",
    "linear_weight",
]
