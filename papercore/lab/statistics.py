"""The few statistics that verdicts rest on: mean with its standard error, and paired comparisons over seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean over seeds, sample standard deviation (ddof 1), standard error of the mean, number of seeds."""

    mean: float
    std: float
    se: float
    n: int


def summarize(values: Sequence[float]) -> Summary:
    """Mean, spread and standard error. ValueError below two values: one seed has no spread."""
    data = np.asarray(values, dtype=float)
    if data.size < 2:
        raise ValueError(f"a spread needs at least two seeds, got {data.size}.")
    std = float(data.std(ddof=1))
    return Summary(float(data.mean()), std, std / math.sqrt(data.size), int(data.size))


@dataclasses.dataclass(frozen=True)
class Paired:
    """Mean difference over seeds with its standard error and the two-sided p value of a paired t test."""

    difference: float
    se: float
    p: float
    n: int


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """first - second, seed by seed. ValueError when lengths differ or there are fewer than two pairs.

    With no spread at all the t test is undefined: p is 0 when the means differ and 1 when they are equal.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or a.size < 2:
        raise ValueError(
            f"a paired test needs two lists of the same length >= 2, got shapes {a.shape} and {b.shape}."
        )
    gap = a - b
    se = float(gap.std(ddof=1)) / math.sqrt(gap.size)
    if se == 0.0:
        return Paired(float(gap.mean()), 0.0, 0.0 if gap.mean() else 1.0, int(gap.size))
    from scipy.stats import t

    return Paired(float(gap.mean()), se, float(2 * t.sf(abs(gap.mean()) / se, gap.size - 1)), int(gap.size))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation of two lists (ties share their mean rank)."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)
