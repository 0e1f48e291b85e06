"""Confidence intervals of 95 %, so that "no loss" is a statement that can be wrong.

Tokens of one text resemble each other, so that what counts as one observation is a row of the data:
a window, document or example. A mean over labels is then a ratio of sums over rows, whose standard
error follows from its residuals (Cochran, Sampling Techniques, 1977, chapter 6; clustered standard
errors in Miller, arXiv:2411.00640). Two models are compared row by row (paired).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95
_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
_FEW = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
}  # Student's t where the expansion below is not exact enough


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the truth in 95 of 100 samples.

    Args:
        value: the estimate.
        low, high: ends of the interval.
        rows: windows, documents or examples that it rests on.
    """

    value: float
    low: float
    high: float
    rows: int

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes zero: whether a difference is significant."""
        return not self.low <= 0 <= self.high

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t (Abramowitz and Stegun, 26.7.5)."""
    if freedom in _FEW:
        return _FEW[freedom]
    z, v = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def mean(sums: Sequence[float], counts: Sequence[float]) -> Interval:
    """Return Σ sums / Σ counts and its interval.

    Args:
        sums: of what is measured, one a row of the data.
        counts: of the labels that each row's sum is over.

    Raises:
        ValueError: if there is but one row, which tells nothing of the spread.
    """
    n, total = len(sums), sum(counts)
    if n < 2:
        raise ValueError(f"an interval takes two rows of data at least, got {n}")
    value = sum(sums) / total
    residuals = sum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    half = student(n - 1) * math.sqrt(residuals * n / (n - 1)) / total
    return Interval(value, value - half, value + half, n)


def difference(
    before: Sequence[float], after: Sequence[float], counts: Sequence[float]
) -> Interval:
    """Return the mean of after − before over labels and its interval, row by row."""
    return mean([b - a for a, b in zip(before, after, strict=True)], counts)


def share(right: Sequence[float], counts: Sequence[float]) -> Interval:
    """Return a share of right answers and its interval, which no luck makes empty.

    Its ends are those with two right and two wrong answers more (Agresti and Coull, The American
    Statistician 52, 1998).
    """
    wide = mean([*right, 1, 1, 0, 0], [*counts, 1, 1, 1, 1])
    value = sum(right) / sum(counts)
    ends = min(wide.low, value), max(wide.high, value)
    return Interval(value, max(ends[0], 0.0), min(ends[1], 1.0), len(right))


def share_difference(
    before: Sequence[float], after: Sequence[float], counts: Sequence[float]
) -> Interval:
    """Return by how much a share of right answers rose and its interval, row by row.

    Its ends are those with half an answer more on each of four sides: right before and after,
    before, after, never (Agresti and Min, Statistics in Medicine 24, 2005).
    """
    gained = [b - a for a, b in zip(before, after, strict=True)]
    wide = mean([*gained, 0.5, -0.5, 0, 0], [*counts, 0.5, 0.5, 0.5, 0.5])
    value = sum(gained) / sum(counts)
    ends = min(wide.low, value), max(wide.high, value)
    return Interval(value, max(ends[0], -1.0), min(ends[1], 1.0), len(gained))


def exponential(interval: Interval) -> Interval:
    """Return exp − 1 of a difference of log-likelihoods: by what share perplexity rose."""
    value, low, high = (
        math.expm1(min(x, 700.0)) for x in (interval.value, interval.low, interval.high)
    )
    return Interval(value, low, high, interval.rows)
