"""`llmq doctor`: which parts work on this machine, and whether all that are needed do."""

from __future__ import annotations

from argparse import Namespace

import llmq

_NEEDED = ("llmq", "python", "torch", "numpy", "safetensors", "tqdm", "C++ kernels")


def main(args: Namespace) -> int:
    """Print the diagnosis; return 1 if a part that is not optional does not work."""
    diagnosis = llmq.doctor()
    broken = [part.name for part in diagnosis.missing if part.name in _NEEDED]
    if args.json:
        print(diagnosis.to_json())
    elif not args.quiet:
        print(diagnosis)
    if not args.json:
        fine = "everything that is needed works; what is marked -- is optional"
        print(f"does not work: {', '.join(broken)}" if broken else fine)
    return 1 if broken else 0
