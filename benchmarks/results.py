"""Where measurements are kept: one JSON file a benchmark, in a folder named after the machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def write(name: str, record: dict[str, Any]) -> Path:
    """Write `record`, which tells its `machine`, and return the file."""
    machine = record["machine"]
    words = f"{machine['cpu']} {machine['isa']}"
    folder = FOLDER / re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    return file
