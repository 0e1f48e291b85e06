"""What a transformers model is besides its weights, and making it again without them."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Fields that make transformers fetch code or weights from elsewhere; nothing we load needs them.
_FETCHING = re.compile(
    r"auto_map|quantization_config|use_pretrained_backbone|trust_remote_code"
    r"|_?(attn|experts)_implementation(_internal)?"
)
_KERNELS = {
    "_attn_implementation": ("eager", "sdpa", "flex_attention"),
    "_experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
# Fields from which configurations make lists, and models make layers.
_COUNTS = re.compile(r"layer|label|block|depth", re.IGNORECASE)
_MAX_COUNT = 1 << 16


def describe(model: nn.Module) -> dict[str, Any]:
    """Return class, configurations and implementations of a transformers model, ready for JSON.

    Raises:
        TypeError: if the model is not one that `build` could make again.
    """
    kind = type(model).__name__
    transformers = sys.modules.get("transformers")  # whoever has such a model has imported it
    if transformers is None or _find(transformers, kind) is not type(model):
        raise TypeError(
            f"llmq.save writes transformers' own models, which llmq.load can make again by name, "
            f"got {kind}; give the model inside where it is wrapped (model.module, "
            f"model._orig_mod), or keep the weights of any module, in the same canonical layout, "
            f"with torch.save(model.state_dict(), file)"
        )
    given: Any = model
    generation = getattr(given, "generation_config", None)
    implementations = {}
    for name, known in _KERNELS.items():
        value = getattr(given.config, name, None)
        if value in known:
            implementations[name] = value
    try:
        return {
            "architecture": kind,
            "config": json.loads(json.dumps(_without_fetching(given.config.to_dict()))),
            "implementations": implementations,
            "generation_config": None
            if generation is None
            else json.loads(generation.to_json_string(use_diff=True)),
        }
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the configuration of {kind} cannot be written as JSON: {error}"
        ) from error


def build(description: dict[str, Any], *, numbers: int, tensors: int) -> nn.Module:
    """Return the model of `describe`, its parameters without values on the meta device.

    Buffers have the values that the class gives them, on CPU.

    Args:
        description: from `describe`; other entries are ignored.
        numbers: how many tensor elements the class may make, so that a configuration that was
            tampered with cannot take all memory.
        tensors: how many tensors it may make.

    Raises:
        ValueError: if transformers is missing, has no such class, or cannot make it.
    """
    kind = description["architecture"]
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"the checkpoint holds transformers' {kind}; pip install 'llmq-kernels[transformers]'"
        ) from error
    found = _find(transformers, kind)
    if found is None:
        raise ValueError(f"transformers {transformers.__version__} has no model class {kind!r}")
    config = _without_fetching(description["config"])
    _check_counts(config)
    try:
        made = found.config_class.from_dict(config)
        for name, value in description["implementations"].items():
            if value in _KERNELS[name]:
                setattr(made, name, value)
        with _parameters_on_meta(), _Limit(numbers, tensors):
            model = found(made)
        if description["generation_config"] is not None:
            model.generation_config = transformers.GenerationConfig.from_dict(
                description["generation_config"]
            )
    except Exception as error:  # what a class makes of a foreign configuration, nobody can list
        raise ValueError(f"describes no model that {kind} can make: {error}") from error
    assert isinstance(model, nn.Module)
    return model


def _find(transformers: Any, kind: Any) -> Any:
    """Return the model class that transformers exports as `kind`, None if there is none."""
    try:
        found = getattr(transformers, kind, None) if isinstance(kind, str) else None
    except ImportError:  # a class whose own dependencies are missing
        return None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return None
    return found if getattr(found, "config_class", None) is not None else None


def _without_fetching(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            name: _without_fetching(value)
            for name, value in config.items()
            if not _FETCHING.fullmatch(str(name))
        }
    return [_without_fetching(value) for value in config] if isinstance(config, list) else config


def _check_counts(config: Any) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"describes no model: the configuration is {type(config).__name__}")
    for name, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif type(value) is int and value > _MAX_COUNT and _COUNTS.search(name):
            raise ValueError(f"describes no model: {name} is {value}")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let parameters that this thread makes have no values: drawing them takes seconds."""
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    register: Any = nn.modules.module.register_module_parameter_registration_hook
    handle = register(to_meta)
    try:
        yield
    finally:
        handle.remove()


class _Limit(TorchFunctionMode):
    """Stops before more tensors, or larger ones, are made than the checkpoint can have use for."""

    _FACTORIES = frozenset(
        {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange}
    )

    def __init__(self, numbers: int, tensors: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.tensors = tensors

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._FACTORIES:
            size = kwargs.get("size", args[0] if args else ())
            if isinstance(size, int):
                size = [n for n in args if isinstance(n, int)]
            self.numbers -= math.prod(abs(n) for n in size if isinstance(n, int))
            self.tensors -= 1
            if self.numbers < 0 or self.tensors < 0:
                raise ValueError("the configuration asks for far more than the checkpoint holds")
        return func(*args, **kwargs)
