"""Names a bound on the loss and lets `plan` choose a format for each layer within it.

    python examples/plan_under_a_bound.py                 # SmolLM2-135M, some ten minutes
    python examples/plan_under_a_bound.py path/to/model   # a directory of transformers

The bound is on the mean KL divergence from the original's output. The plan is made on one part of
the text and holds the bound on another; the rows below are measured on a third, beside the uniform
formats that it chose among.
"""

import copy
import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmq
from llmq.commands import smollm2

FORMATS = ("w8a8", "w8a8-g64", "w4a16-g32")


def main(directory=None, max_kl=0.01, windows=16):
    if directory is None:
        original, tokenizer = smollm2.load()
    else:
        original = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer("\n".join(topics.values()), verbose=False)["input_ids"]
    length = 512 if windows > 4 else 128
    ids = torch.tensor(text[: 2 * windows * length]).view(-1, length)
    chosen_on, judged_on = ids[windows:], ids[:windows]

    plan = llmq.plan(original, chosen_on, max_kl=max_kl, formats=FORMATS, minimize="bytes")
    models = {f: llmq.quantize(copy.deepcopy(original), scheme=f) for f in FORMATS}
    models["plan"] = plan.apply(copy.deepcopy(original))

    rows = []
    print(f"KL at most {max_kl}\n{'model':<14}{'linear MB':>10}{'KL':>10}{'perplexity':>12}")
    for name, model in models.items():
        report = llmq.compare(original, model, judged_on)
        size = sum(layer.bytes_after for layer in model.llmq_report.layers)
        print(f"{name:<14}{size / 1e6:10.1f}{report.kl:10.4f}{report.compressed.perplexity:12.2f}")
        rows.append((name, size, report.kl))
    counts = {}
    for choice in plan.choices:
        counts[choice.option.format] = counts.get(choice.option.format, 0) + len(choice.names)
    print("layers by format:", ", ".join(f"{n} {name}" for name, n in counts.items()))
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:2])
