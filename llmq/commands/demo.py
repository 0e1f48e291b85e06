"""`llmq demo`: a real language model compressed in several ways, and what each costs and gives."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from llmq.commands import bench, demo_report, smollm2, text
from llmq.evaluation.compare import divergence
from llmq.evaluation.evaluate import inference, model_bytes
from llmq.evaluation.layer_errors import layer_errors
from llmq.models.accelerate import accelerate
from llmq.models.batches import WINDOW
from llmq.nn import CompressedLayer, QuantEmbedding
from llmq.pruning.prune import prune
from llmq.quantization.quantize import quantize
from llmq.storage.checkpoint import load, save
from llmq.training.fine_tune import fine_tune

FLOAT = "float32"
LINEAR = "w8a8-g64"
FAST = "w8a8-g64, lm_head too, accelerated"
ROUNDED = "w4a8-g32 rounded, lm_head too, accelerated"
GPTQ = "w4a8-g32 GPTQ, lm_head too, accelerated"
MAGNITUDE = "50 % magnitude, w8a8, lm_head too"
SPARSEGPT = "50 % SparseGPT, w8a8, lm_head too"
DISTILLED = "50 % SparseGPT, w8a8, lm_head too, distilled"
FULL = (FLOAT, LINEAR, FAST, ROUNDED, GPTQ, MAGNITUDE, SPARSEGPT, DISTILLED)
QUICK = (FLOAT, LINEAR, FAST, GPTQ)

EVALUATED = 4096  # tokens at the start of the text; calibration and training take the rest
WINDOWS, QUICK_WINDOWS = 16, 8  # to calibrate with
PROBED = 128  # of them, through which the layers' errors are taken


@dataclass(frozen=True)
class Recipe:
    """How the pruned model learns from the original."""

    steps: int = 32
    tokens: int = 256  # a sequence
    sequences: int = 2  # a step
    lr: float = 3e-4


RECIPE = Recipe()


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
        print(demo_report.markdown(record) if args.markdown else demo_report.table(record))
        print(f"\n{args.output / 'demo.html'} and {args.output / 'demo.json'} hold the rest")


def text_tokens(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return (evaluation, training) token ids of `pydoc_data.topics`: disjoint parts of it."""
    ids = text.tokens(None, tokenizer)
    return ids[:EVALUATED], ids[EVALUATED:]


