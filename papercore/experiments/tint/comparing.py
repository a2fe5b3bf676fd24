"""Paired comparisons over documents: sign test, and a bootstrap that draws documents again within each seed.

Glossary
    losses    mean negative log-probability of a document's test tokens [seeds, documents]
    gain      perplexity of the first minus perplexity of the second; perplexity = exp(mean loss), mean over all test tokens
              (every document has as many, so the mean over documents is the mean over tokens)
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Compared:
    """gain with a 95 % interval [low, high], p of the sign test, share of documents that are better under the second."""

    gain: float
    low: float
    high: float
    p: float
    share: float


def perplexity(losses: Losses) -> float:
    """exp of the mean loss."""
    return float(np.exp(np.mean(losses)))


def sign_test(first: Losses, second: Losses) -> float:
    """Two-sided p that as many documents get better as get worse; documents without a difference are left out."""
    from scipy.stats import binomtest

    gap = (np.asarray(first) - np.asarray(second)).ravel()
    better, n = int((gap > 0).sum()), int((gap != 0).sum())
    return float(binomtest(better, n).pvalue) if n else 1.0


def compare(first: Losses, second: Losses, *, resamples: int, seed: int) -> Compared:
    """How much lower the second's perplexity is, document by document.

    Args:
        first, second: [seeds, documents], the same documents.
        resamples: of the bootstrap; documents are drawn with replacement within each seed, the same for both.

    Raises:
        ValueError: shapes that differ or are no [seeds, documents].
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"losses have shapes {a.shape} and {b.shape}: expected the same [seeds, documents].")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(a.shape[1], size=(resamples, *a.shape))
    rows = np.arange(a.shape[0])[None, :, None]
    gains = np.exp(a[rows, drawn].mean((1, 2))) - np.exp(b[rows, drawn].mean((1, 2)))
    low, high = np.quantile(gains, (0.025, 0.975))
    return Compared(
        perplexity(a) - perplexity(b), float(low), float(high), sign_test(a, b), float((b < a).mean())
    )
