"""Draws decoding speed against perplexity from `results/`, for the README and the documentation.

    python -m benchmarks.plots

Writes `docs/_static/decode_vs_perplexity.svg`, on a transparent ground and in colours that both
light and dark pages bear, and for the site `-light.svg` and `-dark.svg`.
Speeds are of one run of `model.py`, perplexities of `perplexity.py`; a form that either lacks is
not drawn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.results import FOLDER

SPEED = FOLDER / "intel-r-xeon-r-processor-avx512vnni" / "model_1_threads.json"
QUALITY = FOLDER / "amd-epyc-avx512vnni" / "perplexity.json"
TARGET = Path(__file__).parent.parent / "docs" / "_static"


class Point(NamedTuple):
    """A form's name in the records, its label, and where the label stands (points, alignment)."""

    name: str
    label: str
    offset: tuple[int, int] = (8, 0)
    align: str = "left"


OURS = (
    Point("w8a8-g64, lm_head too, accelerated", "w8a8-g64, accelerated"),
    Point("w8a8, lm_head too, accelerated", "w8a8, accelerated"),
    Point("w4a8-g32, lm_head too, accelerated", "w4a8-g32, accelerated"),
    Point("w8a8-g64, lm_head too", "w8a8-g64, not accelerated", (9, -7)),
)
LLAMA = (
    Point("llama.cpp F16", "F16"),
    Point("llama.cpp Q8_0", "Q8_0", (9, 6)),
    Point("llama.cpp Q4_0", "Q4_0"),
)
TORCH = (
    Point("float32", "float32", (9, 6)),
    Point("bfloat16", "bfloat16", (9, -7)),
    Point("torch dynamic int8", "dynamic int8", (-9, 0), "right"),
)
COLOURS = {  # by the end of the file's name: text, lines, then the three families
    "": ("#7a828e", "#8d949e", "#1d87c4", "#d9752f", "#8a929d"),  # on either ground
    "-light": ("#333a44", "#c9ced6", "#0b6fa4", "#c2571a", "#6b7280"),
    "-dark": ("#d5dae1", "#4a525e", "#6cc1f0", "#f0a066", "#a7b0bd"),
}


def draw(ground: str, speeds: dict[str, Any], quality: dict[str, float], machine: str) -> Path:
    """Write the chart for a ground of `COLOURS` and return its file."""
    text, line, *colours = COLOURS[ground]
    style = {
        "font.size": 11,
        "font.family": "DejaVu Sans",
        "svg.hashsalt": "llmq",
        "svg.fonttype": "path",
        "text.color": text,
        "axes.labelcolor": text,
        "xtick.color": text,
        "ytick.color": text,
        "axes.edgecolor": line,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(7.6, 4.6), layout="constrained")
        families = ((OURS, "llmq", "o"), (LLAMA, "llama.cpp", "s"), (TORCH, "PyTorch", "D"))
        for (points, title, marker), colour in zip(families, colours, strict=True):
            known = [p for p in points if p.name in speeds and p.name in quality]
            x = [quality[p.name] for p in known]
            y = [speeds[p.name]["decode"] for p in known]
            axes.scatter(x, y, s=64, color=colour, marker=marker, label=title, zorder=3)
            for point, at in zip(known, zip(x, y, strict=True), strict=True):
                axes.annotate(
                    point.label,
                    at,
                    point.offset,
                    textcoords="offset points",
                    ha=point.align,
                    va="center",
                    color=colour,
                    fontsize=10,
                    weight="bold" if title == "llmq" else "normal",
                )
        axes.set_xscale("log")
        ticks = [15, 16, 18, 20, 25, 30, 40, 50]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(14.3, 56)
        axes.set_ylim(0, None)
        axes.margins(y=0.12)
        axes.set_ylim(0, axes.get_ylim()[1])
        axes.grid(color=line, linewidth=0.6, alpha=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("perplexity (lower is better, logarithmic)")
        axes.set_ylabel("decoded tokens a second")
        axes.set_title(f"SmolLM2-135M, {machine}", loc="left", fontsize=11)
        axes.legend(frameon=False, loc="upper right", labelcolor=text)
        file = TARGET / f"decode_vs_perplexity{ground}.svg"
        figure.savefig(file, transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")
    return file


def main() -> None:
    """Draw both."""
    speed = json.loads(SPEED.read_text())
    quality = {r["name"]: r["perplexity"] for r in json.loads(QUALITY.read_text())["rows"]}
    made = speed["machine"]
    machine = f"batch 1, one core of an {made['cpu'].removesuffix(' Processor')}"
    machine = machine.replace("(R)", "") + " (AVX-512 VNNI)"
    for ground in COLOURS:
        print(draw(ground, speed["tokens_per_second"], quality, machine))


if __name__ == "__main__":
    main()
