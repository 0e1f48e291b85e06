"""Quantizes a language model: what each scheme saves, what it costs, and how fast text comes.

    python examples/quantize_decoder.py                 # SmolLM2-135M from its package
    python examples/quantize_decoder.py path/to/model   # a directory of transformers

Memory is what a checkpoint takes. Perplexity is over the first 4,096 tokens of Python's own
documentation; less is better. The last row lets each decoder layer run by one native call.
"""

import copy
import sys
import time
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmq
from llmq.commands import smollm2


def tokens_per_second(model, tokenizer, count):
    """Decode `count` tokens, twice, and return the better speed; the prompt is a few tokens."""
    prompt = tokenizer("In Python, a list is", return_tensors="pt")
    best = 0.0
    for _ in range(2):
        started = time.perf_counter()
        model.generate(**prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False)
        best = max(best, count / (time.perf_counter() - started))
    return best


def main(directory=None, tokens=4096, decoded=32):
    if directory is None:
        original, tokenizer = smollm2.load()
    else:
        original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor(tokenizer("\n".join(topics.values()), verbose=False)["input_ids"])[:tokens]

    models = {"float32": original}
    for scheme in ("w8a8-g64", "w4a16-g32"):
        models[scheme] = llmq.quantize(copy.deepcopy(original), scheme=scheme)
    whole = llmq.quantize(copy.deepcopy(original), scheme="w8a8-g64", skip=())
    models["w8a8-g64, all, accelerated"] = llmq.accelerate(whole)

    rows = []
    print(f"{'model':<28}{'MB':>8}{'perplexity':>12}{'decoded tokens/s':>18}")
    for name, model in models.items():
        found = llmq.evaluate(model, ids)
        speed = tokens_per_second(model, tokenizer, decoded)
        print(f"{name:<28}{found.bytes / 1e6:8.1f}{found.perplexity:12.2f}{speed:18.1f}")
        rows.append((name, found.bytes, found.perplexity, speed))
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:2])
