"""The chapter at `quick` scale: the theory on problems with a known answer, then digits with wrong labels.

Settings of the digits (learning rate, steps, share of wrong labels) were chosen on seeds below 100; the runs here begin at 100.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from papercore.experiments.local_sgd import digits, toys
from papercore.experiments.local_sgd.config import QuickConfig
from papercore.experiments.local_sgd.rates import early_gap, gap
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.statistics import paired, summarize
from papercore.local_sgd import ConstantH, communication_volume, constant_lr

# Steps of the paper's three runs (epochs * steps an epoch), H and learning rate, as in its code.
PAPER_RUNS = (("CIFAR-10 post-local", 250 * 12, 600, 0.32), ("ImageNet post-local", 50 * 156, 26, 0.16))
MAP_ETAS = np.geomspace(1e-3, 0.4, 40)
MAP_STEPS = np.geomspace(10, 1e6, 51)
MAP_ETA_H = 1.0


def run_quick(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Fill the record; every part is a stage, so that an interrupted run goes on."""
    if 0 in config.periods or 1 in config.periods or not set(config.post_periods):
        raise ValueError(
            "periods and post_periods are lengths of rounds of Local SGD, at least 2, one at least"
        )
    threads = torch.get_num_threads()
    # Small tensors: more threads only wait for each other, and the sums stay in one order.
    torch.set_num_threads(1)
    try:
        _rates(config, record, stages)
        _slow_time(config, record, stages)
        _conditions(config, record, stages)
        _diffusion(config, record, stages)
        _communication(record)
        _scratch(config, record, stages)
        _controls(config, record, stages)
        _post_local(config, record, stages)
    finally:
        torch.set_num_threads(threads)


def _rates(config: QuickConfig, record: Record, stages: Stages) -> None:
    """How many times faster than SGD the sharpness falls, against eta * H."""
    found = stages.get("rates", lambda: toys.rate_rows(config, 1000 * config.seed))
    rows = found["rows"]
    record.table("rates", toys.RATE_COLUMNS, [[row[0], int(row[1]), *row[2:]] for row in rows.tolist()])
    record.table(
        "halvings", toys.RATE_COLUMNS, [[row[0], int(row[1]), *row[2:]] for row in found["halvings"].tolist()]
    )
    eta, h, simulated, se, discrete, slow = rows.T
    k = config.workers
    record.metric("workers", k, "exact")
    record.metric("rate_discrete_worst", np.max(np.abs(simulated / discrete - 1)), "abs:0.005")
    record.metric("rate_discrete_worst_z", np.max(np.abs(simulated - discrete) / se), "abs:2")
    record.metric("rate_slow_sde_worst", np.max(np.abs(simulated / slow - 1)), "abs:0.02")
    fine = eta == eta.min()
    record.metric(
        "rate_slow_sde_worst_from_10", np.max(np.abs(simulated / slow - 1)[fine & (h >= 10)]), "abs:0.01"
    )
    one = simulated[fine & (h == 1)][0]
    record.metric("rate_h1", one, "rel:0.01")
    record.metric("rate_h1_slow_sde", slow[fine & (h == 1)][0], "exact")
    record.metric("rate_largest", simulated[fine][-1], "rel:0.01")
    record.metric("rate_largest_eta_h", (eta * h)[fine][-1], "exact")
    record.metric("rate_limit_worst", np.max(np.abs(simulated / k - 1)[eta * h * 2.5 > 20]), "abs:0.01")
    steps = np.diff(simulated[fine])
    record.metric("rate_smallest_rise", steps.min(), "abs:0.05")
    record.metric("rate_last_rise_share", steps[-1] / (simulated[fine][-1] - one), "abs:0.01")
    record.metric("rate_extrapolated_worst", _extrapolated(rows), "abs:0.02")
    errors = found["halvings"]
    gaps = np.abs(errors[:, 2] / errors[:, 5] - 1)
    record.metric("error_exponent", _slope(errors[:, 0], gaps), "abs:0.2")
    record.metric(
        "error_exponent_theory", _slope(errors[:, 0], np.abs(errors[:, 4] / errors[:, 5] - 1)), "exact"
    )
    record.metric("error_at_smallest_eta", gaps[-1], "abs:0.003")


