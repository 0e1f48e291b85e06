"""Opens whatever a user names as a model: ours, transformers', a GGUF file, or SmolLM2 itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmq.commands import smollm2

LLMQ_MARKER = "llmq.json"


def check_model(name: str, *, needs_tokenizer: bool = False) -> None:
    """Raise an error if `name` names no model, without reading it.

    Args:
        name: as `open_model` takes it.
        needs_tokenizer: whether the model's directory must hold a tokenizer.

    Raises:
        FileNotFoundError: if there is no such thing.
        ValueError: if it is no model, or has no tokenizer.
    """
    path = Path(name)
    if name == "smollm2":
        if not smollm2.converted_folder().exists():
            smollm2.find_gguf()
    elif not path.exists():
        raise FileNotFoundError(f"{name} does not exist; name a directory, a .gguf file or smollm2")
    elif path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{name} is not a model; name a directory or a .gguf file")
    elif not any((path / file).exists() for file in (LLMQ_MARKER, "config.json")):
        raise ValueError(f"{path} holds no model: neither {LLMQ_MARKER} nor config.json")
    elif needs_tokenizer and not _has_tokenizer(path):
        raise ValueError(f"{path} has no tokenizer; copy the model's tokenizer.json there")


def open_model(name: str) -> tuple[Any, Any]:
    """Return (model, tokenizer or None) of what `name` names.

    Args:
        name: a directory of `llmq.save`, a transformers directory, a `.gguf` file, or `smollm2`
            (from its pip package).

    Raises:
        FileNotFoundError: if there is no such thing.
        ValueError: if it cannot be read.
    """
    check_model(name)
    if name == "smollm2":
        return smollm2.load()
    path = Path(name)
    if path.is_file():
        return smollm2.load_gguf(path)
    if (path / LLMQ_MARKER).exists():
        from llmq.storage.checkpoint import load

        return load(path), open_tokenizer(path)
    return _open_transformers(path), open_tokenizer(path)


def _has_tokenizer(path: Path) -> bool:
    return any((path / file).exists() for file in ("tokenizer.json", "tokenizer_config.json"))


def open_tokenizer(path: Path) -> Any:
    """Return the tokenizer that lies in a directory, None if there is none."""
    if not _has_tokenizer(path):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _open_transformers(path: Path) -> Any:
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kinds = getattr(config, "architectures", None) or []
        found = getattr(transformers, kinds[0], None) if kinds else None
        smollm2.no_progress_bars()
        kind = found if found is not None else transformers.AutoModel
        return kind.from_pretrained(path, dtype=torch.float32).eval()
    except OSError as error:
        raise ValueError(f"{path} cannot be read by transformers: {error}") from error
