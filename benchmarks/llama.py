"""llama.cpp's SmolLM2-135M, a process of its own; asked by `model.py`.

It reads JSON lines `{"prompt": tokens, "decode": tokens}` and answers with tokens/s. The model is
the same GGUF file that ours is converted from, quantized again by llama.cpp itself.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmq.commands import smollm2

FORMATS = ("F16", "Q8_0", "Q4_0")


def quantized(name: str) -> Path:
    """Return SmolLM2's GGUF file in one of `FORMATS`, made at first use."""
    import llama_cpp

    target = smollm2.cache_folder() / f"smollm2-135m.{name}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(f".{os.getpid()}")
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        settings.allow_requantize = True  # the package's file is Q4_1
        source = os.fsencode(smollm2.find_gguf())
        if llama_cpp.llama_model_quantize(source, os.fsencode(aside), ctypes.byref(settings)):
            raise RuntimeError(f"llama.cpp cannot quantize {source!r} to {name}")
        aside.rename(target)
    return target


class Model:
    """A model of llama.cpp with a context for one sequence."""

    def __init__(self, file: Path, threads: int, length: int = 1024) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = length
        settings.n_batch = settings.n_ubatch = length
        settings.n_threads = settings.n_threads_batch = threads
        self._model = llama_cpp.llama_model_load_from_file(
            os.fsencode(file), llama_cpp.llama_model_default_params()
        )
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def start(self) -> None:
        """Forget the sequence."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def feed(self, tokens: list[int]) -> int:
        """Append tokens to the sequence and return the likeliest next one."""
        array = (self._api.llama_token * len(tokens))(*tokens)
        batch = self._api.llama_batch_get_one(array, len(tokens))
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode a batch")
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary_size,)).argmax())

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return the logits [tokens, vocabulary] of a sequence of its own."""
        self.start()
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode a batch")
        flat = self._api.llama_get_logits(self._context)
        found = np.ctypeslib.as_array(flat, (len(tokens), self.vocabulary_size)).copy()
        self._api.llama_batch_free(batch)
        return found


def speeds(model: Model, prompt: int, decode: int) -> dict[str, float]:
    """Return tokens/s of prefill and of decoding after a prompt of 16, as `bench.model_speeds`."""
    ids = np.random.default_rng(0).integers(0, model.vocabulary_size, prompt).tolist()
    model.start()
    started = time.perf_counter()
    model.feed(ids)
    prefill = time.perf_counter() - started
    model.start()
    token = model.feed(ids[:16])
    started = time.perf_counter()
    for _ in range(decode):
        token = model.feed([token])
    return {"prefill": prompt / prefill, "decode": decode / (time.perf_counter() - started)}


def main() -> None:
    """Answer requests on standard input until it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints goes to standard error
    model = Model(quantized(args.format), args.threads)
    for line in sys.stdin:
        request = json.loads(line)
        answer = speeds(model, request["prompt"], request["decode"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