def _extrapolated(rows: NDArray[np.float64]) -> float:
    """Worst relative gap to the Slow SDE after extrapolation to eta = 0 at the same eta H, over the pairs of the grid."""
    found = {(row[0], row[1]): row for row in rows}
    coarse, fine = rows[:, 0].max(), rows[:, 0].min()
    gaps = []
    for (eta, h), row in found.items():
        half = found.get((fine, 2 * h))
        if eta == coarse and half is not None:
            gaps.append(abs((2 * half[2] - row[2]) / half[5] - 1))
    return max(gaps)


def _slow_time(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Sharpness against slow time, simulated on top of the theory."""
    found = stages.get("slow-time", lambda: toys.curves(config, 1000 * config.seed + 10))
    worst, worst_z = 0.0, 0.0
    for h in toys.CURVES[2]:
        for name in ("time", "mean", "se", "theory", "u", "v"):
            record.array(f"curve_{name}_{h}", found[f"{name}_{h}"])
        gaps = np.abs(found[f"mean_{h}"] - found[f"theory_{h}"])[1:]
        worst = max(worst, float(np.max(gaps / found[f"theory_{h}"][1:])))
        worst_z = max(worst_z, float(np.max(gaps / found[f"se_{h}"][1:])))
        record.metric(f"sharpness_end_h{h}", found[f"mean_{h}"][-1], "rel:0.01")
    record.metric("sharpness_curve_worst", worst, "abs:0.003")
    record.metric("sharpness_curve_worst_z", worst_z, "abs:2")


def _conditions(config: QuickConfig, record: Record, stages: Stages) -> None:
    """The two conditions on the hyperbola: the gap against learning rate and steps, and checks of the map by simulation."""
    k, s2 = config.workers, config.label_noise
    surface = np.array(
        [gap(MAP_STEPS, eta, max(1.0, MAP_ETA_H / eta), k, s2, start=toys.SHARPNESS) for eta in MAP_ETAS]
    )
    record.array("gap_map", surface)
    record.array("gap_etas", MAP_ETAS)
    record.array("gap_steps", MAP_STEPS)
    by_h = np.array(
        [
            [
                float(gap(0.8 / (eta**2 * s2), eta, h, k, s2, start=toys.SHARPNESS))
                for h in np.geomspace(1, 1000, 31)
            ]
            for eta in (0.05, 0.02, 0.005)
        ]
    )
    record.array("gap_by_h", by_h)
    rows = stages.get("gaps", lambda: toys.gap_rows(config, 1000 * config.seed + 20))["rows"]
    record.table(
        "gaps", toys.GAP_COLUMNS, [[row[0], int(row[1]), int(row[2]), *row[3:]] for row in rows.tolist()]
    )
    simulated, se, closed = rows[:, 3], rows[:, 4], rows[:, 5]
    # A gap that is zero to five digits has no standard error to speak of.
    off = np.abs(simulated - closed)
    record.metric("gap_worst_z", np.max(off / np.maximum(se, 1e-3)), "abs:2")
    record.metric("gap_worst", np.max(off), "abs:0.01")
    # Condition 1 at a fixed number of steps, condition 2 at a fixed learning rate.
    at = int(np.argmin(np.abs(MAP_STEPS - 2000)))
    best = int(np.argmax(surface[:, at]))
    record.metric("gap_best_eta", MAP_ETAS[best], "exact")
    record.metric("gap_best", surface[best, at], "exact")
    record.metric("gap_largest_eta", surface[-1, at], "abs:1e-6")
    record.metric("gap_smallest_eta", surface[0, at], "exact")
    few = np.array([10.0, 30.0, 100.0, 300.0])
    early = np.array([float(gap(n, 0.005, 200, k, s2, start=toys.SHARPNESS)) for n in few])
    record.metric("gap_early_exponent", _slope(few, early), "exact")
    line = early_gap(few, 0.005, 200, k, s2, start=toys.SHARPNESS)
    record.metric("gap_early_worst", np.max(np.abs(early / line - 1)), "exact")
    simulated_few, simulated_many = rows[0, 3], rows[1, 3]
    record.metric("gap_2000_steps", simulated_few, "rel:0.05")
    record.metric("gap_20000_steps", simulated_many, "rel:0.02")


def _diffusion(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Diffusion along the valley against the number of workers, at one local batch."""
    found = stages.get("valley", lambda: toys.valley(config, 1000 * config.seed + 30))
    rows = found["rows"]
    record.table("valley", toys.VALLEY_COLUMNS, [[int(row[0]), *row[1:]] for row in rows.tolist()])
    k, mean, se, variance, late, late_se, law = rows.T
    record.metric("valley_variance_exponent", _slope(k, variance), "abs:0.1")
    pooled = float(np.sum(mean / se**2) / np.sum(1 / se**2))
    record.metric("valley_drift_worst_z", np.max(np.abs(mean - pooled) / se), "abs:2")
    record.metric("valley_moved", toys.VALLEY["start"] - pooled, "rel:0.05")
    record.metric("valley_stationary_worst_z", np.max(np.abs(late - law) / late_se), "abs:2")
    record.metric("valley_sharpness_fewest", 1 + late[0], "rel:0.1")
    record.metric("valley_sharpness_most", 1 + late[-1], "rel:0.02")
    record.array("valley_steps", found["steps"])
    for workers in config.valley_workers:
        record.array(f"valley_mean_{workers}", found[f"mean_{workers}"])
        record.array(f"valley_sd_{workers}", found[f"sd_{workers}"])


def _communication(record: Record) -> None:
    """Rounds and communication of the paper's runs, from their settings."""
    rows = []
    for name, steps, h, lr in PAPER_RUNS:
        report = communication_volume(ConstantH(h), constant_lr(lr, steps), steps)
        rows.append([name, steps, h, report.rounds, 100 * report.fraction, lr * h])
    record.table("communication", ["run", "steps", "H", "rounds", "communication %", "eta H"], rows)


def _scratch(config: QuickConfig, record: Record, stages: Stages) -> None:
    """From a fresh network on wrong labels: final accuracy and losses of every arm, paired with data parallel."""
    runs = {
        h: stages.get(f"digits-scratch-h{h}", _bound(digits.scratch, config, h)) for h in (0, *config.periods)
    }
    _compare(record, "scratch", runs)
    for h, run in runs.items():
        _curves(record, f"scratch_h{h}", run)
    record.array("scratch_steps", runs[0]["steps"])
    record.metric("seeds", config.seeds, "exact")
    # The gain early and late: on digits it does not wait for a long training.
    early = int(np.searchsorted(runs[0]["steps"], 300))
    for h in config.periods:
        for name, at in (("early", early), ("late", -1)):
            pair = paired(100 * runs[h]["test_accuracy"][:, at], 100 * runs[0]["test_accuracy"][:, at])
            record.metric(f"scratch_h{h}_gain_{name}", pair.difference, f"se:3:scratch_h{h}_gain_{name}_se")
            record.metric(f"scratch_h{h}_gain_{name}_se", pair.se, "rel:0.6")


def _controls(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Clean labels, and fresh label noise: nothing to memorise, and no difference that can be told from zero."""
    for kind in digits.CONTROLS:
        runs = {
            h: stages.get(f"digits-{kind}-h{h}", _bound(digits.scratch, config, h, kind))
            for h in (0, digits.CONTROL_PERIOD)
        }
        _compare(record, kind, runs)


def _post_local(config: QuickConfig, record: Record, stages: Stages) -> None:
    """From a common start: curves, end points, sharpness."""
    start = stages.get("digits-post-phase1", lambda: digits.phase_1(config))
    runs = {
        h: stages.get(f"digits-post-h{h}", _bound(digits.phase_2, config, h, start))
        for h in (0, *config.post_periods)
    }
    _curves(record, "post_phase1", start)
    record.array("post_phase1_steps", start["steps"])
    record.metric("post_start_accuracy", 100 * start["test_accuracy"][:, -1].mean(), "abs:1.5")
    record.metric("post_start_train_loss", start["train_loss"][:, -1].mean(), "rel:0.3")
    _compare(record, "post", runs, more=("top", "trace"))
    record.array("post_steps", runs[0]["steps"])
    for h, run in runs.items():
        _curves(record, f"post_h{h}", run)
        record.array(f"post_h{h}_top", run["top"])
        record.array(f"post_h{h}_trace", run["trace"])
    # Right after the switch: the first average of the longest period that a common step shows.
    at = int(np.searchsorted(runs[0]["steps"], 160))
    for h in runs:
        record.metric(f"post_h{h}_accuracy_160", 100 * runs[h]["test_accuracy"][:, at].mean(), "abs:1.5")
        record.metric(f"post_h{h}_train_loss_160", runs[h]["train_loss"][:, at].mean(), "rel:0.4")
    share = (
        config.switch + (config.post_steps - config.switch) * runs[max(runs)]["communication"]
    ) / config.post_steps
    record.metric("post_communication", 100 * share, "exact")


def _compare(record: Record, kind: str, runs: dict[int, dict[str, Any]], more: tuple[str, ...] = ()) -> None:
    """A table of final values, and metrics of every arm's difference from data parallel, seed by seed."""
    columns = [
        "arm",
        "test accuracy",
        "difference",
        "se",
        "wins",
        "test loss",
        "difference of loss",
        "se of loss",
        "train loss",
        *more,
    ]
    rows: list[list[Any]] = []
    base = runs[0]
    for h, run in runs.items():
        last = {name: run[name][:, -1] for name in ("test_accuracy", "test_loss", "train_loss")}
        for name in ("test_loss", "train_loss"):
            record.metric(f"{kind}_h{h}_{name}", last[name].mean(), "rel:0.3")
        record.metric(f"{kind}_h{h}_accuracy", 100 * last["test_accuracy"].mean(), "abs:1.5")
        row: list[Any] = [
            "data parallel" if h == 0 else f"H = {h}",
            100 * last["test_accuracy"].mean(),
            None,
            None,
            None,
        ]
        row += [
            last["test_loss"].mean(),
            None,
            None,
            last["train_loss"].mean(),
            *(run[name].mean() for name in more),
        ]
        if h:
            gain = paired(100 * last["test_accuracy"], 100 * base["test_accuracy"][:, -1])
            loss = paired(last["test_loss"], base["test_loss"][:, -1])
            wins = int((last["test_accuracy"] > base["test_accuracy"][:, -1]).sum())
            row[2:5], row[6:8] = [gain.difference, gain.se, wins], [loss.difference, loss.se]
            for name, pair in (("gain", gain), ("loss_change", loss)):
                record.metric(f"{kind}_h{h}_{name}", pair.difference, f"se:3:{kind}_h{h}_{name}_se")
                record.metric(f"{kind}_h{h}_{name}_se", pair.se, "rel:0.6")
            record.metric(f"{kind}_h{h}_wins", wins, "abs:3")
            for name in more:
                ratio = summarize(np.log(run[name] / base[name]))
                record.metric(f"{kind}_h{h}_{name}_ratio", math.exp(ratio.mean), "rel:0.3")
                record.metric(f"{kind}_h{h}_{name}_log_se", ratio.se, "rel:0.8")
        rows.append(row)
    record.table(kind, columns, rows)


def _curves(record: Record, name: str, run: dict[str, Any]) -> None:
    for what in ("test_accuracy", "test_loss", "train_loss"):
        record.array(f"{name}_{what}", run[what])


def _slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Exponent of y = c x^exponent, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _bound(function: Any, *arguments: Any) -> Any:
    """A stage's function with its arguments bound now, not when a loop has moved on."""
    return lambda: function(*arguments)
