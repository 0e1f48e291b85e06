"""Where measurements are kept: one JSON file a benchmark, in a folder named after the machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def file(name: str, record: dict[str, Any]) -> Path:
    """Return where `record`, which tells its `machine`, is kept."""
    machine = record["machine"]
    words = f"{machine['cpu']} {machine['isa']}"
    return FOLDER / re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") / f"{name}.json"


def write(name: str, record: dict[str, Any]) -> Path:
    """Write `record`, and return the file."""
    path = file(name, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
