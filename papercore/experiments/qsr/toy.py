"""Schedules on a problem whose drift is known: label noise on L(u, v) = (u v - 1)^2 / 2.

The minimisers are the hyperbola u v = 1, and label noise pushes SGD along it towards the flattest one, of sharpness 2. How far
it gets under a schedule has an exact theory (`papercore.local_sgd.predict_hyperbola`), so a simulation can be wrong.

Glossary
    K          workers (8)
    s2         variance of the label noise that one worker sees (0.5)
    sharpness  lambda = u^2 + v^2, from 4.25 at the start (2, 0.5) to 2 at most
    share      rounds / steps
    rate       decay of log sqrt(sharpness^2 - 4) in slow time; times K / s2 it is 1 for SGD and at most K
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.local_sgd import (
    QSR,
    ConstantH,
    SyncSchedule,
    cosine_lr,
    predict_hyperbola,
    simulate_hyperbola,
)

K, S2, PEAK = 8, 0.5, 0.03
POINTS = 60  # of a stored curve


def schedules(steps: int) -> dict[str, SyncSchedule]:
    """The ten schedules; the growth coefficients are those of the sheet of known results, not tuned."""
    return {
        "data parallel": ConstantH(1),
        "H = 4": ConstantH(4),
        "H = 16": ConstantH(16),
        "H = 64": ConstantH(64),
        "1/η rule, β = 0.2": QSR(0.2, 4, power=1),
        "QSR, α = 0.06": QSR(0.06, 4),
        "QSR, α = 0.12": QSR(0.12, 4),
        "QSR, α = 0.24": QSR(0.24, 4),
        "cubic rule, ρ = 0.05": QSR(0.05, 4, power=3),
        "one round": ConstantH(steps),
    }


def compare(record: Record, stages: Stages, *, steps: int, replicas: int, seed: int) -> None:
    """Simulated and predicted final sharpness of every schedule, and the ratio of drift rates."""
    lr = cosine_lr(PEAK, steps)

    def simulated() -> dict[str, Any]:
        out: dict[str, Any] = {"rows": []}
        for i, schedule in enumerate(schedules(steps).values()):
            path = simulate_hyperbola(
                schedule, lr, steps, k=K, label_noise=S2, replicas=replicas, seed=seed + i
            )
            out["rows"].append([float(path.mean[-1]), float(path.se[-1])])
            keep = torch.linspace(0, len(path.steps) - 1, min(POINTS, len(path.steps))).round().long()
            out[f"time_{i}"] = path.slow_time[keep].numpy()
            out[f"path_{i}"] = path.mean[keep].numpy()
        return out

    measured = stages.get("hyperbola", simulated)
    rows, worst, worst_z = [], 0.0, 0.0
    for i, (name, schedule) in enumerate(schedules(steps).items()):
        theory = predict_hyperbola(schedule, lr, steps, k=K, label_noise=S2)
        share = 100 * len(schedule.rounds(lr, steps)) / steps
        mean, se = measured["rows"][i]
        expected = float(theory.mean[-1])
        worst = max(worst, abs(mean / expected - 1))
        worst_z = max(worst_z, abs(mean - expected) / se)
        rows.append([name, share, mean, se, expected, (4.25 - mean) / (4.25 - 2)])
        record.array(f"toy_time_{i}", measured[f"time_{i}"])
        record.array(f"toy_path_{i}", measured[f"path_{i}"])
    record.table("toy", ["schedule", "share", "simulated", "se", "theory", "way"], rows)
    record.metric("toy_schedules", len(rows), "exact")
    record.metric("toy_worst_error", worst, "abs:0.003")
    record.metric("toy_worst_z", worst_z, "abs:2")
    found = {row[0]: row for row in rows}
    # At like communication, drift alone: constant H has fewer rounds and yet gets further.
    record.metric("toy_sharpness_h16", found["H = 16"][2], "rel:0.003")
    record.metric("toy_sharpness_qsr", found["QSR, α = 0.06"][2], "rel:0.003")
    record.metric("toy_share_h16", found["H = 16"][1], "exact")
    record.metric("toy_share_qsr", found["QSR, α = 0.06"][1], "exact")
    _frontier(record, steps)


def _frontier(record: Record, steps: int) -> None:
    """Predicted final sharpness against share, over many growth coefficients of each rule: the theory's own comparison."""
    lr = cosine_lr(PEAK, steps)
    grids: dict[str, list[SyncSchedule]] = {
        "constant": [ConstantH(h) for h in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)],
        "inverse": [QSR(float(a), 4, power=1) for a in np.geomspace(0.08, 2.0, 11)],
        "qsr": [QSR(float(a), 4) for a in np.geomspace(0.02, 0.3, 11)],
        "cubic": [QSR(float(a), 4, power=3) for a in np.geomspace(0.02, 0.15, 11)],
    }
    ends: dict[str, tuple[Any, Any]] = {}
    for name, several in grids.items():
        share = [100 * len(one.rounds(lr, steps)) / steps for one in several]
        end = [float(predict_hyperbola(one, lr, steps, k=K, label_noise=S2).mean[-1]) for one in several]
        record.array(f"frontier_share_{name}", share)
        record.array(f"frontier_sharpness_{name}", end)
        ends[name] = (np.array(share), np.array(end))
    # At 6.25 % of communication, along each rule's own curve.
    for name, (share, end) in ends.items():
        order = np.argsort(share)
        at = float(np.interp(np.log(6.25), np.log(share[order]), end[order]))
        record.metric(f"frontier_{name}", at, "rel:1e-3")


def rates(record: Record, stages: Stages, *, replicas: int, seed: int) -> None:
    """Drift relative to SGD at a fixed learning rate: 1, in between, and K, as eta H grows."""
    eta, steps = 0.01, 8000  # slow time 0.8, times s2 = 0.4

    def measured() -> dict[str, Any]:
        rows = []
        for i, h in enumerate((1, 10, 100, 1000)):
            schedule, lr = ConstantH(h), lambda step: eta
            path = simulate_hyperbola(
                schedule, lr, steps, k=K, label_noise=S2, replicas=replicas, seed=seed + 50 + i
            )
            theory = predict_hyperbola(schedule, lr, steps, k=K, label_noise=S2)
            limit = predict_hyperbola(schedule, lr, steps, k=K, label_noise=S2, mode="continuous")
            rate, se = path.decay_rate()
            scale = K / S2
            rows.append(
                [h, eta * h, scale * rate, scale * se, scale * theory.decay_rate()[0], scale * limit.decay_rate()[0]]
            )  # fmt: skip
        return {"rows": rows}

    rows = stages.get("rates", measured)["rows"]
    record.table("rates", ["H", "eta_h", "measured", "se", "theory", "continuous"], rows)
    ratios = [(row[2] / rows[0][2], row[4] / rows[0][4]) for row in rows[1:]]
    record.metric("rate_worst_error", max(abs(mine / theirs - 1) for mine, theirs in ratios), "abs:0.01")
    for name, (ratio, _) in zip(("between", "near", "limit"), ratios, strict=True):
        record.metric(f"rate_ratio_{name}", ratio, "rel:0.02")
