"""The verb `evaluate`: quality, size and speed of one model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmq.evaluation import intervals
from llmq.evaluation.intervals import Interval
from llmq.models.batches import aligned, batches_of, by_row, counted, unpack
from llmq.nn import CompressedLayer

_ROWS = 1024  # rows of logits that one log-softmax takes: 200 MB at a vocabulary of 49,152


@dataclass(frozen=True)
class Metrics:
    """Quality, size and speed of one model on one set of data.

    Args:
        nll: mean negative log-likelihood of a label or next token, in nats.
        perplexity: exp(nll) for language models, None for classifiers.
        accuracy: share of labels that get the highest probability.
        tokens: number of labels.
        bytes: size of all parameters and persistent buffers in a checkpoint.
        tokens_per_second: tokens (or examples) that the model processes per second on this data.
        intervals: 95 % confidence intervals of `"nll"` and `"accuracy"` over the rows of the data;
            empty if the data is a single row.
    """

    nll: float
    perplexity: float | None
    accuracy: float
    tokens: int
    bytes: int
    tokens_per_second: float
    intervals: dict[str, Interval] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"nll {self.intervals.get('nll', self.nll):.4f}"]
        if self.perplexity is not None:
            parts.append(f"perplexity {self.perplexity:.3f}")
        parts.append(f"accuracy {100 * self.accuracy:.2f} %")
        parts.append(f"{self.tokens} labels")
        parts.append(f"{self.bytes / 1e6:.1f} MB")
        parts.append(f"{self.tokens_per_second:.0f} tokens/s")
        return ", ".join(parts)


@dataclass
class Tally:
    """What a model got right, summed by row of the data: a window, document or example."""

    nll: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    inputs: int = 0
    seconds: float = 0.0
    language: bool = True  # whether labels are tokens, so that there is a perplexity

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the model's output, and take its time."""
        started = time.perf_counter()
        output = model(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        self.inputs += _tokens(args, kwargs)
        return output

    def judge(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Count what `aligned` gave; returns the logits [rows, vocabulary] that count, and rows."""
        self.language &= logits.dim() == 3
        flat, targets, rows = counted(logits, labels)
        parts = zip(flat.split(_ROWS), targets.split(_ROWS), strict=True)
        nll = torch.cat([F.cross_entropy(p.float(), t, reduction="none") for p, t in parts])
        right = flat.argmax(-1) == targets
        self.nll += by_row(nll, rows)
        self.right += by_row(right, rows)
        self.labels += by_row(torch.ones_like(right), rows)
        return flat, rows

    def metrics(self, size: int) -> Metrics:
        """Return the outcome for a model of `size` bytes."""
        count = int(sum(self.labels))
        if count == 0:
            raise ValueError("data holds no label to measure; give at least two tokens or a batch")
        mean = sum(self.nll) / count
        found = {}
        if len(self.labels) > 1:
            found["nll"] = intervals.mean(self.nll, self.labels)
            found["accuracy"] = intervals.share(self.right, self.labels)
        return Metrics(
            nll=mean,
            perplexity=(math.exp(mean) if mean < 700 else math.inf) if self.language else None,
            accuracy=sum(self.right) / count,
            tokens=count,
            bytes=size,
            tokens_per_second=self.inputs / max(self.seconds, 1e-9),
            intervals=found,
        )


def evaluate(model: nn.Module, data: Any) -> Metrics:
    """Measure `model` on `data`, without changing either.

    Args:
        model: a causal or encoder-decoder language model, or a classifier.
        data: text as token ids [T], cut into windows of 512, or [windows, T]; a pair (text or
            texts, tokenizer); or an iterable of batches: dicts of the model's arguments with
            `labels`, or pairs (inputs, targets). Each row of a batch is one observation of the
            confidence intervals.

    Raises:
        ValueError: if there is nothing to measure, or a batch has no labels.
        TypeError: if the data is of none of these forms.

    Example:
        >>> print(llmq.evaluate(model, tokens))
        nll 2.6873 [2.4201, 2.9545], perplexity 14.692, accuracy 47.90 %, 4088 labels, 538.1 MB, …
    """
    tally = Tally()
    with inference(model):
        device = next(model.parameters()).device
        for batch in progress(batches_of(data), "evaluate"):
            args, kwargs, labels = unpack(batch, device)
            output = tally.run(model, args, kwargs)
            tally.judge(*aligned(model, output, labels))
    return tally.metrics(model_bytes(model))


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's tensors as a checkpoint holds them, shared ones once."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        if isinstance(module, CompressedLayer):
            tensors = module.canonical()
            # What is packed is another tensor under the same name: the Parameter tells if shared.
            keys = {name: id(module._parameters.get(name, name)) for name in tensors}
            for name, tensor in tensors.items():
                if module._parameters.get(name) is None or keys[name] not in seen:
                    total += tensor.numel() * tensor.element_size()
                seen.add(keys[name])
            continue
        held: dict[str, Tensor | None] = dict(module._parameters)
        held.update(
            (n, b)
            for n, b in module._buffers.items()
            if n not in module._non_persistent_buffers_set
        )
        for owned in held.values():
            if owned is not None and id(owned) not in seen:
                seen.add(id(owned))
                total += owned.numel() * owned.element_size()
    return total


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode without gradients, and back as each module was."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.numel() if not value.is_floating_point() else value.shape[0]
    return 0


def progress(batches: Iterable[Any], what: str) -> Iterable[Any]:
    """Return `batches` with a progress bar once it has taken more than a second."""
    bar: Iterable[Any] = tqdm(batches, desc=what, unit="batch", delay=1, leave=False)
    return bar
