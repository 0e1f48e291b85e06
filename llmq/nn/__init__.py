"""Compressed stand-ins for torch.nn layers."""

from llmq.nn.base import CompressedLayer, linear_bytes, linear_weight
from llmq.nn.low_rank_linear import LowRankLinear
from llmq.nn.quant_embedding import QuantEmbedding, embedding_factor
from llmq.nn.quant_linear import QuantLinear
from llmq.nn.serialize import empty_layer
from llmq.nn.sparse_linear import SparseLinear
from llmq.ops import define as define  # defines torch.ops.llmq

__all__ = [
    "CompressedLayer",
    "LowRankLinear",
    "QuantEmbedding",
    "QuantLinear",
    "SparseLinear",
    "embedding_factor",
    "empty_layer",
    "linear_bytes",
    "linear_weight",
]
