"""Figures of how training goes: the losses of four choices of what is trained, and what one change does.

Glossary
    curve     test accuracy against steps; "along the curve" is its mean without the start
    sd        sample standard deviation over seeds, divisor S - 1
    points    percentage points of accuracy
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from papercore.experiments.mezo.arms import ARMS
from papercore.experiments.mezo.figures_theory import LEGEND
from papercore.lab.claims import reported_value
from papercore.lab.figures import COLOURS, GREY, MARKERS, reported_style, series_style, style
from papercore.lab.page import Drawn, require, rows
from papercore.lab.record import Record

TABLE_6 = "Table 6 (n-SPSA, fixed 10K fwd)"
TABLE_11 = "Table 11 (one-point, k=512)"
# Places in the palette: a method looks the same in every figure.
INDEX = {"full": 0, "lora": 2, "prefix": 3, "norms_biases": 4}


def adapters(record: Record) -> Drawn:
    """Training loss of all weights, LoRA, a prefix, and norms with biases: sizes differ, speeds hardly do."""
    names = {"full": "all weights", "lora": "LoRA", "prefix": "prefix", "norms_biases": "norms and biases"}
    require(record, *(f"losses_{name}" for name in names), *(f"{name}_trained" for name in names))
    with style(height=2.8):
        fig = Figure()
        ax = fig.subplots()
        for name, label in names.items():
            losses = np.array([smooth(run) for run in record.arrays[f"losses_{name}"]])
            size = f"{label} ({record.metrics[f'{name}_trained']:,.0f})"
            mean_band(ax, np.arange(1, losses.shape[1] + 1), losses, size, INDEX[name])
        ax.axhline(0.5, color=GREY, linewidth=1.0, linestyle=":")
        ax.annotate(
            "level that claim C6 counts to",
            (0.99, 0.5),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color=GREY,
        )
        spread_note(ax, len(record.arrays["losses_full"]), at=(0.99, 0.97))
        ax.set(xlabel="MeZO step (two forward passes)", ylabel="training loss, nat", ylim=(0, None))
        fig.legend(ncols=2, **LEGEND)
    m, seeds = record.metrics, len(record.arrays["losses_full"])
    steps = {name: m[f"{name}_steps_to_half_nat"] for name in names}
    sizes = [m[f"{name}_trained"] for name in names]
    above = {
        label: sum(float(smooth(run)[-1]) > 0.5 for run in record.arrays[f"losses_{name}"])
        for name, label in names.items()
    }
    failed = (
        ", ".join(f"{count} of {seeds} with {label}" for label, count in above.items() if count) or "none"
    )
    ratio = max(sizes) / min(sizes)
    alt = (
        "Training loss against steps for four choices of what is trained. Mean steps to a loss of 0.5: "
        + ", ".join(
            f"{label} ({m[f'{name}_trained']:,.0f} weights) {steps[name]:.0f}"
            for name, label in names.items()
        )
    )
    caption = (
        f"Training loss at k = {max(record.config['shots'])}, {record.scale} scale: running mean of five steps, then the mean of {seeds} "
        f"seeds; bands: one standard deviation. Between the most and the fewest trained weights lies a factor of {ratio:,.0f}; "
        f"if the rate fell with the number of weights, so would the curves. Runs that end above the dotted line: {failed}."
    )
    return Drawn("fig-mezo-adapters", fig, f"{alt}.", caption)


VARIATIONS = {
    "n4": "n = 4 directions a step",
    "n16": "n = 16 directions a step",
    "one_point": "one-point estimate",
    "rademacher": "random signs for Gaussian z",
    "adam": "Adam from the log",
    "eps_1e-4": "eps 10 times smaller",
    "eps_1e-2": "eps 10 times larger",
    "batch_8": "batch of 8",
    "decayed": "linear decay of the rate",
    "longer": f"{ARMS['longer'].budget} times the steps",
}


def variations(record: Record) -> Drawn:
    """What one change does to the accuracy, in points, beside what the paper reports for the same change."""
    require(record, "variations", "full_area", "full_late_area", "n4_area")
    table = {row["what changes"]: row for row in rows(record, "variations")}
    m = record.metrics
    shown = []
    for name, label in VARIATIONS.items():
        if name in table:
            # More steps are asked where they end, everything else how fast and how far it goes.
            what = "final" if name == "longer" else "curve"
            gap = table[name][f"{what} mean"] - table["full"][f"{what} mean"]
            shown.append((label, gap, table[name][f"{what} std"]))
        elif f"{name}_area" in m:
            # Several directions a step have no update at first: compared from where they do.
            base = "full_late_area" if ARMS[name].n > 1 else "full_area"
            shown.append((label, m[f"{name}_area"] - m[base], m[f"{name}_area_std"]))
    order = [label for label, _, _ in shown]
    with style(height=3.1):
        fig = Figure()
        ax = fig.subplots()
        ax.axvline(0, color=GREY, linewidth=1.0)
        ax.errorbar([100 * gap for _, gap, _ in shown], range(len(shown)), xerr=[100 * sd for _, _, sd in shown], fmt=MARKERS[0], color=COLOURS[0],
                    elinewidth=1.2, capsize=2.5, label="measured, ± 1 s.d.")  # fmt: skip
        paper = _reported_variations()
        for label, gaps in paper.items():
            look = reported_style() | {
                "markersize": 5.5,
                "label": "reported, one marker a task" if label == next(iter(paper)) else None,
            }
            ax.plot(gaps, [order.index(label) + 0.26] * len(gaps), **look)
        ax.set_yticks(range(len(shown)), order)
        ax.invert_yaxis()
        ax.set(xlabel="change of accuracy along the curve, points")
        ax.grid(visible=False, axis="y")
        fig.legend(ncols=2, **LEGEND)
    alt = (
        "Change in accuracy, in points, when one thing changes: "
        + ", ".join(f"{label} {100 * gap:+.1f}" for label, gap, _ in shown)
        + "."
    )
    caption = (
        "Accuracy along the learning curve (its mean over the test points, so both how fast and how far; for several directions a step "
        "over the points from a sixth of the run on) against that of n = 1, eps = 0.001, "
        f"all sentences in every step; for more steps, accuracy at the end. At {record.scale} scale, k = {max(record.config['shots'])}, "
        f"{m['seeds']:.0f} seeds for the first five rows, {table['full']['seeds']} for the others; whiskers: one standard deviation of "
        "the changed run. Hollow: the paper's change of final accuracy. What lies within its whisker says little."
    )
    return Drawn("fig-mezo-variations", fig, alt, caption)


def _reported_variations() -> dict[str, list[float]]:
    """Differences that the paper reports, in points: label -> one value a task."""
    out: dict[str, list[float]] = {}
    for n in (4, 16):
        out[VARIATIONS[f"n{n}"]] = [
            reported_value("mezo", TABLE_6, f"n={n} constant", task)
            - reported_value("mezo", TABLE_6, "n=1 constant", task)
            for task in ("SST-2", "SNLI", "TREC")
        ]
    tasks = ("SST-2", "SST-5", "SNLI", "MNLI", "RTE", "TREC")
    out[VARIATIONS["one_point"]] = [
        reported_value("mezo", TABLE_11, "One-point 40K", task)
        - reported_value("mezo", TABLE_11, "SPSA 20K steps", task)
        for task in tasks
    ]
    return out


STANDARD_ARMS = {
    "full": "all weights",
    "norms_biases": "norms and biases",
    "lora": "LoRA",
    "no_prompt": "no prompt",
}


def standard(record: Record) -> Drawn:
    """Test accuracy against steps at `standard` scale, beside what the paper reports for the same task and k."""
    arms = [name for name in STANDARD_ARMS if f"standard_k_{name}_accuracy" in record.arrays]
    require(record, "standard_k_full_accuracy", "standard_zero_shot", "standard_chance")
    ends, seeds = {}, len(record.arrays["standard_k_full_accuracy"])
    with style(height=3.0):
        fig = Figure()
        ax = fig.subplots()
        for name in arms:
            runs = np.asarray(record.arrays[f"standard_k_{name}_accuracy"])
            ends[name] = float(runs[:, -1].mean())
            mean_band(
                ax, record.arrays[f"standard_k_{name}_steps"], runs, STANDARD_ARMS[name], INDEX.get(name, 1)
            )
        for key, words in (("standard_zero_shot", "zero-shot"), ("standard_chance", "chance")):
            ax.axhline(record.metrics[key], color=GREY, linewidth=1.0, linestyle=":")
            ax.annotate(
                words,
                (0.995, record.metrics[key]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
                color=GREY,
            )
        last = float(np.max(record.arrays["standard_k_full_steps"]))
        for row, value in (("Prompt", 0), ("No prompt", 1)):
            accuracy = reported_value("mezo", "Table 5 (prompt ablation, k=16, 10K fwd)", row, "TREC") / 100
            ax.plot([1.03 * last], [accuracy], label=f"reported, {row.lower()}", **reported_style(value))
        ax.set(xlabel="MeZO step", ylabel="test accuracy", ylim=(0, 1.03))
        fig.legend(ncols=3, **LEGEND)
    alt = f"Test accuracy at the last of {last:.0f} steps: " + ", ".join(
        f"{STANDARD_ARMS[name]} {ends[name]:.2f}" for name in arms
    )
    caption = (
        f"Test accuracy of MeZO on a pretrained encoder ({record.config.get('standard_corpus', 'trec')}, k = {record.config.get('standard_k', 16)}): mean of "
        f"{seeds} seeds, bands one standard deviation. Hollow, at the right edge: RoBERTa-large on TREC in the paper (Table 5)."
    )
    return Drawn("fig-mezo-standard", fig, f"{alt}.", caption)


def smooth(losses: NDArray[np.float64], window: int = 5) -> NDArray[np.float64]:
    """Mean of the last `window` values at each step, of fewer at the start: [T] -> [T].

    >>> smooth(np.array([1.0, 3.0, 5.0]), 2).tolist()
    [1.0, 2.0, 4.0]
    """
    total = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def mean_band(ax: Any, x: NDArray[Any], runs: NDArray[Any], label: str, index: int) -> None:
    """Mean and one standard deviation, with a label of its own: the caption says what the band is."""
    look = series_style(index, points=len(x))
    mean, sd = runs.mean(axis=0), runs.std(axis=0, ddof=1) if len(runs) > 1 else 0.0
    ax.plot(x, mean, label=label, **look)
    ax.fill_between(x, mean - sd, mean + sd, color=look["color"], alpha=0.18, linewidth=0.6)


def spread_note(ax: Any, seeds: int, at: tuple[float, float] = (0.99, 0.03)) -> None:
    """What the bands are, inside the figure: a band without a meaning is decoration."""
    text = f"bands: ± 1 s.d., {seeds} seeds"
    ax.annotate(
        text,
        at,
        xycoords="axes fraction",
        ha="right",
        va="bottom" if at[1] < 0.5 else "top",
        fontsize=8.5,
        color=GREY,
    )
