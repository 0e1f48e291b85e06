"""Writes and reads tensors as one safetensors file, a tensor at a time, with its checksum.

Format: https://huggingface.co/docs/safetensors (a length, a JSON header, the tensors' bytes).
Written here so that a model in its device's layout needs room for one canonical tensor more, not
for all of them, and is hashed on its way; safetensors reads these files too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

_CHUNK = 16 << 20  # bytes hashed or written between two steps of the bar

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Entry(NamedTuple):
    """A tensor to write: what it will be, and `get`, which makes it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], Tensor]


def write(file: Path, entries: dict[str, Entry]) -> str:
    """Write `entries` to `file` and return the sha256 of the whole file.

    Raises:
        ValueError: naming the tensor, if the format has no such dtype.
    """
    for name, entry in entries.items():
        if entry.dtype not in _NAMES:
            raise ValueError(f"{name} is {entry.dtype}, which a safetensors file cannot hold")
    # Wide dtypes first keep every tensor aligned to its own width.
    order = sorted(entries, key=lambda name: -entries[name].dtype.itemsize)
    header = {}
    end = 0
    for name in order:
        entry = entries[name]
        start, end = end, end + math.prod(entry.shape) * entry.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with (
        file.open("wb") as stream,
        tqdm(total=end, desc="save", unit="B", unit_scale=True, delay=1, leave=False) as bar,
    ):
        head = len(text).to_bytes(8, "little") + text
        stream.write(head)
        digest.update(head)
        for name in order:
            data = _bytes(name, entries[name])
            for at in range(0, len(data), _CHUNK):
                part = data[at : at + _CHUNK]
                stream.write(part)
                digest.update(part)
                bar.update(len(part))
    return digest.hexdigest()


def _bytes(name: str, entry: Entry) -> memoryview:
    tensor = entry.get().detach().to("cpu").contiguous()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{name} changed while the model was being saved")
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def read(file: Path, size: int, sha256: str) -> dict[str, Tensor]:
    """Return the tensors of `file`, each in memory of its own, read in one pass.

    Args:
        file: what `write` wrote.
        size: bytes that it must have.
        sha256: what `write` returned.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is another file than the one that was written.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the checkpoint is incomplete")
    digest = hashlib.sha256()
    with (
        file.open("rb", buffering=0) as stream,
        tqdm(total=size, desc="load", unit="B", unit_scale=True, delay=1, leave=False) as bar,
    ):
        found = os.fstat(stream.fileno()).st_size
        if found != size:
            raise ValueError(
                f"{file} has {found} bytes, not the {size} that were saved: truncated or altered"
            )

        def fill(data: memoryview) -> None:
            at = 0
            while at < len(data):
                count = stream.readinto(data[at : at + _CHUNK])
                if not count:
                    raise ValueError(f"{file} ended while it was being read")
                digest.update(data[at : at + count])
                bar.update(count)
                at += count

        try:
            tensors = _read(fill, size)
        except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError) as error:
            raise ValueError(f"{file} is truncated or altered: {error}") from error
    if digest.hexdigest() != sha256:
        raise ValueError(f"{file} is not the file that was saved: truncated or altered")
    return tensors


def _read(fill: Callable[[memoryview], None], size: int) -> dict[str, Tensor]:
    length = bytearray(8)
    fill(memoryview(length))
    header_size = int.from_bytes(length, "little")
    if header_size > size - 8:
        raise ValueError(f"a header of {header_size} bytes in a file of {size}")
    text = bytearray(header_size)
    fill(memoryview(text))
    header = json.loads(bytes(text), object_pairs_hook=unique)
    if not isinstance(header, dict):
        raise ValueError(f"a header that is a {type(header).__name__}")
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    tensors = {}
    end = 0
    for name, record in header.items():
        dtype, shape = dtypes[record["dtype"]], record["shape"]
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{name} has shape {shape}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        if record["data_offsets"] != [start, end] or end > size - 8 - header_size:
            raise ValueError(f"{name} does not lie where the tensor before it ends")
        # Checked against the file's size, so no more memory is taken than the file is long.
        tensors[name] = torch.empty(shape, dtype=dtype)
        fill(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    if end != size - 8 - header_size:
        raise ValueError("bytes that belong to no tensor")
    return tensors


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of JSON's pairs (`object_pairs_hook`) where no name stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
    return found
