"""The verb `compare`: an original and its compressed form side by side, as table, JSON and HTML."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.evaluation import intervals
from llmq.evaluation.evaluate import Metrics, Tally, inference, model_bytes, progress
from llmq.evaluation.intervals import Interval
from llmq.models.batches import aligned, batches_of, by_row, logits_of, unpack
from llmq.nn import CompressedLayer

_ROWS = 1024  # rows of logits compared at once
_PROBE_TOKENS = 128  # of the first batch, through which the layers' outputs are compared


@dataclass(frozen=True)
class LayerError:
    """How far one layer's output is from the original's: ‖y − y′‖ / ‖y‖, with its own input."""

    name: str
    scheme: str
    output_error: float
    kernel: str


@dataclass(frozen=True)
class Report:
    """The outcome of `llmq.compare`.

    Args:
        original, compressed: metrics of both, None for encoders without labels.
        kl: mean KL divergence of the compressed model's next-token distribution from the
            original's, in nats a token; None for encoders.
        agreement: share of positions at which both give the same token the highest probability.
        cosine: mean cosine similarity of encoder outputs; None where there are logits.
        layers: output error of each compressed layer.
        intervals: of 95 %, row of the data by row: `"nll"`, `"perplexity"` (a share) and
            `"accuracy"` of compressed − original, `"kl"`, `"agreement"` and `"cosine"`; none if
            the data is one row.
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
        """Return the table's rows: what, original, compressed."""
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
        """Say of each difference how large it is, and whether it can be told from zero."""
        lines = []
        for name, unit in (("perplexity", "%"), ("accuracy", "points")):
            found = self.intervals.get(name)
            if found is not None:
                low, value, high = (100 * x for x in (found.low, found.value, found.high))
                told = "can" if found.distinguishable else "cannot"
                lines.append(
                    f"{name} {value:+.2f} {unit} [{low:+.2f}, {high:+.2f}] at 95 % over "
                    f"{found.rows} rows: {told} be told from no difference"
                )
        return lines

    def __str__(self) -> str:
        rows = [("", "original", "compressed"), *self.rows()]
        width = max(12, *(len(cell) + 2 for row in rows for cell in row[1:]))
        lines = [f"{title:<20}{left:>{width}}{right:>{width}}" for title, left, right in rows]
        lines += self.verdicts()
        worst = sorted(self.layers, key=lambda layer: -layer.output_error)[:5]
        if worst:
            lines.append("largest output errors:")
            lines += [f"  {w.name:<50} {100 * w.output_error:6.2f} %  {w.scheme}" for w in worst]
        return "\n".join(lines)

    def print(self) -> None:
        """Print the table and the five layers with the largest errors."""
        print(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)

    def to_json(self, file: str | Path | None = None) -> str:
        """Return everything as JSON, and write it to `file` if one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if file is not None:
            Path(file).write_text(text)
        return text

    def to_html(self, file: str | Path | None = None) -> str:
        """Return a page that needs no other file, and write it to `file` if one is given."""
        plots = [] if not self.layers else [layer_plot({"": self.layers})]
        head = ("", "original", "compressed")
        parts = [html_table(head, self.rows())]
        parts += [f"<p>{html.escape(line)}</p>" for line in self.verdicts()]
        page = html_page("llmq: original and compressed", parts, plots)
        if file is not None:
            Path(file).write_text(page)
        return page


def compare(original: nn.Module, compressed: nn.Module, data: Any) -> Report:
    """Measure a compressed model against its original on the same data.

    Args:
        original: the model before compression (a deep copy, or loaded again).
        compressed: the same model after it.
        data: as `llmq.evaluate` takes it; for a bare encoder, batches need no labels.

    Raises:
        ValueError: if the data is empty or the two models' outputs have different shapes.
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


def layer_errors(
    original: nn.Module, compressed: nn.Module, args: Any, kwargs: dict[str, Any]
) -> list[LayerError]:
    """Give each compressed layer the input that it has in the original, and compare outputs."""
    before = dict(original.named_modules())
    pairs = [
        (name, before[name], module)
        for name, module in compressed.named_modules()
        if isinstance(module, CompressedLayer) and name in before and hasattr(module, "kernel")
    ]
    inputs: dict[str, tuple[Tensor, Tensor]] = {}
    with _recorded(pairs, inputs):
        original(*args, **kwargs)
    errors = []
    for name, _, module in pairs:
        if name not in inputs:
            continue
        x, y = inputs[name]
        device = next(module.parameters()).device
        given = module(x.to(device)).to(y.device)
        if given.shape != y.shape:  # a layer that structured pruning has shrunk
            continue
        norm = y.float().norm()
        error = float((given.float() - y.float()).norm() / norm) if norm > 0 else 0.0
        scheme = module.scheme.name if module.scheme else "float"  # type: ignore[union-attr]
        kernel = module.kernel(x.numel() // x.shape[-1]).name  # type: ignore[operator]
        errors.append(LayerError(name, str(scheme), error, kernel))
    return errors


@contextmanager
def _recorded(
    pairs: Sequence[tuple[str, nn.Module, nn.Module]], inputs: dict[str, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    handles = []
    for name, module, _ in pairs:

        def record(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                inputs[name] = (args[0].detach(), output.detach())

        handles.append(module.register_forward_hook(record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_plot(series: dict[str, list[LayerError]]) -> str:
    """Return an SVG of output errors by layer, one line a model; "" without matplotlib."""
    figure = new_figure(9, 3.5)
    if figure is None:
        return ""
    axes = figure.subplots()
    for title, layers in series.items():
        axes.plot([100 * layer.output_error for layer in layers], label=title, linewidth=1)
    axes.set_xlabel("compressed layer, in order of the model")
    axes.set_ylabel("output error, %")
    axes.set_yscale("log")
    if any(series):
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series))
    return svg(figure)


def new_figure(width: float, height: float) -> Any:
    """Return a matplotlib figure in inches, or None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Any) -> str:
    """Return a figure as an SVG element to put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def html_table(
    head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, text: bool = False
) -> str:
    """Return an HTML table of names, and of numbers or `text` behind them."""
    start = '<table class="text">' if text else "<table>"
    lines = [start, "<tr>" + "".join(f"<th>{html.escape(t)}</th>" for t in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def html_page(title: str, parts: list[str], plots: list[str]) -> str:
    """Return a whole page of HTML parts and SVG plots, without any outside file."""
    drawn = [plot for plot in plots if plot]
    if plots and not drawn:
        drawn = ["<p>Plots need matplotlib: pip install 'llmq-kernels[plots]'</p>"]
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}"
        "td,th{border-bottom:1px solid #ddd;padding:.3em .8em;text-align:right}"
        "td:first-child,th:first-child,.text td,.text th{text-align:left}"
        "svg{max-width:100%;height:auto}"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}{''.join(drawn)}</body></html>"
    )
