"""Figures on whether a graft is better behaved than the model it comes from: calibration, another domain, continual learning."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from papercore.experiments.grafting.continual import PROTOCOLS
from papercore.experiments.grafting.trust import MEASURES, METHODS
from papercore.lab.figures import COLOURS, GREY, MARKERS, series_style, style
from papercore.lab.page import Drawn, require
from papercore.lab.record import Record

LEGEND: dict[str, Any] = {"loc": "outside upper center", "frameon": False}


def _summary(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over runs, [methods, measures]."""
    require(record, "trust", "trust_before")
    values = np.asarray(record.arrays["trust"])
    return values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5


def calibration(record: Record) -> Drawn:
    """Reliability of three models, and the calibration error of all."""
    mean, se = _summary(record)
    require(record, "bins_fine_tuned", "bins_graft_learned", "bins_temperature")
    e, h = MEASURES.index("ece"), MEASURES.index("home")
    with style(height=3.5):
        fig = Figure()
        left, right = fig.subplots(1, 2, width_ratios=(1, 1.25))
        for index, (name, label) in enumerate(
            (("fine_tuned", "fine-tuned"), ("graft_learned", "graft"), ("temperature", "temperature"))
        ):
            count, confidence, right_share = np.asarray(record.arrays[f"bins_{name}"])
            some = count >= 30
            left.plot(confidence[some], right_share[some], label=label, **series_style(index))
        left.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1.0, marker="none")
        left.set(xlabel="confidence", ylabel="share that is right", xlim=(0.48, 1.02), ylim=(0.3, 1.02))
        left.legend(fontsize=8.5)
        at = np.arange(len(METHODS))
        right.barh(
            at, mean[:, e], xerr=2 * se[:, e], color=COLOURS[0], height=0.6, error_kw={"elinewidth": 1.0}
        )
        right.set_yticks(at, [f"{name} ({mean[i, h]:.2f})" for i, name in enumerate(METHODS)], fontsize=8.5)
        right.invert_yaxis()
        right.set(xlabel="ECE (accuracy in brackets)")
    alt = (
        f"Calibration error and accuracy at home, mean of {record.metrics['trust_runs']:.0f} runs: "
        + "; ".join(f"{name} {mean[i, e]:.3f}, {mean[i, h]:.3f}" for i, name in enumerate(METHODS))
    )
    caption = (
        f"Where fine-tuning over-fits (two tasks, {record.metrics['trust_runs']:.0f} runs, {record.scale} scale). Left: what share of the answers of a "
        "given confidence is right; below the diagonal is over-confidence (bins of at least 30 answers). Right: expected calibration error, 15 bins, "
        "± 2 s.e.; the accuracy is in brackets, because a lower error at a lower accuracy proves little."
    )
    return Drawn("fig-grafting-calibration", fig, alt + ".", caption)


def away(record: Record) -> Drawn:
    """Accuracy at home against accuracy in the other domain, by method."""
    mean, se = _summary(record)
    h, a = MEASURES.index("home"), MEASURES.index("away")
    with style(height=3.3):
        fig = Figure()
        ax = fig.subplots()
        # A temperature changes no answer.
        for look, name in enumerate(name for name in METHODS if "temperature" not in name):
            i = METHODS.index(name)
            ax.errorbar(
                mean[i, h], mean[i, a], xerr=se[i, h], yerr=se[i, a], linestyle="none", marker=MARKERS[look],
                color=COLOURS[look], label=name, markersize=7, elinewidth=1.0,
            )  # fmt: skip
        ax.set(xlabel="accuracy at home", ylabel="accuracy away")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    alt = "Accuracy at home and away: " + "; ".join(
        f"{name} {mean[i, h]:.3f}, {mean[i, a]:.3f}"
        for i, name in enumerate(METHODS)
        if "temperature" not in name
    )
    caption = (
        "Home: the training distribution, where style equals sentiment nine times in ten. Away: the other domain's words, and no such coincidence "
        f"({record.metrics['trust_runs']:.0f} runs, ± 1 s.e.). A method that learned the task and not the coincidence stands high. Compare what stands "
        "at the same accuracy at home."
    )
    return Drawn("fig-grafting-away", fig, alt + ".", caption)


def stages(record: Record) -> Drawn:
    """Accuracy on each task after each stage, under both protocols."""
    require(record, "stages")
    order = [str(name) for name in record.config["order"]]
    scores = np.asarray(record.arrays["stages"]).mean(0)  # [protocols, stages + 1, tasks]
    with style(height=2.9):
        fig = Figure()
        for ax, protocol, values in zip(fig.subplots(1, 2, sharey=True), PROTOCOLS, scores, strict=True):
            for t, task in enumerate(order):
                ax.plot(range(len(values)), values[:, t], label=task, **series_style(t))
                ax.plot(t + 1, values[t + 1, t], marker="*", markersize=13, color=COLOURS[t], zorder=5)
            ax.set_xticks(range(len(values)), ["start", *order], fontsize=8.5)
            ax.set_xlabel("after training on")
            ax.set_title("plain fine-tuning" if protocol == "plain" else "grafts, entries kept apart")
        fig.axes[0].set(ylabel="test accuracy", ylim=(0, 1.05))
        fig.legend(*fig.axes[0].get_legend_handles_labels(), ncols=3, **LEGEND)
    alt = "Accuracy after the last stage: " + "; ".join(
        f"{protocol}: "
        + ", ".join(
            f"{task} {values[-1, t]:.2f} (right after its own stage {values[t + 1, t]:.2f})"
            for t, task in enumerate(order)
        )
        for protocol, values in zip(PROTOCOLS, scores, strict=True)
    )
    caption = (
        f"Three tasks in a row (mean of {record.metrics['seeds']:.0f} seeds; star: right after the task's own stage). Left: plain fine-tuning. Right: "
        "after each stage only a graft is kept, everything else goes back, and no later stage may move its entries. The order matters: with the task "
        "that has to move every answer last, its large graft disturbs the others."
    )
    return Drawn("fig-grafting-stages", fig, alt + ".", caption)