def run(folder: Path, *, quick: bool = False, fresh: bool = False) -> dict[str, Any]:
    """Compress SmolLM2-135M in several ways, measure all of them, and return the record.

    Args:
        folder: gets `demo.json` and `demo.html`.
        quick: fewer models, judged on a quarter of the text.
        fresh: calibrates and trains again although results are cached.
    """
    original, tokenizer = smollm2.load()
    evaluated, rest = text_tokens(tokenizer)
    evaluated = evaluated[:1024] if quick else evaluated
    calibration = _calibration(rest, QUICK_WINDOWS if quick else WINDOWS)
    kept = KeptModels(fresh=fresh, calibration=calibration)
    models = {name: _made(name, original, kept, rest) for name in (QUICK if quick else FULL)}
    quality = qualities(models, evaluated)
    speed = bench.model_speeds(models, rounds=1 if quick else 2)
    rows = []
    for name, model in models.items():
        rows.append(
            Row(
                name=name,
                megabytes=model_bytes(model) / 1e6,
                linear_megabytes=sum(_linear_bytes(model)) / 1e6,
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
            if name != FLOAT
        }
    record = {
        "model": "SmolLM2-135M-Instruct",
        "text": f"pydoc_data.topics, first {evaluated.numel()} tokens, windows of {WINDOW}",
        "calibration": f"{len(calibration)} windows of {WINDOW} tokens from later in the same text",
        "machine": bench.machine(),
        "rows": [asdict(row) for row in rows],
        "recovery": _recovery(models, quality, kept) if DISTILLED in models else None,
        "layers": {name: [asdict(error) for error in errors] for name, errors in layers.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(record, indent=1))
    (folder / "demo.html").write_text(demo_report.page(record, layers), encoding="utf-8")
    return record


def _calibration(rest: Tensor, count: int) -> Tensor:
    """Return windows evenly from `rest`, from 4,096 tokens on: apart from what is judged on."""
    windows = rest[EVALUATED:]
    windows = windows[: windows.numel() // WINDOW * WINDOW].view(-1, WINDOW)
    return windows[[i * len(windows) // count for i in range(count)]]


@dataclass
class KeptModels:
    """Models that take calibration or training, cached from one demo to the next."""

    fresh: bool
    calibration: Tensor
    made: set[str] = field(default_factory=set)  # by this demo

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the kept model of that name, made and kept first where there is none."""
        folder = self.folder(name)
        again = self.fresh and name not in self.made
        if again or not (folder / "seconds.json").exists():
            print(f"making {name} (kept for the next time)", file=sys.stderr)
            started = time.perf_counter()
            save(make(), folder)
            seconds = time.perf_counter() - started
            (folder / "seconds.json").write_text(json.dumps(seconds))
            self.made.add(name)
        return load(folder)

    def seconds(self, name: str) -> float:
        """Return how long a kept model took to make."""
        return float(json.loads((self.folder(name) / "seconds.json").read_text()))

    def folder(self, name: str) -> Path:
        """Return where a model is kept: another folder for other windows to calibrate with."""
        return smollm2.cache_folder() / "demo" / f"{name}-{len(self.calibration)}"


def _made(name: str, original: Any, kept: KeptModels, rest: Tensor) -> Any:
    """Return the model of one row; `original` stays as it is."""
    model = original if name == FLOAT else copy.deepcopy(original)
    data = kept.calibration
    if name == LINEAR:
        return quantize(model, scheme="w8a8-g64")
    if name == FAST:
        return accelerate(quantize(model, scheme="w8a8-g64", skip=()))
    if name == ROUNDED:
        return accelerate(quantize(model, scheme="w4a8-g32", skip=()))
    if name == GPTQ:
        return accelerate(
            kept.get(
                "gptq",
                lambda: quantize(model, scheme="w4a8-g32", algorithm="gptq", data=data, skip=()),
            )
        )
    if name == MAGNITUDE:
        return quantize(prune(model, 0.5), scheme="w8a8", skip=())
    if name == SPARSEGPT:
        return kept.get("sparsegpt", lambda: _pruned(model, data))
    if name == DISTILLED:
        pruned = kept.get("sparsegpt", lambda: _pruned(model, data))
        return kept.get(_distilled_name(), lambda: _distilled(pruned, original, rest))
    return model


def _pruned(model: Any, data: Tensor) -> Any:
    return quantize(prune(model, 0.5, method="sparsegpt", data=data), scheme="w8a8", skip=())


def _distilled_name() -> str:
    return f"distilled-{RECIPE.steps}-{RECIPE.lr:g}"


def _distilled(model: Any, teacher: Any, rest: Tensor) -> Any:
    """Train `model` towards the teacher's distribution alone.

    Without labels the original would have nothing to learn from itself, so that what comes closer
    is recovery and not getting used to the text.
    """
    batches = text.training_batches(
        rest, RECIPE.steps, sequences=RECIPE.sequences, length=RECIPE.tokens
    )
    fine_tune(model, batches, steps=RECIPE.steps, lr=RECIPE.lr, teacher=teacher, teacher_weight=1.0)
    return model


def _recovery(
    models: dict[str, Any], quality: dict[str, tuple[float, float]], kept: KeptModels
) -> dict[str, Any]:
    """Return what calibration and distillation bring back of what pruning takes."""
    names = {"magnitude": MAGNITUDE, "sparsegpt": SPARSEGPT, "distilled": DISTILLED}
    record: dict[str, Any] = {"recipe": asdict(RECIPE), "original": quality[FLOAT][0]}
    for key, name in names.items():
        record[key] = {"perplexity": quality[name][0], "kl": quality[name][1]}
    record["sparsegpt"]["seconds"] = kept.seconds("sparsegpt")
    record["distilled"]["seconds"] = kept.seconds(_distilled_name())
    record["zeros_kept"] = all(_masked_zeros(models[DISTILLED]))
    return record


def _masked_zeros(model: Any) -> Iterable[bool]:
    for module in model.modules():
        if isinstance(module, CompressedLayer) and hasattr(module, "mask"):
            yield not bool(module.dequantize()[~module.mask()].any())  # type: ignore[operator]


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
    inputs = tokenizer(demo_report.PROMPT, return_tensors="pt")
    with inference(model):
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    words: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    return " ".join(words.split())
