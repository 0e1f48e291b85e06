"""llmq: makes Transformers smaller and faster without losing what they know."""

from llmq.nn import QuantEmbedding, QuantLinear, SparseLinear
from llmq.scheme import Scheme

__all__ = ["QuantEmbedding", "QuantLinear", "Scheme", "SparseLinear"]
