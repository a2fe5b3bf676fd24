"""Communication volumes recomputed, beside the reported ones, and beside a count that shares no code with the kernel.

Glossary
    literal    the loop of a training script: a counter goes up every step; when it reaches H, average, reset, take the next H
               from the learning rate that then applies
    share      rounds / steps, in percent of data parallel
    slow time  eta^2 a step, the clock of the slow motion along the minimisers; a round of QSR takes alpha^2 of it
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from papercore.experiments.qsr.recipes import NEIGHBOURS, ROWS, Recipe, named, predictions, resnet, vit
from papercore.lab.claims import reported_value
from papercore.lab.record import Record
from papercore.local_sgd import QSR, CommReport, ConstantH, SyncSchedule

TABLE = "B=4096"
VOLUME = "communication relative to data parallel"
# The schedules of the figures: ViT-B, rounds of at least 4 steps.
CURVES: dict[str, SyncSchedule] = {
    "H = 4": ConstantH(4),
    "1/η rule, β = 0.055": QSR(0.055, 4, power=1),
    "QSR, α = 0.0175": QSR(0.0175, 4),
    "cubic rule, ρ = 0.0125": QSR(0.0125, 4, power=3),
}


def literal_rounds(recipe: Recipe, schedule: SyncSchedule) -> int:
    """Averages of a run, counted step by step as a training loop would. Knows ConstantH and QSR."""

    def length(step: int) -> int:
        if isinstance(schedule, ConstantH):
            return schedule.h
        assert isinstance(schedule, QSR)
        if step < recipe.warmup:
            return schedule.h_base
        return max(
            schedule.h_base,
            int((schedule.alpha / recipe.lr(step)) ** schedule.power * (1 + 1e-12)),
        )

    rounds = counter = 0
    h = length(0)
    for step in range(recipe.steps):
        counter += 1
        if counter >= h or step == recipe.steps - 1:
            rounds, counter = rounds + 1, 0
            if step + 1 < recipe.steps:
                h = length(step + 1)
    return rounds


def rule_mismatches(count: int = 4000) -> int:
    """How often `QSR.next_h` differs from floor((alpha / eta)^2) in exact fractions, over a grid of decimal numbers."""
    wrong = 0
    for i in range(count):
        alpha = Fraction(1 + (7 * i) % 400, 1000)
        eta = Fraction(1 + (13 * i) % 977, 10_000)
        exact = max(4, math.floor((alpha / eta) ** 2))
        wrong += exact != QSR(float(alpha), 4).next_h(20_000, float(eta))
    return wrong


def count_all(record: Record) -> None:
    """Fill the record with every number that needs no training."""
    _table(record)
    _predictions(record)
    _curves(record)
    record.metric("rule_checks", 4000, "exact")
    record.metric("rule_mismatches", rule_mismatches(4000), "exact")
    for name, power in (("qsr", 2.0), ("cubic", 3.0), ("inverse", 1.0)):
        record.metric(f"same_at_one_{name}", QSR(0.1, 1, power=power).next_h(0, 0.1), "exact")
    _hours(record)


def _table(record: Record) -> None:
    rows: list[list[Any]] = []
    differ, equal = 0, 0
    for row in ROWS:
        report = row.recipe.volume(row.schedule)
        given = reported_value("qsr", TABLE, row.reported, VOLUME)
        equal += round(100 * report.fraction, 1) == given
        differ += literal_rounds(row.recipe, row.schedule) != report.rounds
        rows.append([row.model, named(row.schedule), report.steps, report.rounds, 100 * report.fraction, given, row.strength, report.longest, report.last])  # fmt: skip
    columns = ["model", "schedule", "steps", "rounds", "share", "reported", "strength", "longest", "last"]
    record.table("communication", columns, rows)
    record.metric("rows", len(rows), "exact")
    record.metric("rows_equal", equal, "exact")
    record.metric("rows_counted_otherwise", differ, "exact")
    for name, index in (("resnet_2", 1), ("resnet_4", 3), ("vit_4", 5), ("vit_8", 7)):
        record.metric(f"share_{name}", rows[index][4], "exact")
    _neighbours(record)
    # What a plain integral of the rule would say, without the floor, and the rule applied inside the warm-up.
    record.metric("share_vit_4_integral", 100 * _integral_share(vit(), 0.0175, 4), "rel:1e-6")
    inside = Recipe(vit().lr, vit().steps, 0)
    record.metric("share_vit_4_no_warmup", 100 * _unwarned(inside, QSR(0.0175, 4)).fraction, "exact")


def _neighbours(record: Record) -> None:
    rows: list[list[Any]] = []
    for model, alpha, h_base in NEIGHBOURS:
        recipe = resnet() if model == "ResNet-152" else vit()
        target = next(r for r in ROWS if r.model == model and isinstance(r.schedule, QSR) and r.schedule.h_base == h_base)  # fmt: skip
        given = reported_value("qsr", TABLE, target.reported, VOLUME)
        rows.append([model, h_base, alpha, 100 * recipe.volume(QSR(alpha, h_base)).fraction, given])
    record.table("neighbours", ["model", "h_base", "alpha", "share", "reported"], rows)
    record.metric("neighbours", len(rows), "exact")
    record.metric("neighbours_equal", sum(round(row[3], 1) == row[4] for row in rows), "exact")


def _unwarned(recipe: Recipe, schedule: SyncSchedule) -> CommReport:
    import warnings

    with warnings.catch_warnings():
        # The first round is far too long, and that is what is shown.
        warnings.simplefilter("ignore", UserWarning)
        return recipe.volume(schedule)


def _integral_share(recipe: Recipe, alpha: float, h_base: int) -> float:
    """Sum over steps of 1 / max(h_base, (alpha / eta)^2): the share if H could be any number and change every step."""
    rounds = recipe.warmup / h_base
    for step in range(recipe.warmup, recipe.steps):
        rounds += min(1 / h_base, (recipe.lr(step) / alpha) ** 2)
    return rounds / recipe.steps


def _predictions(record: Record) -> None:
    rows, differ = [], 0
    for text, recipe, schedule in predictions():
        report = recipe.volume(schedule)
        differ += literal_rounds(recipe, schedule) != report.rounds
        rows.append([text, named(schedule), report.rounds, 100 * report.fraction])
    record.table("predictions", ["run", "schedule", "rounds", "share"], rows)
    record.metric("predictions", len(rows), "exact")
    record.metric("predictions_counted_otherwise", differ, "exact")


def _curves(record: Record) -> None:
    """H and slow time a round of ViT-B under four rules, on a grid of steps; volume against alpha."""
    recipe = vit()
    grid = np.linspace(0, recipe.steps - 1, 240).astype(int)
    record.array("curve_steps", grid)
    record.array("curve_lr", [recipe.lr(int(step)) for step in grid])
    for i, schedule in enumerate(CURVES.values()):
        report = recipe.volume(schedule)
        starts = np.array([start for start, _ in report.schedule])
        lengths = np.array([length for _, length in report.schedule])
        inside = np.searchsorted(starts, grid, side="right") - 1
        clock = np.concatenate([[0.0], np.cumsum([recipe.lr(step) ** 2 for step in range(recipe.steps)])])
        slow = clock[starts + lengths] - clock[starts]
        record.array(f"curve_h_{i}", lengths[inside])
        record.array(f"curve_slow_{i}", slow[inside])
        record.array(f"curve_rounds_{i}", inside + 1)
        record.metric(f"curve_share_{i}", 100 * report.fraction, "exact")
        record.metric(f"curve_longest_{i}", report.longest, "exact")
    alphas = np.linspace(0.005, 0.03, 26)
    record.array("alpha_grid", alphas)
    for h_base in (4, 8):
        record.array(f"alpha_share_{h_base}", [100 * recipe.volume(QSR(float(a), h_base)).fraction for a in alphas])  # fmt: skip


def _hours(record: Record) -> None:
    """The paper's own hours, decomposed: T_par = C + S, T_qsr = C + S * share."""
    reported: Callable[[str], float] = lambda row: reported_value("qsr", "abstract", row, "wall-clock")  # noqa: E731
    share = vit().volume(QSR(0.0175, 4)).fraction
    small = reported("ViT-B 16 GPUs Parallel AdamW"), reported("ViT-B 16 GPUs QSR")
    large = reported("ViT-B 64 GPUs Parallel AdamW"), reported("ViT-B 64 GPUs QSR")
    s = (small[0] - small[1]) / (1 - share)
    record.metric("hours_sync_16", s, "rel:1e-6")
    record.metric("hours_compute_16", small[0] - s, "rel:1e-6")
    record.metric("hours_share_16", 100 * s / small[0], "rel:1e-6")
    # At 64 GPUs the share is not known: between that of QSR at h_base 4 and 8 with either warm-up.
    shares = [
        vit(peak=0.016, epoch=78, warmup=w).volume(QSR(0.0175, h)).fraction
        for w in (2_500, 10_000)
        for h in (4, 8)
    ]
    bounds = [(large[0] - large[1]) / (1 - one) / large[0] for one in (min(shares), max(shares))]
    record.metric("hours_share_64_low", 100 * bounds[0], "rel:1e-6")
    record.metric("hours_share_64_high", 100 * bounds[1], "rel:1e-6")
