"""Means over seeds: t intervals, paired differences, Holm's correction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from mpmath import betainc, findroot

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean with the half-width of its 95 % interval, Student's t over n values."""

    n: int
    mean: float
    half: float
    """NaN for a single value."""


@dataclass(frozen=True)
class Difference(Mean):
    """A mean difference of pairs."""

    p: float
    """Two-sided, of a paired t test. NaN where there is nothing to test with: a single pair, or
    the same difference other than 0 in every pair, which is a sign of seeds that change nothing.
    """


def tail(t: float, dof: int) -> float:
    """The chance of a larger |t| under Student's t (Abramowitz and Stegun, 26.5.27 and 26.7.1)."""
    return float(betainc(dof / 2, 0.5, 0, dof / (dof + t * t), regularized=True))


@lru_cache
def quantile(dof: int) -> float:
    """The t that |t| stays below with a chance of 95 %."""
    bracket = (1.9, 13)  # 1.96 for many degrees of freedom, 12.7 for one
    return float(findroot(lambda t: tail(float(t), dof) - (1 - LEVEL), bracket, solver="anderson"))


def mean(values: Sequence[float]) -> Mean:
    """Mean and interval of at least one value."""
    n = len(values)
    return Mean(n, float(np.mean(values)), quantile(n - 1) * _error(values) if n > 1 else math.nan)


def difference(values: Sequence[float], against: Sequence[float]) -> Difference:
    """Mean of values − against with its interval; the i-th of both share a seed."""
    pairs = [x - y for x, y in zip(values, against, strict=True)]
    found = mean(pairs)
    if found.n < 2:
        return Difference(found.n, found.mean, found.half, math.nan)
    error = _error(pairs)
    # Equal differences of decimals differ in their last bits.
    if error <= 1e-12 * max(map(abs, [*values, *against])):
        p = 1.0 if max(map(abs, pairs)) <= error else math.nan
        return Difference(found.n, found.mean, 0.0, p)
    return Difference(found.n, found.mean, found.half, tail(found.mean / error, found.n - 1))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): the family's chance of one false find stays below each.

    NaN, a test that was not made, stays NaN and does not count.
    """
    made = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(ps), 0.0
    for rank, (p, i) in enumerate(made):
        largest = max(largest, min(1.0, (len(made) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))
