"""What a `standard` run says: gains over SGD from the same start, sharpness at the averages, accuracy against H."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from papercore.experiments.local_sgd.standard_forms import Form
from papercore.lab.config import Config
from papercore.lab.record import Record
from papercore.lab.statistics import Paired, paired

Run = dict[str, Any]
Array = NDArray[np.float64]
# "A tenth of the time", for condition 2.
SHORT = 0.1
COLUMNS = [
    "part",
    "H",
    "eta H",
    "test accuracy",
    "gain",
    "se",
    "wins",
    "test loss",
    "train loss",
    "top",
    "trace",
]


def report(
    config: Config, form: Form, record: Record, runs: dict[str, dict[int, list[Run]]], starts: dict[str, Run]
) -> None:
    """Fill the record from the runs of all seeds, runs[part][h][seed]."""
    rates = {"post": form.lr, "large": form.lr * form.large_times, "noise": form.noise_lr}
    rows: list[list[Any]] = []
    record.metric("standard_seeds", len(form.seeds), "exact")
    for part, arms in runs.items():
        base = _at(arms[1], -1)
        record.array(f"standard_{part}_seed_accuracy", np.array([_at(arms[h], -1) for h in arms]))
        for h, some in arms.items():
            accuracy = _at(some, -1)
            name = f"standard_{part}_h{h}"
            record.metric(f"{name}_accuracy", accuracy.mean(), "abs:1.5")
            row: list[Any] = [part, h, rates[part] * h, accuracy.mean(), None, None, None]
            row += [
                _mean(some, "test_loss"),
                _mean(some, "train_loss"),
                _mean(some, "top"),
                _mean(some, "trace"),
            ]
            if h != 1 and len(accuracy) > 1:
                pair = _paired(accuracy, base)
                row[4:7] = [pair.difference, pair.se, int((accuracy > base).sum())]
                record.metric(f"{name}_gain", pair.difference, f"se:3:{name}_gain_se")
                record.metric(f"{name}_gain_se", pair.se, "rel:0.9")
                for what in ("top", "trace"):
                    # Of the means: a trace by random probes may be negative for one seed that is no minimiser.
                    ratio = _mean(some, what) / _mean(arms[1], what)
                    record.metric(f"{name}_{what}_ratio", ratio, "rel:0.3")
                if part == "post":
                    _short(record, name, some, arms[1])
            rows.append(row)
            for what in (
                "step",
                "test_accuracy",
                "test_loss",
                "train_loss",
                "sharpness_step",
                "top",
                "trace",
            ):
                record.array(f"{name}_{what}", np.array([run[what] for run in some]))
            if some[0]["spread"].size:
                record.array(f"{name}_spread_step", some[0]["spread_step"])
                record.array(f"{name}_spread", np.array([run["spread"] for run in some]))
    record.table("standard", COLUMNS, rows)
    record.note(
        "standard_form",
        f"{form.train_images:,} training and {form.test_images:,} test images of {32 // form.pool} x {32 // form.pool} pixels, "
        f"ResNet-{form.depth} of width {form.width} with group norm, K = {form.workers}, B_loc = {form.local_batch}, "
        f"{len(form.seeds)} seeds.",
    )
    _conditions(form, record, runs)


def _short(record: Record, name: str, some: list[Run], base: list[Run]) -> None:
    """The gain at the first common measurement at or after a tenth of the steps."""
    steps = int(some[0]["step"][-1])
    common = sorted(set(map(int, some[0]["step"])) & set(map(int, base[0]["step"])))
    at = next(step for step in common if step >= SHORT * steps)
    pair = _paired(*(100 * np.array([_value(run, at) for run in arm]) for arm in (some, base)))
    record.metric(f"{name}_short_steps", at, "exact")
    record.metric(f"{name}_short_gain", pair.difference, f"se:3:{name}_short_gain_se")
    record.metric(f"{name}_short_gain_se", pair.se, "rel:0.9")


def _conditions(form: Form, record: Record, runs: dict[str, dict[int, list[Run]]]) -> None:
    """The numbers that the claims on the two conditions and on H rest on. H was fixed beforehand: the middle of the list."""
    if len(form.seeds) < 2 or len(runs["post"]) < 3:
        return
    small, large = sorted(runs["post"])[1], max(runs["post"])
    main = sorted(runs["post"])[1:][(len(runs["post"]) - 1) // 2]
    period = form.large_period if form.large_period in runs["post"] else main
    difference = _paired(
        _at(runs["post"][period], -1) - _at(runs["post"][1], -1),
        _at(runs["large"][form.large_period], -1) - _at(runs["large"][1], -1),
    )
    record.metric(
        "standard_small_minus_large_gain", difference.difference, "se:3:standard_small_minus_large_gain_se"
    )
    record.metric("standard_small_minus_large_gain_se", difference.se, "rel:0.9")
    record.metric("standard_main_h", main, "exact")
    for what in ("gain", "gain_se", "short_gain", "short_gain_se", "short_steps", "top_ratio", "trace_ratio"):
        record.metric(f"standard_main_{what}", record.metrics[f"standard_post_h{main}_{what}"], "rel:0.9")
    for name, h in (("shortest", small), ("longest", large)):
        record.metric(f"standard_{name}_h", h, "exact")
        record.metric(f"standard_{name}_gain", record.metrics[f"standard_post_h{h}_gain"], "rel:0.9")
    noise = sorted(runs["noise"])
    accuracy = [float(_at(runs["noise"][h], -1).mean()) for h in noise]
    record.metric(
        "standard_noise_longest_gain", record.metrics[f"standard_noise_h{noise[-1]}_gain"], "rel:0.9"
    )
    record.metric(
        "standard_noise_longest_gain_se", record.metrics[f"standard_noise_h{noise[-1]}_gain_se"], "rel:0.9"
    )
    record.metric("standard_noise_smallest_rise", float(np.diff(accuracy).min()), "abs:1.5")
    record.metric("standard_noise_sgd_accuracy", accuracy[0], "abs:1.5")
    record.metric("standard_noise_longest_accuracy", accuracy[-1], "abs:1.5")


def _paired(first: Array, second: Array) -> Paired:
    return paired(first.tolist(), second.tolist())


def _at(some: list[Run], index: int) -> Array:
    """Test accuracy in percent at one place of the curves, one number a seed."""
    return np.array([100 * float(run["test_accuracy"][index]) for run in some])


def _value(run: Run, step: int) -> float:
    return float(run["test_accuracy"][list(map(int, run["step"])).index(step)])


def _last(some: list[Run], name: str) -> Array:
    return np.array([float(run[name][-1]) for run in some])


def _mean(some: list[Run], name: str) -> float:
    return float(_last(some, name).mean())
