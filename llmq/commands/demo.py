"""`llmq demo`: a real language model compressed in several ways, and what each costs and gives."""

from __future__ import annotations

import copy
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from llmq.commands import bench, smollm2
from llmq.evaluation.compare import (
    LayerError,
    divergence,
    html_page,
    html_table,
    layer_errors,
    layer_plot,
    new_figure,
    svg,
)
from llmq.evaluation.evaluate import evaluate, inference, model_bytes
from llmq.models.accelerate import accelerate
from llmq.models.batches import WINDOW
from llmq.nn import CompressedLayer, QuantEmbedding
from llmq.pruning.prune import prune
from llmq.quantization.quantize import quantize
from llmq.storage.checkpoint import load, save
from llmq.training.fine_tune import fine_tune

SCHEMES = ("w8a8", "w8a8-g64", "w4a16-g32")
WHOLE = "w8a8-g64, skip=()"  # embeddings and output layer too
FAST = f"{WHOLE}, accelerated"  # a decoder layer in one call
SPARSE = "50 % sparse w8a8"
EVALUATED = 4096  # tokens of the text; the rest of it is for training
PROBED = 128  # of them, through which the layers' errors are taken
PROMPT = "In Python, a list is"


@dataclass(frozen=True)
class Recipe:
    """How the pruned model, and the original beside it, are fine-tuned."""

    steps: int = 32
    tokens: int = 256  # a sequence
    sequences: int = 2  # a step
    lr: float = 5e-4


@dataclass
class Row:
    """One model of the demo's table."""

    name: str
    megabytes: float
    linear_megabytes: float
    prefill: float
    decode: float
    perplexity: float
    kl: float
    sample: str


def main(args: Namespace) -> None:
    """Run the command."""
    record = run(args.output, quick=args.quick, fresh=args.fresh)
    if args.json:
        print(json.dumps(record, indent=1))
    else:
        print(markdown(record) if args.markdown else table(record))
        print(f"\n{args.output / 'demo.html'} and {args.output / 'demo.json'} hold the rest")


