"""Figures of the idea and of the theory: the step as a picture, rates against dimension, second moments.

Glossary
    d, r, n    number of weights; effective rank of the Hessian; directions a step
    gamma      (r + n + 1) / n, the slowdown against SGD (Theorem 2)
    theta, z   weights; random direction
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from numpy.typing import NDArray

from papercore.lab.figures import COLOURS, GREY, MARKERS, series_style, style
from papercore.lab.page import Drawn, require, rows
from papercore.lab.record import Record
from papercore.mezo import memory_model

# The drawn valley: two weights, one steep direction and one flat one.
CURVATURE = np.array([0.35, 2.2])
START, DIRECTION, EPS, LR = np.array([-2.1, 0.85]), np.array([1.0, -0.35]), 1.15, 0.42
# Room for a line of text above a figure; the style's own spacing would cut four entries off at the edge.
LEGEND: dict[str, Any] = {
    "loc": "outside upper left",
    "columnspacing": 1.2,
    "handlelength": 2.3,
    "handletextpad": 0.5,
    "fontsize": 9,
    "borderaxespad": 0.1,
}


def idea(record: Record | None = None) -> Drawn:
    """One MeZO step on two weights, and what the ways of tuning hold in memory. Drawn from formulas; needs no record."""

    def loss(theta: NDArray[np.float64]) -> NDArray[np.float64]:
        return 0.5 * (CURVATURE * np.square(theta)).sum(axis=-1)

    plus, minus = START + EPS * DIRECTION, START - EPS * DIRECTION
    slope = float(loss(plus) - loss(minus)) / (2 * EPS)
    end = START - LR * slope * DIRECTION
    with style(height=2.7):
        fig = Figure()
        ax, boxes = fig.subplots(1, 2, width_ratios=(1.65, 1))
        x, y = np.meshgrid(np.linspace(-3.6, 0.9, 120), np.linspace(-0.7, 1.6, 120))
        ax.contour(
            x,
            y,
            loss(np.stack([x, y], axis=-1)),
            levels=[0.04, 0.2, 0.5, 1, 1.7, 2.6, 3.7],
            colors="#bcbcbc",
            linewidths=0.8,
        )
        ax.plot(*np.stack([minus, plus]).T, color=GREY, linewidth=1.0, linestyle=":", marker="none")
        _arrow(ax, START, end, COLOURS[0], "-")
        gradient = CURVATURE * START
        _arrow(ax, START, START - LR * gradient, COLOURS[1], "--")
        ax.plot(*START, marker="o", color="#222222", markersize=7)
        for point in (plus, minus):
            ax.plot(
                *point,
                marker="o",
                markerfacecolor="white",
                markeredgecolor=COLOURS[0],
                markeredgewidth=1.6,
                markersize=7,
            )
        ax.plot(0, 0, marker="*", color=GREY, markersize=11)
        for text, point, shift, side in (
            (r"$\theta$", START, (-8, -12), "right"),
            (r"$\theta+\epsilon z$" + f", loss {loss(plus):.2f}", plus, (8, 3), "left"),
            (r"$\theta-\epsilon z$" + f", loss {loss(minus):.2f}", minus, (8, 3), "left"),
            ("the step", end, (-2, 9), "left"),
            ("gradient descent", START - LR * gradient, (-8, -4), "right"),
        ):
            ax.annotate(text, point, xytext=shift, textcoords="offset points", ha=side, fontsize=9)
        ax.set(xticks=[], yticks=[], xlabel="two of the weights, lines of equal loss", aspect="equal")
        ax.grid(visible=False)
        total = _memory_boxes(boxes)
    alt = (
        f"Left: lines of equal loss over two weights. From theta the loss is read at theta plus eps z ({loss(plus):.2f}) and at theta minus eps z "
        f"({loss(minus):.2f}); the step goes along z, downhill, at an angle to the gradient. Right: bytes held for each weight: inference and MeZO "
        f"{total['mezo']:g}, MeZO with a stored direction {2 * total['mezo']:g}, Adam {total['adam']:g} and the activations."
    )
    caption = (
        "Left: a MeZO step. Two forward passes, at $\\theta+\\epsilon z$ and $\\theta-\\epsilon z$, give one number, the slope along a random "
        "direction $z$; the step goes down that slope along $z$ (solid), not along the gradient (dashed), which is never computed. "
        "Right: bytes held for each weight in half precision; Adam keeps weight, gradient and two moments in 32 bits. Drawn from formulas."
    )
    return Drawn("fig-mezo-idea", fig, alt, caption)


def _arrow(ax: Any, start: NDArray[np.float64], end: NDArray[np.float64], colour: str, line: str) -> None:
    ax.add_patch(
        FancyArrowPatch(
            tuple(start),
            tuple(end),
            arrowstyle="-|>",
            mutation_scale=13,
            color=colour,
            linestyle=line,
            linewidth=1.9,
            shrinkA=4,
            shrinkB=0,
        )
    )


def _memory_boxes(ax: Any) -> dict[str, float]:
    """Bytes a weight of four ways of using a model, as boxes; returns the totals of the closed form."""
    total = {method: memory_model(1, method) for method in ("inference", "mezo", "adam")}
    half, full = total["mezo"], total["adam"] / 4
    parts: list[tuple[str, list[tuple[str, float]]]] = [
        ("inference", [("θ", half)]),
        ("MeZO", [("θ", half)]),
        ("MeZO, z stored", [("θ", half), ("z", half)]),
        ("Adam", [("θ", full), ("grad", full), ("m", full), ("v", full)]),
    ]
    colours = {"θ": COLOURS[0], "z": COLOURS[4], "grad": COLOURS[1], "m": COLOURS[3], "v": COLOURS[5]}
    for line, (name, boxes) in enumerate(parts):
        left = 0.0
        for label, size in boxes:
            ax.add_patch(
                Rectangle(
                    (left, line - 0.32),
                    size,
                    0.64,
                    facecolor=colours[label],
                    edgecolor="#333333",
                    linewidth=0.7,
                )
            )
            ax.text(
                left + size / 2,
                line,
                label,
                ha="center",
                va="center",
                fontsize=9,
                color="white" if label in ("θ", "grad") else "black",
            )
            left += size
        if name == "Adam":
            ax.add_patch(
                Rectangle(
                    (left, line - 0.32),
                    3.2,
                    0.64,
                    facecolor="white",
                    edgecolor="#333333",
                    linewidth=0.7,
                    hatch="////",
                    linestyle="--",
                )
            )
            ax.annotate("activations", (left + 3.2, line - 0.42), ha="right", va="bottom", fontsize=8.5)
    ax.set_yticks(range(len(parts)), [name for name, _ in parts])
    ax.set(xlim=(0, 4 * full + 3.8), ylim=(len(parts) - 0.4, -0.6), xlabel="bytes a weight")
    ax.grid(visible=False, axis="y")
    return total


def rates(record: Record) -> Drawn:
    """Steps to a thousandth of the starting loss against the number of weights, at fixed effective rank and at r = d."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows(record, "rates"):
        families.setdefault(row["family"], []).append(row)
    seeds = [name for name in record.tables["rates"]["columns"] if name.startswith("seed")]
    means: dict[str, list[float]] = {}
    with style(height=3.0):
        fig = Figure()
        ax = fig.subplots()
        for index, (family, found) in enumerate(families.items()):
            steps = np.array([[row[name] for name in seeds] for row in found], dtype=float)
            mean = means[family] = list(steps.mean(axis=1))
            whiskers = np.abs(np.stack([steps.min(axis=1), steps.max(axis=1)]) - mean)
            look = series_style(6 if family == "isotropic" else index)
            label = "r = d (isotropic)" if family == "isotropic" else f"r = {found[0]['r']}"
            ax.errorbar(
                [row["d"] for row in found],
                mean,
                yerr=whiskers,
                label=label,
                elinewidth=1.0,
                capsize=2.5,
                **look,
            )
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="number of weights d",
            ylabel="MeZO steps to 0.1 % of the start",
        )
        fig.legend(ncols=4, **LEGEND)
    require(record, "isotropic_exponent", "rank_exponent", "rank_spread_over_dimension")
    m = record.metrics
    told = []
    for family, found in families.items():
        points = ", ".join(
            f"{value:.0f} at d = {row['d']:,}" for value, row in zip(means[family], found, strict=True)
        )
        told.append(f"{family}: {points}")
    alt = f"Steps against number of weights on logarithmic axes. {'; '.join(told)}"
    caption = (
        f"Quadratic losses with r unit eigenvalues among d, the others zero, in a random subspace; step size 1 / (r + 2). Points: mean of "
        f"{len(seeds)} seeds; whiskers: least and greatest. At fixed r the lines stay level, however many weights MeZO perturbs. "
        f"At r = d steps grow as d to the power {m['isotropic_exponent']:.2f}, as the naive theory says."
    )
    return Drawn("fig-mezo-rates", fig, f"{alt}.", caption)


