"""llmq: makes Transformers smaller and faster without losing what they know.

>>> import llmq
>>> model = llmq.quantize(model, bits=8)
>>> model = llmq.prune(model, pruning_rate=0.5)
>>> llmq.fine_tune(model, train_data, epochs=10)
"""

from llmq.checkpoint import load, save
from llmq.compare import compare
from llmq.doctor import doctor
from llmq.evaluate import evaluate
from llmq.fine_tune import fine_tune
from llmq.nn import QuantEmbedding, QuantLinear, SparseLinear
from llmq.plan import plan
from llmq.prune import prune
from llmq.quantize import quantize
from llmq.scheme import Scheme

__all__ = [
    "QuantEmbedding",
    "QuantLinear",
    "Scheme",
    "SparseLinear",
    "compare",
    "doctor",
    "evaluate",
    "fine_tune",
    "load",
    "plan",
    "prune",
    "quantize",
    "save",
]
