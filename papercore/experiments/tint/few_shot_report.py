"""What a record says about classification: the 2x2x2 table, and TinT against the model itself, each in the form its held-out
examples chose.

Glossary
    tint, vanilla    right answers of one set and seed, as `few_shot_part` returns them
    gain             accuracy with TinT minus without, percentage points, mean over sets and seeds
    interval         95 %, bootstrap: queries drawn again within each set (the same for all seeds), and seeds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papercore.experiments.tint.few_shot import CALIBRATIONS
from papercore.experiments.tint.prompting import FORMATS, LOSSES
from papercore.lab.record import Record

MOVES = "abs:5"
Part = dict[str, Any]
Rights = NDArray[np.float64]


def report_few_shot(
    record: Record, parts: Mapping[str, Sequence[Part]], *, resamples: int, seed: int, prefix: str = ""
) -> None:
    """Fill tables and metrics from {set: one part a seed}; their names begin with `prefix`."""
    rows = []
    for f, layout in enumerate(FORMATS):
        for number, loss in enumerate(LOSSES):
            for c, calibration in enumerate(CALIBRATIONS):
                tint = {
                    t: np.stack([p["tint"][f, number, c] for p in some]).astype(float)
                    for t, some in parts.items()
                }
                own = {
                    t: np.stack([p["vanilla"][f, c] for p in some]).astype(float) for t, some in parts.items()
                }
                gain, low, high = gain_of(own, tint, resamples=resamples, seed=seed)
                rows.append([layout, loss, calibration, percent(own), percent(tint), gain, low, high])
    columns = ["format", "loss", "calibration", "vanilla", "tint", "gain", "gain low", "gain high"]
    record.table(f"{prefix}few shot cells", columns, rows)
    by_task = []
    for zero in (True, False):
        name = "zero_" if zero else ""
        tint = {t: np.stack([chosen(p, f"{name}tint") for p in some]) for t, some in parts.items()}
        own = {t: np.stack([chosen(p, f"{name}vanilla") for p in some]) for t, some in parts.items()}
        gain, low, high = gain_of(own, tint, resamples=resamples, seed=seed)
        record.metric(f"{prefix}icl_{name}gain", gain, MOVES)
        record.metric(f"{prefix}icl_{name}gain_low", low, MOVES)
        record.metric(f"{prefix}icl_{name}gain_high", high, MOVES)
        record.metric(f"{prefix}icl_{name}tint", percent(tint), MOVES)
        record.metric(f"{prefix}icl_{name}vanilla", percent(own), MOVES)
        for task, some in parts.items():
            one = gain_of({task: own[task]}, {task: tint[task]}, resamples=resamples, seed=seed)
            chance = 100 / some[0]["classes"]
            by_task.append([
                "zero-shot" if zero else "few-shot", task, chance, percent({task: own[task]}), percent({task: tint[task]}), *one
            ])  # fmt: skip
    columns = ["setting", "set", "chance", "vanilla", "tint", "gain", "gain low", "gain high"]
    record.table(f"{prefix}few shot", columns, by_task)
    some_task = next(iter(parts.values()))
    record.metric(f"{prefix}icl_tasks", len(parts), "exact")
    record.metric(f"{prefix}icl_seeds", len(some_task), "exact")


def chosen(part: Part, name: str) -> Rights:
    """Right answers [queries] of the form with the best held-out accuracy, the first of equals."""
    held = np.asarray(part[f"{name}_held"])
    return np.asarray(part[name], dtype=float)[np.unravel_index(int(held.argmax()), held.shape)]


def percent(rights: Mapping[str, Rights]) -> float:
    """Mean accuracy over sets and seeds, percent."""
    return 100 * float(np.mean([values.mean() for values in rights.values()]))


def gain_of(
    own: Mapping[str, Rights], tint: Mapping[str, Rights], *, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Gain with its interval, points; every set counts the same. own, tint: {set: [seeds, queries]}."""
    rng = np.random.default_rng(seed)
    gaps = {task: tint[task] - own[task] for task in own}
    drawn = np.zeros(resamples)
    for values in gaps.values():
        seeds = rng.integers(values.shape[0], size=(resamples, values.shape[0]))
        queries = rng.integers(values.shape[1], size=(resamples, values.shape[1]))
        drawn += values[seeds[:, :, None], queries[:, None, :]].mean((1, 2)) / len(gaps)
    low, high = np.quantile(100 * drawn, (0.025, 0.975))
    return percent(tint) - percent(own), float(low), float(high)
