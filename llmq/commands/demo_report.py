"""What `llmq demo` measured, as text, as Markdown and as an HTML page."""

from __future__ import annotations

from typing import Any

from llmq.evaluation import html
from llmq.evaluation.compare import ERROR_NOTE
from llmq.evaluation.layer_errors import LayerError, by_kind

PROMPT = "In Python, a list is"
HEAD = (
    "model",
    "MB",
    "linear MB",
    "prefill tok/s",
    "decode tok/s",
    "perplexity",
    "to float32",
    "KL",
)


def cells(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table's cells, a row a model."""
    base = record["rows"][0]["perplexity"]
    return [
        (
            row["name"],
            f"{row['megabytes']:.1f}",
            f"{row['linear_megabytes']:.1f}",
            f"{row['prefill']:.0f}",
            f"{row['decode']:.1f}",
            f"{row['perplexity']:.2f}",
            f"{100 * (row['perplexity'] / base - 1):+.1f} %" if i else "",
            f"{row['kl']:.4f}",
        )
        for i, row in enumerate(record["rows"])
    ]


def recovery_line(record: dict[str, Any]) -> str:
    """Return what calibration and distillation bring back after pruning; "" with `--quick`."""
    r = record["recovery"]
    if not r:
        return ""
    naive, pruned, tuned = r["magnitude"], r["sparsegpt"], r["distilled"]
    return (
        f"Half of all weights pruned by magnitude: perplexity {naive['perplexity']:.1f} instead of "
        f"{r['original']:.2f}. Pruned with SparseGPT ({pruned['seconds']:.0f} s): "
        f"{pruned['perplexity']:.2f}. After {r['recipe']['steps']} steps of distillation from the "
        f"original ({tuned['seconds']:.0f} s): {tuned['perplexity']:.2f}, and KL "
        f"{tuned['kl']:.3f} instead of {pruned['kl']:.3f}."
    )


def _samples(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, text) of the models that still write as the original does, or nearly so."""
    most = 1.4 * record["rows"][0]["perplexity"]
    return [(row["name"], row["sample"]) for row in record["rows"] if row["perplexity"] < most]


def table(record: dict[str, Any]) -> str:
    """Return the record as plain text."""
    rows = [HEAD, *cells(record)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    if line := recovery_line(record):
        lines += ["", line]
    lines += ["", f"After {PROMPT!r}:"]
    lines += [f"  {name:<{widths[0]}}  {sample}" for name, sample in _samples(record)]
    return "\n".join([*lines, "", _setting(record)])


def markdown(record: dict[str, Any]) -> str:
    """Return the record's table in Markdown, for the README."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(record)]
    lines += ["", _setting(record)]
    if line := recovery_line(record):
        lines += ["", line]
    return "\n".join(lines)


def _setting(record: dict[str, Any]) -> str:
    m = record["machine"]
    return (
        f"{record['model']}; judged on {record['text']}; calibrated on {record['calibration']}; "
        f"{m['cpu']}, {m['threads']} threads, {m['isa']}, torch {m['torch']}; speeds interleaved, "
        f"batch 1, 512 tokens of prefill. KL is to float32, in nats a token."
    )


def page(record: dict[str, Any], layers: dict[str, list[LayerError]]) -> str:
    """Return the report as one HTML page without outside files."""
    rows = record["rows"]
    base = rows[0]["perplexity"]
    good = [row for row in rows if row["perplexity"] < 1.1 * base]
    best = max(good, key=lambda row: row["decode"])
    names = [row["name"] for row in rows]
    speeds = {what: [row[what] for row in rows] for what in ("prefill", "decode")}
    points = [
        html.Point(row["name"], row["decode"], 100 * (row["perplexity"] / base - 1)) for row in rows
    ]
    kinds = {name: by_kind(errors) for name, errors in layers.items()}
    parts = [
        html.cards(
            [
                (f"{best['decode'] / rows[0]['decode']:.1f}×", f"decode speed: {best['name']}"),
                (f"{best['prefill'] / rows[0]['prefill']:.1f}×", "prefill speed, same model"),
                (f"{rows[0]['megabytes'] / best['megabytes']:.1f}×", "smaller, same model"),
                (f"{100 * (best['perplexity'] / base - 1):+.1f} %", "perplexity, same model"),
            ]
        ),
        html.table(HEAD, cells(record)),
        html.paragraph(recovery_line(record)),
        html.paragraph(_setting(record), dim=True),
        "<h2>Speed</h2>",
        html.bars("float32", names, speeds, "tok/s"),
        "<h2>Speed and quality</h2>",
        html.paragraph(
            "Increase of perplexity over float32 (log scale): lower is better, further right is "
            "faster.",
            dim=True,
        ),
        html.scatter(points, "decode, tokens/s", 0.1),
        f"<h2>After “{PROMPT}”</h2>",
        html.table(("model", "text"), _samples(record), text=True),
        "<h2>Error of each layer’s output</h2>",
        html.paragraph(ERROR_NOTE, dim=True),
        html.heat_maps(kinds, "layer"),
        html.folded("All layers, in %", _layer_table(layers)),
    ]
    return html.page(f"llmq demo: {record['model']}", parts)


def _layer_table(layers: dict[str, list[LayerError]]) -> str:
    """Return a row a layer and a column a model."""
    errors = {
        model: {error.name: f"{100 * error.output_error:.2f}" for error in found}
        for model, found in layers.items()
    }
    names = dict.fromkeys(name for found in errors.values() for name in found)
    rows = [(name, *(found.get(name, "") for found in errors.values())) for name in names]
    return html.table(("layer", *errors), rows, find=True)
