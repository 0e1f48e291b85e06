"""`llmq.json`, which says what a checkpoint's model is made of: read and checked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llmq.storage import tensor_file

FORMAT_VERSION = 1
DESCRIPTION = "llmq.json"
_MAX_DESCRIPTION = 64 << 20  # bytes; a description of 10,000 layers takes 5 MB
_FIELDS = {
    "config": dict,
    "implementations": dict,
    "generation_config": (dict, type(None)),
    "layers": dict,
    "low_rank": dict,
    "module_attributes": dict,
    "aliases": dict,
    "buffers": dict,
    "report": (dict, type(None)),
    "tensors_sha256": str,
    "tensors_bytes": int,
}


def digest(description: dict[str, Any]) -> str:
    """Return the sha256 of a description, its own checksum left out."""
    content = {name: value for name, value in description.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_description(file: Path) -> dict[str, Any]:
    """Return the description in `file`, its fields of the right types.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is damaged, altered or of another format version.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} holds no llmq checkpoint ({file.name} is missing); llmq.save writes one"
        )
    if file.stat().st_size > _MAX_DESCRIPTION:
        raise ValueError(f"{file} is larger than any description of a model")
    try:
        description = json.loads(file.read_bytes(), object_pairs_hook=tensor_file.unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: truncated or altered ({error})") from error
    if not isinstance(description, dict) or "format_version" not in description:
        raise ValueError(f"{file} was not written by llmq.save")
    version = description["format_version"]
    if version != FORMAT_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise ValueError(
            f"{file} has format version {version!r}, this llmq reads {FORMAT_VERSION}; "
            + ("pip install -U llmq-kernels" if newer else "save the model again")
        )
    if description.get("sha256") != digest(description):
        raise ValueError(f"{file} does not match its checksum: altered since it was saved")
    description.setdefault("low_rank", {})  # written before there were any
    for name, kind in _FIELDS.items():
        if not isinstance(description.get(name, ...), kind):  # type: ignore[arg-type]
            raise ValueError(
                f"{file} describes no model: {name} is {description.get(name, 'missing')!r:.60}"
            )
    return description
