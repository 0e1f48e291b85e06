"""Which method of pruning goes with which pattern and data, and which is picked if none is named.

Imports no torch, so that the command line can check its options at once.
"""

from __future__ import annotations

from llmq.scheme import Pattern

METHODS = ("magnitude", "wanda", "sparsegpt")
ALLOCATIONS = ("uniform", "sensitivity")


def check_rate(rate: float, pattern: Pattern) -> float:
    """Return a pruning rate as a float.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is outside [0, 1), or not 0.5 with pattern 2:4.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"pruning_rate must be a number in [0, 1), got {rate!r}")
    if not 0 <= rate < 1:  # NaN fails too
        raise ValueError(f"pruning_rate must be in [0, 1), got {rate}")
    if pattern.kind == "2:4" and rate != 0.5:
        raise ValueError(f"pattern 2:4 drops two of each four: its rate is 0.5, got {rate}")
    return float(rate)


def choose_method(
    method: str | None, pattern: Pattern, allocation: str = "uniform", *, has_data: bool
) -> str:
    """Return the method that is meant; None is the best one for the pattern and the data.

    That is `"influence"` for layers, `"sparsegpt"` where there is data, else `"magnitude"`.

    Raises:
        ValueError: if method, pattern, allocation and data do not go together.
    """
    known = ("influence",) if pattern.kind == "layers" else METHODS
    if method is None:
        method = known[-1] if has_data else known[0]
    if method not in known:
        raise ValueError(
            f"unknown method {method!r}; choose {' or '.join(map(repr, known))} for pattern "
            f"{pattern.name}"
        )
    if allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}; choose 'uniform' or 'sensitivity'")
    measures = allocation == "sensitivity"
    if measures and pattern.kind not in ("unstructured", "block"):
        raise ValueError(
            f"pattern {pattern.name} takes one rate for all layers; allocation={allocation!r} goes "
            f"with unstructured and block"
        )
    if method == "magnitude" and has_data and not measures:
        raise ValueError(
            "method 'magnitude' uses no data; leave data=None, or name no method to use the data"
        )
    if not has_data and (method != "magnitude" or measures):
        what = f"allocation {allocation!r}" if measures else f"method {method!r}"
        raise ValueError(
            f"{what} needs calibration data: token ids, a pair (text, tokenizer), or batches of "
            f"what the model takes"
        )
    return method
