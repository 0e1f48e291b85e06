"""llmq: makes Transformers smaller and faster without losing what they know.

>>> import llmq
>>> model = llmq.quantize(model, bits=8)
>>> model = llmq.prune(model, pruning_rate=0.5)
>>> llmq.fine_tune(model, train_data, epochs=10)
"""

from llmq.evaluation.compare import compare
from llmq.evaluation.evaluate import evaluate
from llmq.models.transformers import accelerate, restore
from llmq.nn import QuantEmbedding, QuantLinear, SparseLinear
from llmq.planner.plan import plan
from llmq.pruning.prune import prune
from llmq.quantization.quantize import quantize
from llmq.runtime.doctor import doctor
from llmq.scheme import Scheme
from llmq.storage.checkpoint import load, save
from llmq.training.fine_tune import fine_tune

__all__ = [
    "QuantEmbedding",
    "QuantLinear",
    "Scheme",
    "SparseLinear",
    "accelerate",
    "compare",
    "doctor",
    "evaluate",
    "fine_tune",
    "load",
    "plan",
    "prune",
    "quantize",
    "restore",
    "save",
]
