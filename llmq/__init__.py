"""llmq: makes Transformers smaller and faster without losing what they know.

>>> import llmq
>>> model = llmq.quantize(model, bits=8)
>>> model = llmq.prune(model, pruning_rate=0.5)
>>> llmq.fine_tune(model, train_data, epochs=10)

Names are loaded when they are first used, so `import llmq` alone imports no torch. A program that
calls `torch.ops.llmq` without a layer of llmq imports `llmq.nn` first, which registers the ops.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from llmq.version import __version__

if TYPE_CHECKING:
    from llmq.commands.doctor import doctor as doctor
    from llmq.evaluation.compare import compare as compare
    from llmq.evaluation.evaluate import evaluate as evaluate
    from llmq.models.accelerate import accelerate as accelerate
    from llmq.models.accelerate import restore as restore
    from llmq.nn import QuantEmbedding as QuantEmbedding
    from llmq.nn import QuantLinear as QuantLinear
    from llmq.nn import SparseLinear as SparseLinear
    from llmq.planner.plan import plan as plan
    from llmq.pruning.prune import prune as prune
    from llmq.quantization.quantize import quantize as quantize
    from llmq.scheme import Scheme as Scheme
    from llmq.storage.checkpoint import load as load
    from llmq.storage.checkpoint import save as save
    from llmq.training.fine_tune import fine_tune as fine_tune

_MODULES = {
    "QuantEmbedding": "nn",
    "QuantLinear": "nn",
    "Scheme": "scheme",
    "SparseLinear": "nn",
    "accelerate": "models.accelerate",
    "compare": "evaluation.compare",
    "doctor": "commands.doctor",
    "evaluate": "evaluation.evaluate",
    "fine_tune": "training.fine_tune",
    "load": "storage.checkpoint",
    "plan": "planner.plan",
    "prune": "pruning.prune",
    "quantize": "quantization.quantize",
    "restore": "models.accelerate",
    "save": "storage.checkpoint",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(f"llmq.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    found = {module.name: module.ispkg for module in iter_modules(__path__)}
    if found.get(name):
        for module in _MODULES.values():  # so that llmq.formats.uniform is there, too
            import_module(f"llmq.{module}")
    if name in found:
        return import_module(f"llmq.{name}")
    raise AttributeError(f"module 'llmq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