def text_tokens(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return (evaluation, training) token ids of `pydoc_data.topics`: disjoint parts of it."""
    from pydoc_data.topics import topics

    ids = torch.tensor(tokenizer("\n".join(topics.values()), verbose=False)["input_ids"])
    return ids[:EVALUATED], ids[EVALUATED:]


def training_batches(tokens: Tensor, recipe: Recipe) -> list[Tensor]:
    """Return as many batches [sequences, tokens] as the recipe has steps, drawn from all text."""
    rows = tokens[: tokens.numel() // recipe.tokens * recipe.tokens].view(-1, recipe.tokens)
    generator = torch.Generator().manual_seed(0)
    order: list[Tensor] = []
    while sum(o.numel() for o in order) < recipe.steps * recipe.sequences:
        order.append(torch.randperm(rows.shape[0], generator=generator))
    picked = torch.cat(order)[: recipe.steps * recipe.sequences]
    return list(rows[picked].view(recipe.steps, recipe.sequences, recipe.tokens))


def run(folder: Path, *, quick: bool = False, fresh: bool = False) -> dict[str, Any]:
    """Compress SmolLM2-135M, measure everything, write `folder`, and return the record.

    Args:
        folder: gets `demo.json` and `demo.html`.
        quick: a quarter of the text and four steps of fine-tuning, to see that all of it works.
        fresh: fine-tunes again although a result is cached.
    """
    original, tokenizer = smollm2.load()
    evaluated, trained = text_tokens(tokenizer)
    recipe = Recipe(steps=4) if quick else Recipe()
    evaluated = evaluated[:1024] if quick else evaluated
    models = {"float32": original}
    for scheme in SCHEMES:
        models[scheme] = quantize(copy.deepcopy(original), scheme=scheme)
    models[WHOLE] = quantize(copy.deepcopy(original), scheme="w8a8-g64", skip=())
    models[FAST] = accelerate(copy.deepcopy(models[WHOLE]))
    recovery, models[SPARSE] = recovered(original, evaluated, trained, recipe, fresh=fresh)
    quality = qualities(models, evaluated)
    speed = bench.model_speeds(models, rounds=1 if quick else 2)
    rows = []
    for name, model in models.items():
        linear = sum(_linear_bytes(model))
        rows.append(
            Row(
                name=name,
                megabytes=model_bytes(model) / 1e6,
                linear_megabytes=linear / 1e6,
                prefill=speed[name]["prefill"],
                decode=speed[name]["decode"],
                perplexity=quality[name][0],
                kl=quality[name][1],
                sample=sample(model, tokenizer),
            )
        )
    probe = {"input_ids": evaluated[None, :PROBED]}
    with torch.inference_mode():
        layers = {
            name: layer_errors(original, model, (), probe)
            for name, model in models.items()
            if name != "float32"
        }
    record = {
        "model": "SmolLM2-135M-Instruct",
        "text": f"pydoc_data.topics, first {evaluated.numel()} tokens, windows of {WINDOW}",
        "machine": bench.machine(),
        "rows": [asdict(row) for row in rows],
        "recovery": recovery,
        "layers": {name: [asdict(error) for error in errors] for name, errors in layers.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(record, indent=1))
    (folder / "demo.html").write_text(page(record, layers))
    return record


def recovered(
    original: Any, evaluated: Tensor, trained: Tensor, recipe: Recipe, *, fresh: bool
) -> tuple[dict[str, Any], Any]:
    """Return what fine-tuning brings back after pruning half of the weights, and the model.

    Both the pruned model and the original are trained alike, so that adapting to the text does
    not pass for recovery. The result is kept in the cache, by recipe.
    """
    name = f"demo-{recipe.steps}x{recipe.sequences}x{recipe.tokens}-{recipe.lr:g}"
    cached = smollm2.cache_folder() / name
    result = cached / "recovery.json"
    if not fresh and result.exists():
        return json.loads(result.read_text()), load(cached)
    batches = training_batches(trained, recipe)
    print(
        f"pruning half of the weights, then {recipe.steps} steps of fine-tuning, twice: the pruned "
        f"model and, to compare, the original (kept for the next time)",
        file=sys.stderr,
    )
    teacher = copy.deepcopy(original)
    pruned = quantize(prune(copy.deepcopy(original), 0.5), scheme="w8a8")
    record: dict[str, Any] = {
        "recipe": asdict(recipe),
        "original": _perplexity(original, evaluated),
        "pruned": _perplexity(pruned, evaluated),
    }
    history = _train(pruned, batches, teacher, recipe)
    record["pruned_tuned"] = _perplexity(pruned, evaluated)
    record["seconds"] = history.seconds
    tuned = copy.deepcopy(original)
    _train(tuned, batches, teacher, recipe)
    record["original_tuned"] = _perplexity(tuned, evaluated)
    lost = math.log(record["pruned"] / record["original"])
    remaining = math.log(record["pruned_tuned"] / record["original_tuned"])
    record["recovered"] = 1 - remaining / lost
    record["zeros_kept"] = all(_masked_zeros(pruned))
    save(pruned, cached)
    result.write_text(json.dumps(record, indent=1))
    return record, load(cached)


def _train(model: Any, batches: list[Tensor], teacher: Any, recipe: Recipe) -> Any:
    # The embedding is a quarter of all parameters and was not pruned: training it gains nothing.
    model.get_input_embeddings().requires_grad_(False)
    return fine_tune(model, batches, steps=recipe.steps, lr=recipe.lr, teacher=teacher)


def _masked_zeros(model: Any) -> Iterable[bool]:
    for module in model.modules():
        if isinstance(module, CompressedLayer) and hasattr(module, "mask"):
            yield not bool(module.dequantize()[~module.mask()].any())  # type: ignore[operator]


def _perplexity(model: Any, tokens: Tensor) -> float:
    perplexity = evaluate(model, tokens).perplexity
    assert perplexity is not None
    return perplexity


def qualities(models: dict[str, Any], tokens: Tensor) -> dict[str, tuple[float, float]]:
    """Return (perplexity, mean KL to the first model in nats a token) of each model."""
    nll = dict.fromkeys(models, 0.0)
    kl = dict.fromkeys(models, 0.0)
    count = 0
    reference = next(iter(models.values()))
    windows = [w for w in tokens.split(WINDOW) if w.numel() > 1]
    for window in tqdm(windows, desc="perplexity", unit="window", delay=1, leave=False):
        with inference(reference):
            wanted = reference(window[None]).logits[0, :-1]
        count += window.numel() - 1
        for name, model in models.items():
            with inference(model):
                logits = wanted if model is reference else model(window[None]).logits[0, :-1]
                nll[name] += float(F.cross_entropy(logits, window[1:], reduction="sum"))
                kl[name] += divergence(wanted, logits)[0]
    return {name: (math.exp(nll[name] / count), kl[name] / count) for name in models}


def _linear_bytes(model: Any) -> Iterable[int]:
    head = model.get_output_embeddings()
    for module in model.modules():
        if module is head or isinstance(module, QuantEmbedding):
            continue
        if isinstance(module, CompressedLayer):
            yield module.bytes()
        elif isinstance(module, torch.nn.Linear):
            yield sum(p.numel() * p.element_size() for p in module.parameters())


def sample(model: Any, tokenizer: Any, tokens: int = 24) -> str:
    """Return what the model writes after the prompt, greedily."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with inference(model):
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    return " ".join(text.split())


# -- output --------------------------------------------------------------------------------------

HEAD = (
    "model",
    "MB",
    "linear MB",
    "prefill tok/s",
    "decode tok/s",
    "perplexity",
    "KL",
)


def cells(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table's cells, a row a model."""
    return [
        (
            row["name"],
            f"{row['megabytes']:.1f}",
            f"{row['linear_megabytes']:.1f}",
            f"{row['prefill']:.0f}",
            f"{row['decode']:.1f}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
        )
        for row in record["rows"]
    ]


def recovery_line(record: dict[str, Any]) -> str:
    """Return what fine-tuning brought back, in one sentence."""
    r = record["recovery"]
    return (
        f"Pruning half of the weights took perplexity from {r['original']:.2f} to "
        f"{r['pruned']:.1f}; {r['recipe']['steps']} steps of fine-tuning ({r['seconds']:.0f} s) "
        f"brought it to {r['pruned_tuned']:.2f}, the original trained alike to "
        f"{r['original_tuned']:.2f}: {100 * r['recovered']:.0f} % of the lost log-perplexity is "
        f"back."
    )


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
    lines += ["", recovery_line(record), "", f"After {PROMPT!r}:"]
    width = max(len(row["name"]) for row in record["rows"])
    lines += [f"  {row['name']:<{width}}  {row['sample']}" for row in record["rows"]]
    return "\n".join([*lines, "", _setting(record)])


def markdown(record: dict[str, Any]) -> str:
    """Return the record's table in Markdown, for the README."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(record)]
    return "\n".join([*lines, "", _setting(record), "", recovery_line(record)])


def _setting(record: dict[str, Any]) -> str:
    m = record["machine"]
    return (
        f"{record['model']}; {record['text']}; {m['cpu']}, {m['threads']} threads, {m['isa']}, "
        f"torch {m['torch']}; speeds interleaved, batch 1, 512 tokens of prefill."
    )


def page(record: dict[str, Any], layers: dict[str, list[LayerError]]) -> str:
    """Return the report as one HTML page without outside files."""
    samples = [(row["name"], row["sample"]) for row in record["rows"]]
    parts = [
        html_table(HEAD, cells(record)),
        f"<p>{recovery_line(record)}</p>",
        html_table(("model", f"after “{PROMPT}”"), samples, text=True),
        f"<p><small>{_setting(record)}</small></p>",
    ]
    titles = ("Size and speed", "Error of each layer's output, given the original's input")
    plots = [*_plots(record), layer_plot(layers)]
    titled = [f"<h2>{t}</h2>{plot}" for t, plot in zip(titles, plots, strict=True) if plot]
    return html_page(f"llmq demo: {record['model']}", parts, titled or [""])


def _two_lines(name: str) -> str:
    return name.replace(" w8", "\nw8").replace(", ", ",\n")


def _plots(record: dict[str, Any]) -> list[str]:
    figure = new_figure(9, 3.8)
    if figure is None:
        return [""]
    rows = record["rows"]
    left, right = figure.subplots(1, 2)
    for row, marker in zip(rows, "oDs^PvX", strict=True):
        left.scatter(row["megabytes"], row["perplexity"], marker=marker, s=50, label=row["name"])
    left.set_xlabel("checkpoint, MB")
    left.set_ylabel("perplexity")
    left.set_xlim(left=0)
    left.legend(fontsize=8)
    places = range(len(rows))
    for offset, what in ((-0.2, "prefill"), (0.2, "decode")):
        base = rows[0][what]
        times = [row[what] / base for row in rows]
        bars = right.bar([p + offset for p in places], times, width=0.38, label=what)
        right.bar_label(bars, fmt="%.1f", fontsize=7)
    right.axhline(1.0, color="black", linewidth=0.5)
    right.set_xticks(list(places), [_two_lines(r["name"]) for r in rows], fontsize=7)
    right.set_ylabel("times as fast as float32")
    right.legend(fontsize=8)
    return [svg(figure)]
