"""The chapter's figures of what can be counted: the idea, the rule, its slow time, and the paper's hours.

The other files of this kind are named by what they show: figures_theory.py (the problem with exact theory) and
figures_training.py (digits, their control, real processes, `standard`). All are reached from here::

    from papercore.experiments.qsr import figures
    page.show(figures.rule, record)

What this book measured is filled, what the paper reports is hollow. One schedule has one colour and one marker in all figures.

Glossary
    H          local steps of a round
    share      averages over steps, in percent of data parallel training
    slow time  sum of eta^2 over steps, the clock of the drift along the minimisers
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from papercore.experiments.qsr.counting import CURVES, TABLE, VOLUME
from papercore.experiments.qsr.figures_theory import INDEX, LEGEND, rates, toy
from papercore.experiments.qsr.figures_training import clock, control, digits, standard
from papercore.lab.claims import reported_value
from papercore.lab.figures import COLOURS, GREY, reported_style, series_style, style
from papercore.lab.page import Drawn, require
from papercore.lab.record import Record
from papercore.local_sgd import QSR, ConstantH, SyncSchedule, cosine_lr

__all__ = ["clock", "control", "digits", "idea", "rates", "rule", "slow_time", "standard", "toy"]

# Which of INDEX each curve of `counting.CURVES` is, in its order.
_WHICH = ("constant", "inverse", "qsr", "cubic")
_SHORT = 64  # steps of the drawn run
_WORKERS = 4


def idea(record: Record | None = None) -> Drawn:
    """Three runs of four workers as timelines, above the learning rate that QSR follows. Drawn from formulas."""
    lr = cosine_lr(1.0, _SHORT, final=0.05)
    runs: dict[str, SyncSchedule] = {
        "data parallel": ConstantH(1),
        "local, H = 4": ConstantH(4),
        "QSR": QSR(2.0, 4),
    }
    with style(height=3.3):
        fig = Figure()
        top, ax = fig.subplots(2, 1, sharex=True, height_ratios=(1, 2.6))
        steps = np.arange(_SHORT)
        top.plot(steps, [lr(int(s)) for s in steps], color="#222222", linestyle="-", marker="none")
        top.set(ylabel="η", yticks=[], ylim=(0, 1.1))
        counts = {}
        for row, (name, schedule) in enumerate(runs.items()):
            rounds = schedule.rounds(lr, _SHORT)
            counts[name] = len(rounds)
            base = 6 * (len(runs) - 1 - row)
            for worker in range(_WORKERS):
                ax.plot(
                    [0, _SHORT],
                    [base + worker] * 2,
                    color="#b9b9b9",
                    linewidth=1.6,
                    linestyle="-",
                    marker="none",
                )
            ends = [start + length for start, length in rounds]
            ax.vlines(ends, base - 0.25, base + _WORKERS - 0.75, color=COLOURS[(6, 0, 1)[row]], linewidth=1.5)
            ax.annotate(
                f"{name}: {len(rounds)} averages",
                (0, base + _WORKERS - 0.6),
                xytext=(0, 2),
                textcoords="offset points",
                va="bottom",
                fontsize=9,
            )
        ax.set(xlabel="local steps", yticks=[], ylim=(-0.8, 17.3), xlim=(0, _SHORT))
        ax.grid(visible=False)
        top.grid(visible=False)
        ax.spines["left"].set_visible(False)
    said = ", ".join(f"{name} {count}" for name, count in counts.items())
    alt = (
        f"Above: a learning rate that falls along a cosine over {_SHORT} steps. Below: the same steps of four workers under three schedules, with a "
        f"line across the workers where they average. Averages: {said}; under QSR they become rarer as the learning rate falls."
    )
    caption = (
        "Four workers, three ways to keep them together. Grey: each worker's own steps; coloured: an average of all weights. Data parallel "
        "training exchanges something at every step. Constant $H$ averages after every fourth. QSR starts like it, and waits longer as the learning "
        "rate $\\eta$ (above) falls. Drawn from formulas."
    )
    return Drawn("fig-qsr-idea", fig, alt, caption)


def rule(record: Record) -> Drawn:
    """Learning rate and H against steps on a logarithmic axis for four rules; share against alpha with the recalled points."""
    require(
        record,
        "curve_steps",
        "curve_lr",
        "alpha_grid",
        *(f"curve_h_{i}" for i in range(len(CURVES))),
        "curve_share_0",
    )
    a, m = record.arrays, record.metrics
    with style(height=3.6):
        fig = Figure()
        ax, side = fig.subplots(1, 2, width_ratios=(1.75, 1))
        steps = a["curve_steps"] / 1000
        for i, name in enumerate(CURVES):
            look = series_style(INDEX[_WHICH[i]], points=len(steps))
            ax.plot(steps, a[f"curve_h_{i}"], label=f"{name}: {m[f'curve_share_{i}']:.1f} %", drawstyle="steps-post", **look)  # fmt: skip
        ax.set(xlabel="step, thousands (ViT-B)", ylabel="H, local steps of a round", yscale="log", ylim=(2.5, 2e4))  # fmt: skip
        rate = ax.twinx()
        rate.plot(steps, a["curve_lr"], color=GREY, linewidth=1.0, linestyle=":", marker="none")
        rate.set(ylim=(0, 0.026), yticks=[])
        rate.grid(visible=False)
        rate.spines["right"].set_visible(False)
        rate.annotate("learning rate", (steps[30], a["curve_lr"][30]), xytext=(6, 5), textcoords="offset points", color=GREY, fontsize=9)  # fmt: skip
        for position, h_base in enumerate((4, 8)):
            look = series_style(INDEX["qsr"] if h_base == 4 else 3, points=26)
            side.plot(a["alpha_grid"], a[f"alpha_share_{h_base}"], label=f"$H_{{base}}$ = {h_base}", **look)
            given = reported_value("qsr", TABLE, f"ViT-B Local AdamW QSR H_base={h_base}", VOLUME)
            side.plot([0.0175], [given], label="recalled" if not position else None, **reported_style())
        side.set(xlabel="growth coefficient α", ylabel="share of data parallel, %", ylim=(0, None))
        side.legend(fontsize=9)
        fig.legend(*ax.get_legend_handles_labels(), ncols=2, **LEGEND)
    longest = m["curve_longest_2"]
    alt = (
        f"Left: H against steps of ViT-B on a logarithmic axis. H = 4 stays; the 1/eta rule, QSR and the cubic rule rise ever steeper, QSR to a longest "
        f"round of {longest:,.0f} steps. Right: share of data parallel communication against alpha; at 0.0175 it is {m['share_vit_4']:.1f} % with H_base 4 and "
        f"{m['share_vit_8']:.1f} % with H_base 8, on the recalled points."
    )
    caption = (
        "Left: rounds of ViT-B's 93,600 steps under four rules, and what share of data parallel communication each needs; growth coefficients "
        "chosen so that the three rising rules communicate about alike. Dotted: learning rate. During warm-up no rule acts. "
        "Right: the share of QSR against its coefficient, computed; hollow: the paper's numbers as we recall them, not checked."
    )
    return Drawn("fig-qsr-rule", fig, alt, caption)


def slow_time(record: Record) -> Drawn:
    """Slow time of a round, and averages so far, for the same four rules."""
    require(
        record,
        "curve_steps",
        *(f"curve_{what}_{i}" for what in ("slow", "rounds") for i in range(len(CURVES))),
    )
    a = record.arrays
    steps = a["curve_steps"] / 1000
    alpha = 0.0175
    with style(height=2.9):
        fig = Figure()
        ax, side = fig.subplots(1, 2)
        for i, name in enumerate(CURVES):
            look = series_style(INDEX[_WHICH[i]], points=len(steps))
            ax.plot(steps, a[f"curve_slow_{i}"], label=name.split(",")[0], **look)
            side.plot(steps, a[f"curve_rounds_{i}"] / 1000, **look)
        ax.axhline(alpha**2, color=GREY, linewidth=1.0, linestyle=":")
        ax.annotate("α²", (2, alpha**2), va="bottom", color=GREY)
        ax.set(xlabel="step, thousands", ylabel="slow time of a round, Σ η²", yscale="log", ylim=(1e-7, 1e-2))
        side.set(xlabel="step, thousands", ylabel="averages so far, thousands")
        fig.legend(ncols=4, **LEGEND)
    inside = a["curve_slow_2"][(steps > 50) & (steps < 80)]
    alt = (
        "Left: slow time of a round against steps. H = 4 falls with the learning rate, 1/eta falls slower, QSR is level at alpha squared "
        f"(between {inside.min() / alpha**2:.2f} and {inside.max() / alpha**2:.2f} of it from step 50,000 to 80,000), the cubic rule rises. "
        "Right: averages so far; QSR and the cubic rule stop early, H = 4 goes on to the end."
    )
    caption = (
        "Left: how far the slow clock $\\sum\\eta^2$ moves in one round (ViT-B). QSR is the rule that keeps it level, at $\\alpha^2$; slower rules let it "
        "vanish, faster ones let it grow. Right: averages made so far. Nearly all of QSR's fall in the first two thirds of the run."
    )
    return Drawn("fig-qsr-slow", fig, alt, caption)