def moments(record: Record) -> Drawn:
    """Monte-Carlo second moments and one-step decreases, over their closed forms."""
    squares, steps = rows(record, "second_moment"), rows(record, "one_step")
    with style(height=2.9):
        fig = Figure()
        left, right = fig.subplots(1, 2, width_ratios=(1.05, 1))
        names = {"gaussian": "Gaussian", "sphere": "sphere", "rademacher": "signs"}
        first = [
            (
                f"{names[row['directions']]}, {row['d']}, {row['n']}",
                row["measured"],
                row["se"],
                row["closed form"],
            )
            for row in squares
        ]
        second = [
            (f"{row['d']:,}, {row['r']}, {row['n']}", row["measured"], row["se"], row["1 - 1/gamma"])
            for row in steps
        ]
        for ax, found, index, label, heads in (
            (left, first, 0, "mean square of the estimate", "directions, d, n"),
            (right, second, 2, "loss left after one step", "d, r, n"),
        ):
            at = np.arange(len(found))
            measured, se, closed = (np.array([row[i] for row in found]) for i in (1, 2, 3))
            ax.axvline(1.0, color=GREY, linewidth=1.0)
            ax.errorbar(
                measured / closed,
                at,
                xerr=2 * se / closed,
                fmt=MARKERS[index],
                color=COLOURS[index],
                elinewidth=1.2,
                capsize=2.5,
            )
            ax.set_yticks(at, [row[0] for row in found], fontsize=8.5)
            ax.invert_yaxis()
            reach = float(np.max(np.abs(measured / closed - 1) + 2 * se / closed))
            # Room at the right for the values themselves.
            ax.set(xlabel=f"{label}\nmeasured / closed form", xlim=(1 - 1.1 * reach, 1 + 2 * reach))
            ax.locator_params(axis="x", nbins=4)
            ax.grid(visible=False, axis="y")
            for place, text in [((0.0, 1.0), heads), ((1.0, 1.0), "closed form")]:
                ax.annotate(text, place, xycoords="axes fraction", xytext=(-6 if place[0] == 0 else 0, 4), textcoords="offset points",
                            ha="right", fontsize=8.5, color=GREY)  # fmt: skip
            for line, value in zip(at, closed, strict=True):
                ax.annotate(
                    f"{value:.4g}",
                    (1.0, line),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="center",
                    fontsize=8.5,
                    color=GREY,
                )
    worst = max(abs(value - closed) / se for _, value, se, closed in [*first, *second])
    draws = record.config["draws"]
    alt = (
        f"Measured over predicted for {len(first)} second moments and {len(second)} one-step decreases: all between "
        f"{min(value / closed for _, value, _, closed in [*first, *second]):.3f} and {max(value / closed for _, value, _, closed in [*first, *second]):.3f}, "
        f"at most {worst:.1f} standard errors from 1."
    )
    caption = (
        r"Left: $E\|\hat g\|^2 / \|\nabla L\|^2$ on a linear loss over $(d+n+1)/n$ for Gaussian directions and $(d+n-1)/n$ for the sphere and for "
        rf"signs; {draws:,} draws. Right: the loss after one step of size $1/\gamma$ on a rank-$r$ quadratic over $1-1/\gamma$; {min(draws, 5000):,} draws. "
        "Whiskers: two standard errors; grey: the closed form's value. Every whisker should touch the line, or nearly."
    )
    return Drawn("fig-mezo-moments", fig, alt, caption)
