"""Figures of the problem whose drift is known: sharpness under ten schedules, and the ratio of drifts.

Glossary
    sharpness  u^2 + v^2 on the hyperbola u v = 1; starts at 4.25, at best 2
    share      averages over steps, percent
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from papercore.lab.figures import GREY, series_style, style
from papercore.lab.page import Drawn, require, rows
from papercore.lab.record import Record

# Places in the palette: a schedule looks the same in every figure.
INDEX = {"constant": 0, "qsr": 1, "inverse": 2, "cubic": 4, "dp": 6}
# Room for a line of text above a figure; the style's own spacing would cut four entries off at the edge.
LEGEND: dict[str, Any] = {
    "loc": "outside upper left",
    "columnspacing": 1.2,
    "handlelength": 2.3,
    "handletextpad": 0.5,
    "fontsize": 9,
    "borderaxespad": 0.1,
}
_FRONTIERS = {
    "constant": "constant H",
    "inverse": "1/η rule",
    "qsr": "QSR",
    "cubic": "cubic rule",
}


def toy(record: Record) -> Drawn:
    """Final sharpness against communication: theory as lines, simulations as points; and the way there in slow time."""
    require(
        record,
        "toy",
        "toy_path_0",
        *(f"frontier_{w}_{name}" for w in ("share", "sharpness") for name in _FRONTIERS),
    )
    found = rows(record, "toy")
    with style(height=3.4):
        fig = Figure()
        ax, side = fig.subplots(1, 2, width_ratios=(1.35, 1))
        for name, label in _FRONTIERS.items():
            x, y = (record.arrays[f"frontier_{what}_{name}"] for what in ("share", "sharpness"))
            ax.plot(x, y, label=label, **series_style(INDEX[name]) | {"marker": "none"})
        for row in found:
            which = _family(row["schedule"])
            look = series_style(INDEX[which])
            ax.errorbar([row["share"]], [row["simulated"]], yerr=[2 * row["se"]], color=look["color"], marker=look["marker"], linestyle="none")  # fmt: skip
        ax.set(
            xscale="log",
            xlabel="share of data parallel, %",
            ylabel="sharpness at the end",
            ylim=(2.3, 4.0),
            xlim=(0.4, 130),
        )
        # One colour a family; the second QSR run is dotted.
        for index, which in ((0, "dp"), (5, "qsr"), (2, "constant"), (7, "qsr")):
            look = series_style(INDEX[which], points=60) | ({"linestyle": ":"} if index == 7 else {})
            label = found[index]["schedule"]
            side.plot(
                record.arrays[f"toy_time_{index}"], record.arrays[f"toy_path_{index}"], label=label, **look
            )
        side.legend(fontsize=8, loc="lower left")
        side.axhline(2, color=GREY, linewidth=1.0, linestyle=":")
        side.set(xlabel="slow time, Σ η²", ylabel="sharpness", ylim=(1.2, 4.5))
        fig.legend(*ax.get_legend_handles_labels(), ncols=4, **LEGEND)
    m = record.metrics
    alt = (
        f"Left: final sharpness against communication for four families of schedules; simulated points lie on the theory's lines. At 6.25 % of communication "
        f"constant H ends at {m['frontier_constant']:.2f}, 1/eta at {m['frontier_inverse']:.2f}, QSR at {m['frontier_qsr']:.2f}, the cubic rule at "
        f"{m['frontier_cubic']:.2f}. Right: sharpness over slow time, from 4.25 to "
        + ", ".join(f"{found[i]['simulated']:.2f} ({found[i]['schedule']})" for i in (0, 2, 5, 7))
        + "."
    )
    caption = (
        f"Left: lines: exact theory; points: simulations with {record.config['toy_replicas']} replicas (whiskers of two standard errors are mostly hidden by them). Lower is "
        "flatter, left is cheaper. **By this drift alone constant $H$ is best at every budget.** The problem has no penalty for a large $H$ at a large "
        "learning rate, and that is where QSR makes its case. Right: the way there; all curves share one slow clock."
    )
    return Drawn("fig-qsr-toy", fig, alt, caption)


def _family(schedule: str) -> str:
    if schedule == "data parallel":
        return "dp"
    return next(
        (key for text, key in (("QSR", "qsr"), ("1/η", "inverse"), ("cubic", "cubic")) if text in schedule),
        "constant",
    )


def rates(record: Record) -> Drawn:
    """Drift over that of SGD against eta H, with both theories and the limits 1 and K."""
    require(record, "rates")
    found = rows(record, "rates")
    x = [row["eta_h"] for row in found]
    with style(height=2.7):
        fig = Figure()
        ax = fig.subplots()
        for level, text, at in ((1, "SGD", 10), (8, "K = 8", 0.02)):
            ax.axhline(level, color=GREY, linewidth=1.0, linestyle=":")
            ax.annotate(text, (at, level), va="bottom", ha="right", color=GREY)
        ax.plot(x, [row["theory"] for row in found], label="theory, step by step", **series_style(0))
        ax.plot(x, [row["continuous"] for row in found], label="Slow SDE (small η)", **series_style(2) | {"marker": "none"})  # fmt: skip
        ax.errorbar(
            x,
            [row["measured"] for row in found],
            yerr=[2 * row["se"] for row in found],
            label="simulated",
            color="#222222",
            marker="D",
            markersize=4.5,
            linestyle="none",
            zorder=5,
        )
        ax.set(xscale="log", xlabel="η H", ylabel="drift over that of SGD", ylim=(0, 9.2))
        fig.legend(ncols=3, **LEGEND)
    alt = "Drift over that of SGD against eta H at eta = 0.01 and K = 8: " + ", ".join(
        f"{row['measured']:.2f} at H = {row['H']}" for row in found
    )
    caption = (
        "How much faster local SGD drifts to flat minima than SGD, at a fixed learning rate of 0.01. At $H = 1$ nothing is gained; where "
        "$\\eta H$ is large the factor is the number of workers. QSR sends $\\eta H$ to infinity as $\\eta$ falls; the rule $H \\sim 1/\\eta$ "
        "stays at one place in between. Whiskers: two standard errors."
    )
    return Drawn("fig-qsr-rates", fig, f"{alt}.", caption)
