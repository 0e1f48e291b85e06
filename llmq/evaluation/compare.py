"""The verb `compare`: an original and its compressed form side by side, as table, JSON and HTML."""

from __future__ import annotations

import heapq
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.evaluation import html, intervals
from llmq.evaluation.evaluate import Metrics, Tally, inference, model_bytes, progress
from llmq.evaluation.intervals import Interval
from llmq.evaluation.layer_errors import LayerError, by_kind, kind_rows, layer_errors
from llmq.models.batches import aligned, batches_of, by_row, logits_of, unpack

_ROWS = 1024  # rows of logits compared at once
ERROR_NOTE = (
    "‖y − y′‖ / ‖y‖ with y the original layer’s output and y′ the compressed one’s, both given the "
    "input that the layer has in the original."
)
_PROBE_TOKENS = 128  # of the first batch, through which the layers' outputs are compared


@dataclass(frozen=True)
class Report:
    """The outcome of `llmq.compare`.

    Args:
        original, compressed: metrics of both, None for encoders without labels.
        kl: mean KL divergence of the compressed model's next-token distribution from the
            original's, in nats per token; None for encoders.
        agreement: share of positions at which both models rank the same token first.
        cosine: mean cosine similarity of encoder outputs; None where there are logits.
        layers: output error of each compressed layer.
        intervals: 95 % confidence intervals over the rows of the data, by name: `"nll"`,
            `"perplexity"` (relative) and `"accuracy"` as compressed − original, `"kl"`,
            `"agreement"` and `"cosine"`. Empty if the data is a single row.
    """

    original: Metrics | None
    compressed: Metrics | None
    bytes_before: int
    bytes_after: int
    kl: float | None
    agreement: float | None
    cosine: float | None
    layers: list[LayerError] = field(default_factory=list)
    intervals: dict[str, Interval] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the rows of the table: name of the figure, original, compressed."""
        rows = [("megabytes", f"{self.bytes_before / 1e6:.1f}", f"{self.bytes_after / 1e6:.1f}")]
        if self.original and self.compressed:
            pairs = (
                ("perplexity", "perplexity", ".3f"),
                ("nll", "nll", ".4f"),
                ("accuracy", "accuracy", ".4f"),
                ("tokens/s", "tokens_per_second", ".0f"),
            )
            for title, name, form in pairs:
                values = [getattr(m, name) for m in (self.original, self.compressed)]
                if None not in values:
                    rows.append((title, *(format(v, form) for v in values)))  # type: ignore[arg-type]
        for title, name in (
            ("KL to the original", "kl"),
            ("same first choice", "agreement"),
            ("cosine similarity", "cosine"),
        ):
            if getattr(self, name) is not None:
                rows.append((title, "", f"{self.intervals.get(name, getattr(self, name)):.4f}"))
        return rows

    def verdicts(self) -> list[str]:
        """Return a sentence per difference: size, 95 % interval, and whether it is significant."""
        lines = []
        for name, unit in (("perplexity", "%"), ("accuracy", "points")):
            found = self.intervals.get(name)
            if found is not None:
                low, value, high = (100 * x for x in (found.low, found.value, found.high))
                told = "differs" if found.distinguishable else "does not differ"
                lines.append(
                    f"{name} {value:+.2f} {unit} [{low:+.2f}, {high:+.2f}] at 95 % over "
                    f"{found.rows} rows: {told} significantly from the original"
                )
        return lines

    def text(self, *, layers: bool = False) -> str:
        """Return the report as text: figures, then errors by kind of layer, then the worst layers.

        Args:
            layers: whether to list every layer instead of the five worst.
        """
        rows = [("", "original", "compressed"), *self.rows()]
        width = max(12, *(len(cell) + 2 for row in rows for cell in row[1:]))
        lines = [f"{title:<20}{left:>{width}}{right:>{width}}" for title, left, right in rows]
        lines += self.verdicts()
        if not self.layers:
            return "\n".join(lines)
        lines += ["", f"{'output error by kind of layer':<36}layers    median     worst  at depth"]
        for kind, count, median, worst, depth in kind_rows(self.layers):
            lines.append(f"  {kind:<34}{count:>6}{median:>10}{worst:>10}{depth:>10}")
        shown = self.layers if layers else heapq.nlargest(5, self.layers, _error_of)
        lines += ["", "output error of each layer:" if layers else "largest output errors:"]
        lines += [f"  {w.name:<50}{100 * w.output_error:>8.2f} %  {w.scheme}" for w in shown]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def print(self, *, layers: bool = False) -> None:
        """Print the figures, and errors by kind of layer; `layers` lists every layer."""
        print(self.text(layers=layers))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)

    def to_json(self, file: str | Path | None = None) -> str:
        """Return everything as JSON, and write it to `file` if one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if file is not None:
            Path(file).write_text(text, encoding="utf-8")
        return text

    def to_html(self, file: str | Path | None = None) -> str:
        """Return a page that needs no other file, and write it to `file` if one is given."""
        head = ("", "original", "compressed")
        parts = [html.cards(self._highlights()), html.table(head, self.rows())]
        parts += [html.paragraph(line) for line in self.verdicts()]
        if self.layers:
            parts.append("<h2>Error of each layer’s output</h2>")
            parts.append(html.paragraph(ERROR_NOTE, dim=True))
            parts.append(html.heat_maps({"": by_kind(self.layers)}, "depth"))
            kinds = ("kind of layer", "layers", "median", "worst", "at depth")
            parts.append(html.table(kinds, kind_rows(self.layers)))
            rows = [
                (w.name, f"{100 * w.output_error:.2f} %", w.scheme, w.kernel) for w in self.layers
            ]
            listed = html.table(("layer", "output error", "scheme", "kernel"), rows, find=True)
            parts.append(html.folded(f"All {len(rows)} layers", listed))
        page = html.page("llmq: original and compressed", parts)
        if file is not None:
            Path(file).write_text(page, encoding="utf-8")
        return page

    def _highlights(self) -> list[tuple[str, str]]:
        """Return what the page shows first, and what it is."""
        found = [(f"{self.bytes_before / self.bytes_after:.1f}×", "smaller checkpoint")]
        a, b = self.original, self.compressed
        if a and b:
            if a.perplexity and b.perplexity:
                change = f"{100 * (b.perplexity / a.perplexity - 1):+.1f} %"
                found.append((change, f"perplexity, {a.perplexity:.2f} → {b.perplexity:.2f}"))
            else:
                points = f"{100 * (b.accuracy - a.accuracy):+.2f}"
                found.append((points, "points of accuracy"))
            times = b.tokens_per_second / a.tokens_per_second
            said = f"{times:.1f}×" if times >= 0.95 else f"{times:.2f}× (slower)"
            found.append((said, "the original’s tokens/s on this data"))
        if self.agreement is not None:
            found.append((f"{100 * self.agreement:.1f} %", "same first choice"))
        if self.cosine is not None:
            found.append((f"{self.cosine:.4f}", "cosine similarity of embeddings"))
        return found


