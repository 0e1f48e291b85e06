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

from llmq.evaluate import (
    Metrics,
    aligned,
    batches_of,
    evaluate,
    inference,
    logits_of,
    model_bytes,
    progress,
    unpack,
)
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
    """

    original: Metrics | None
    compressed: Metrics | None
    bytes_before: int
    bytes_after: int
    kl: float | None
    agreement: float | None
    cosine: float | None
    layers: list[LayerError] = field(default_factory=list)

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
        for title, value in (
            ("KL to the original", self.kl),
            ("same first choice", self.agreement),
            ("cosine similarity", self.cosine),
        ):
            if value is not None:
                rows.append((title, "", f"{value:.4f}"))
        return rows

    def __str__(self) -> str:
        rows = [("", "original", "compressed"), *self.rows()]
        lines = [f"{title:<20}{left:>12}{right:>12}" for title, left, right in rows]
        worst = sorted(self.layers, key=lambda layer: -layer.output_error)[:5]
        if worst:
            lines.append("largest output errors:")
            lines += [f"  {w.name:<50} {100 * w.output_error:6.2f} %  {w.scheme}" for w in worst]
        return "\n".join(lines)

    def print(self) -> None:
        """Print the table and the five layers with the largest errors."""
        print(self)

    def to_json(self, file: str | Path | None = None) -> str:
        """Return everything as JSON, and write it to `file` if one is given."""
        text = json.dumps(asdict(self), indent=1)
        if file is not None:
            Path(file).write_text(text)
        return text

    def to_html(self, file: str | Path | None = None) -> str:
        """Return a page that needs no other file, and write it to `file` if one is given."""
        plots = [] if not self.layers else [layer_plot({"": self.layers})]
        head = ("", "original", "compressed")
        page = html_page("llmq: original and compressed", [html_table(head, self.rows())], plots)
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
        kl, agreement, cosine = _distances(original, compressed, batches, encoder)
    measured = [None, None] if encoder else [evaluate(m, batches) for m in (original, compressed)]
    return Report(
        original=measured[0],
        compressed=measured[1],
        bytes_before=model_bytes(original),
        bytes_after=model_bytes(compressed),
        kl=kl,
        agreement=agreement,
        cosine=cosine,
        layers=layers,
    )


def divergence(original: Tensor, compressed: Tensor) -> tuple[float, int]:
    """Return (Σ KL(original ‖ compressed) in nats, equal first choices) over rows of logits."""
    total, same = 0.0, 0
    for p, q in zip(original.split(_ROWS), compressed.split(_ROWS), strict=True):
        left, right = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float(F.kl_div(right, left, log_target=True, reduction="sum"))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return total, same


def _distances(
    original: nn.Module, compressed: nn.Module, batches: list[Any], encoder: bool
) -> tuple[float | None, float | None, float | None]:
    total = similarity = 0.0
    same = count = 0
    devices = [next(m.parameters()).device for m in (original, compressed)]
    for batch in progress(batches, "compare"):
        outputs = []
        for model, device in zip((original, compressed), devices, strict=True):
            args, kwargs, labels = unpack(batch, device)
            output = model(*args, **kwargs)
            if encoder:
                outputs.append(_hidden(output, kwargs.get("attention_mask")))
            elif labels is None:
                outputs.append(_matrix(logits_of(output)))
            else:
                logits, wanted = aligned(model, output, labels)
                outputs.append(_matrix(logits)[wanted.reshape(-1) != -100].cpu())
        if outputs[0].shape != outputs[1].shape:
            raise ValueError(
                f"outputs differ in shape: {list(outputs[0].shape)}, {list(outputs[1].shape)}"
            )
        count += outputs[0].shape[0]
        if encoder:
            similarity += float(F.cosine_similarity(outputs[0], outputs[1], dim=-1).sum())
        else:
            kl, equal = divergence(*outputs)
            total, same = total + kl, same + equal
    if encoder:
        return None, None, similarity / count
    return total / count, same / count, None


def _matrix(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits.reshape(-1, logits.shape[-1])


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
