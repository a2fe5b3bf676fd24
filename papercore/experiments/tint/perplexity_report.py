"""What a record says about perplexities: the table of train fractions, the gains with their intervals, the gap to dynamic evaluation.

Several models on the same documents: a document's loss is its mean over the models, so that a document counts once, in the sign
test and in the bootstrap; the spread over models stands beside it.

Glossary
    losses   {method: [models, fractions, documents]}, mean loss in nats of the tokens behind the training part
    gain     perplexity without an update minus perplexity with it
    gap      perplexity of TinT minus perplexity of dynamic evaluation; gap ratio: its size as a share of dynamic evaluation's gain
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from papercore.experiments.tint.comparing import compare, perplexity
from papercore.lab.record import Record
from papercore.lab.statistics import summarize

COLUMNS = [
    "fraction", "vanilla", "tint", "dynamic", "gain", "gain low", "gain high", "p", "share better",
    "dynamic gain", "dynamic gain low", "dynamic gain high", "gap", "gap low", "gap high",
]  # fmt: skip
MOVES = "rel:0.2"  # models trained on other hardware differ in every weight


def report_perplexity(
    record: Record, fractions: Sequence[float], losses: Mapping[str, NDArray[np.float64]], *, resamples: int, seed: int, prefix: str = ""
) -> list[list[float]]:  # fmt: skip
    """Fill table, arrays and metrics; their names begin with `prefix`. Returns the rows of the table."""
    rows: list[list[float]] = []
    for number, fraction in enumerate(fractions):
        vanilla, tint, dynamic = (
            losses[m][:, number].mean(0, keepdims=True) for m in ("vanilla", "tint", "dynamic")
        )
        own, other, gap = (
            compare(a, b, resamples=resamples, seed=1000 * seed + number)
            for a, b in ((vanilla, tint), (vanilla, dynamic), (tint, dynamic))
        )
        rows.append([
            fraction, perplexity(vanilla), perplexity(tint), perplexity(dynamic), own.gain, own.low, own.high, own.p, own.share,
            other.gain, other.low, other.high, gap.gain, gap.low, gap.high,
        ])  # fmt: skip
    record.table(f"{prefix}perplexity", COLUMNS, rows)
    for method, values in losses.items():
        record.array(f"{prefix}ppl_{method}", np.exp(values.mean(2)))
        record.array(f"{prefix}losses_{method}", values.astype(np.float32))
    models, _, documents = losses["tint"].shape
    record.metric(f"{prefix}documents", documents, "exact")
    record.metric(f"{prefix}models", models, "exact")
    record.metric(f"{prefix}gain_least", min(row[4] for row in rows), MOVES)
    record.metric(f"{prefix}gain_most", max(row[4] for row in rows), MOVES)
    record.metric(f"{prefix}gain_low_least", min(row[5] for row in rows), MOVES)
    record.metric(f"{prefix}dynamic_gain_least", min(row[9] for row in rows), MOVES)
    record.metric(f"{prefix}dynamic_gain_most", max(row[9] for row in rows), MOVES)
    record.metric(f"{prefix}sign_p_most", max(row[7] for row in rows), "abs:0.02")
    record.metric(f"{prefix}gap_ratio_worst", max(gap_ratio(row) for row in rows), "abs:0.05")
    for row in rows:
        percent = f"{row[0]:.0%}".rstrip("%")
        for name, column in (("vanilla", 1), ("tint", 2), ("dynamic", 3)):
            record.metric(f"{prefix}ppl_{name}_{percent}", row[column], MOVES)
        record.metric(f"{prefix}gap_ratio_{percent}", gap_ratio(row), "abs:0.05")
    if models > 1:
        gains = np.exp(losses["vanilla"].mean(2)) - np.exp(losses["tint"].mean(2))  # [models, fractions]
        for row, values in zip(rows, gains.T, strict=True):
            percent = f"{row[0]:.0%}".rstrip("%")
            record.metric(f"{prefix}gain_{percent}_se", summarize(values.tolist()).se, "volatile")
        record.metric(f"{prefix}gain_least_model", float(gains.min()), MOVES)
    return rows


def gap_ratio(row: Sequence[float]) -> float:
    """|TinT - dynamic evaluation| as a share of dynamic evaluation's gain; infinite where that gained nothing."""
    return abs(row[12]) / row[9] if row[9] > 0 else float("inf")
