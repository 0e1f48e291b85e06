"""The algorithms that choose a weight's codes, by name, and what each of them needs.

Imports no torch, so that the command line can check its options at once.
"""

from __future__ import annotations

ROUNDINGS = ("rtn", "clip", "gptq")
SCALINGS = ("smoothquant", "awq")
_DATA = "token ids, a pair (text, tokenizer), or batches of what the model takes"


def split_algorithm(algorithm: str) -> tuple[str | None, str]:
    """Return the scaling, if any, and the rounding that `algorithm` names.

    Raises:
        ValueError: if the name is unknown.
    """
    parts = algorithm.split("+") if isinstance(algorithm, str) else []
    scaling = parts.pop(0) if parts and parts[0] in SCALINGS else None
    how = parts.pop(0) if parts else "rtn"
    if parts or how not in ROUNDINGS or (scaling is None and not algorithm):
        raise ValueError(
            f"unknown algorithm {algorithm!r}; choose {', '.join(ROUNDINGS)}, or "
            f"{' or '.join(SCALINGS)}, alone or before one of those as in 'smoothquant+gptq'"
        )
    return scaling, how


def parse_algorithm(algorithm: str, *, static: bool, has_data: bool) -> tuple[str | None, str]:
    """Return what `split_algorithm` does, having checked that the data goes with it.

    Args:
        algorithm: a rounding, a scaling, or both as in `"smoothquant+gptq"`.
        static: whether the scheme has static activations, whose scales are measured on data.
        has_data: whether there is calibration data.

    Raises:
        ValueError: if the name is unknown, data is missing, or data is given and has no use.
    """
    scaling, how = split_algorithm(algorithm)
    if static and not has_data:
        raise ValueError(
            f"static activations need data to measure their scales on: {_DATA}; or use a dynamic "
            f"scheme, as w8a8"
        )
    if algorithm == "rtn" and has_data and not static:
        raise ValueError("algorithm 'rtn' uses no data; leave data=None, or use 'gptq'")
    if (how == "gptq" or scaling is not None) and not has_data:
        raise ValueError(f"algorithm {algorithm!r} needs calibration data: {_DATA}")
    return scaling, how