def _error_of(layer: LayerError) -> float:
    return layer.output_error


def compare(original: nn.Module, compressed: nn.Module, data: Any) -> Report:
    """Measure a compressed model against its original on the same data, without changing either.

    Layers are compared on the first 128 tokens: each compressed layer gets the input that it has in
    the original.

    Args:
        original: the model before compression (a deep copy, or loaded again).
        compressed: the same model after it.
        data: as `llmq.evaluate` takes it; for a bare encoder, batches need no labels.

    Raises:
        TypeError: if the data is of none of these forms, or a model is not an `nn.Module`.
        ValueError: if the data is empty or the two models' outputs have different shapes.

    Example:
        >>> report = llmq.compare(original, model, tokens)
        >>> print(report)
        >>> report.to_html("report.html")
    """
    batches = list(batches_of(data))
    if not batches:
        raise ValueError("data is empty")
    with inference(original), inference(compressed):
        device = next(original.parameters()).device
        args, kwargs, labels = unpack(_head(batches[0]), device)
        kwargs = {k: v for k, v in kwargs.items() if k != "labels" or labels is not None}
        encoder = logits_of(original(*args, **kwargs)) is None
        layers = layer_errors(original, compressed, args, kwargs)
        found = _measure(original, compressed, batches, encoder)
    sizes = model_bytes(original), model_bytes(compressed)
    judged = bool(found.original.labels)
    return Report(
        original=found.original.metrics(sizes[0]) if judged else None,
        compressed=found.compressed.metrics(sizes[1]) if judged else None,
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        kl=None if encoder else sum(found.kl) / sum(found.rows),
        agreement=None if encoder else sum(found.same) / sum(found.rows),
        cosine=sum(found.cosine) / len(found.cosine) if encoder else None,
        layers=layers,
        intervals=found.intervals(),
    )


def divergence(original: Tensor, compressed: Tensor) -> tuple[float, int]:
    """Return (Σ KL(original ‖ compressed) in nats, equal first choices) over rows of logits."""
    kl, same = divergences(original, compressed)
    return float(kl.double().sum()), int(same.sum())


def divergences(original: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(original ‖ compressed) in nats, and whether first choices are equal, by row."""
    kl, same = [], []
    for p, q in zip(original.split(_ROWS), compressed.split(_ROWS), strict=True):
        left, right = p.float().log_softmax(-1), q.float().log_softmax(-1)
        kl.append(F.kl_div(right, left, log_target=True, reduction="none").sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(kl), torch.cat(same)


@dataclass
class _Found:
    """Sums by row of the data: of both models' own outcomes, and of the distance between them."""

    original: Tally = field(default_factory=Tally)
    compressed: Tally = field(default_factory=Tally)
    kl: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)  # logits that were compared
    cosine: list[float] = field(default_factory=list)

    def intervals(self) -> dict[str, Interval]:
        """Return what the report tells with an interval."""
        found = {}
        if len(self.cosine) > 1:
            found["cosine"] = intervals.mean(self.cosine, [1] * len(self.cosine))
        if len(self.rows) > 1:
            found["kl"] = intervals.mean(self.kl, self.rows)
            found["agreement"] = intervals.share(self.same, self.rows)
        a, b = self.original, self.compressed
        if len(a.labels) > 1:
            found["nll"] = intervals.difference(a.nll, b.nll, a.labels)
            found["accuracy"] = intervals.share_difference(a.right, b.right, a.labels)
            if a.language:
                found["perplexity"] = intervals.exponential(found["nll"])
        return found


def _measure(
    original: nn.Module, compressed: nn.Module, batches: list[Any], encoder: bool
) -> _Found:
    """Run both models on each batch in turn."""
    found = _Found()
    pairs = ((original, found.original), (compressed, found.compressed))
    devices = [next(model.parameters()).device for model, _ in pairs]
    for batch in progress(batches, "compare"):
        outputs: list[Tensor] = []
        for (model, tally), device in zip(pairs, devices, strict=True):
            args, kwargs, labels = unpack(batch, device)
            output = tally.run(model, args, kwargs)
            if encoder:
                outputs.append(_hidden(output, kwargs.get("attention_mask")))
                continue
            if labels is None:
                logits = logits_of(output)
                assert logits is not None
                flat = logits.reshape(-1, logits.shape[-1])
                rows = torch.arange(flat.shape[0]) // max(flat.shape[0] // logits.shape[0], 1)
            else:
                flat, rows = tally.judge(*aligned(model, output, labels))
            outputs.append(flat.cpu())
        if outputs[0].shape != outputs[1].shape:
            raise ValueError(
                f"outputs differ in shape: {list(outputs[0].shape)}, {list(outputs[1].shape)}"
            )
        if encoder:
            found.cosine += F.cosine_similarity(outputs[0], outputs[1], dim=-1).tolist()
            continue
        kl, same = divergences(*outputs)
        found.kl += by_row(kl, rows.cpu())
        found.same += by_row(same, rows.cpu())
        found.rows += by_row(torch.ones_like(kl), rows.cpu())
    return found


def _hidden(output: Any, mask: Tensor | None) -> Tensor:
    """Return the mean-pooled sentence embeddings [B, K] of an encoder's output."""
    hidden = output.last_hidden_state.float()
    weights = torch.ones(hidden.shape[:2]) if mask is None else mask.float()
    weights = weights.to(hidden.device)[..., None]
    return ((hidden * weights).sum(1) / weights.sum(1)).cpu()


def _head(batch: Any) -> Any:
    return batch[:1, :_PROBE_TOKENS] if isinstance(batch, Tensor) else batch
