"""The chapter's figures: what the few-shot runs showed. Each function reads a record alone and returns a `Drawn`.

The other files of this kind are named by what they show: figures_training.py (how training goes), figures_theory.py (the idea,
rates, moments) and figures_cost.py (memory, storage, time). All are reached from here::

    from papercore.experiments.mezo import figures
    page.show(figures.prompt, record)

What this book measured is filled, what the paper reports is hollow. One method has one colour and one marker in all figures.

Glossary
    forward passes    what a run may spend: two a step of MeZO with n = 1
    sd                sample standard deviation over seeds, divisor S - 1
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from papercore.experiments.mezo.figures_cost import hours, memory, step_time, storage
from papercore.experiments.mezo.figures_theory import LEGEND, idea, moments, rates
from papercore.experiments.mezo.figures_training import (
    adapters,
    mean_band,
    spread_note,
    standard,
    variations,
)
from papercore.experiments.mezo.language import TOPICS
from papercore.lab.claims import reported_value
from papercore.lab.figures import COLOURS, GREY, reported_style, series_style, style
from papercore.lab.page import Drawn, require, rows
from papercore.lab.record import Record

__all__ = [
    "adapters",
    "bars",
    "checkpoints",
    "hours",
    "idea",
    "memory",
    "moments",
    "prompt",
    "rates",
    "standard",
    "step_time",
    "storage",
    "variations",
]

CHANCE = 1.0 / TOPICS
TABLE_5 = "Table 5 (prompt ablation, k=16, 10K fwd)"
TABLE_18 = "Table 18 (RoBERTa-large) k=16"


def prompt(record: Record) -> Drawn:
    """Accuracy against forward passes with a prompt, without one, and without pretraining; Table 5 beside it."""
    arms = {
        "full": ("prompt", 0),
        "adam": ("prompt, MeZO-Adam", 2),
        "no_prompt": ("no prompt", 1),
        "no_pretraining": ("prompt, no pretraining", 6),
    }
    require(record, "eval_at", "bayes", *(f"curve_{name}" for name in arms))
    passes = 2 * np.asarray(record.arrays["eval_at"])
    with style(height=3.0):
        fig = Figure()
        ax, side = fig.subplots(1, 2, sharey=True, width_ratios=(3.2, 1))
        for name, (label, index) in arms.items():
            mean_band(ax, passes, np.asarray(record.arrays[f"curve_{name}"]), label, index)
        _ceiling(ax, record)
        spread_note(ax, len(record.arrays["curve_full"]))
        ax.set(xlabel="forward passes", ylabel="test accuracy", ylim=(0, 1.03))
        tasks = ("SST-2", "SNLI", "TREC")
        paper = {
            row: [reported_value("mezo", TABLE_5, row, task) / 100 for task in tasks]
            for row in ("Prompt", "No prompt")
        }
        for index, (row, values) in enumerate(paper.items()):
            side.plot(range(len(tasks)), values, label=f"reported, {row.lower()}", **reported_style(index))
        side.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right")
        side.set(xlim=(-0.6, 2.6), xlabel="paper, Table 5")
        handles, labels = ax.get_legend_handles_labels()
        more, names = side.get_legend_handles_labels()
        fig.legend(handles + more, labels + names, ncols=3, **LEGEND)
    seeds = len(record.arrays["curve_full"])
    end = {name: float(np.mean(record.arrays[f"curve_{name}"], axis=0)[-1]) for name in arms}
    half = {name: float(np.mean(record.arrays[f"curve_{name}"], axis=0)[-2]) for name in arms}
    k = max(record.config["shots"])
    alt = (
        f"Test accuracy against forward passes. After {passes[-2]} of {passes[-1]} passes MeZO with a prompt is at {half['full']:.2f}, "
        f"without one at {half['no_prompt']:.2f}, without pretraining at {half['no_pretraining']:.2f}; at the end "
        f"{end['full']:.2f}, {end['no_prompt']:.2f} and {end['no_pretraining']:.2f}. Chance is {CHANCE:.2f}. The paper, with and without a prompt: "
        + ", ".join(f"{task} {a:.2f} and {b:.2f}" for task, a, b in zip(tasks, *paper.values(), strict=True))
        + "."
    )
    caption = (
        f"Left: test accuracy at equal forward passes, {record.scale} scale, k = {k}, every arm with a learning rate chosen for it "
        f"on other seeds. Lines: mean of {seeds} seeds; bands: one standard deviation. See how far the prompt's curve is ahead "
        "of the same model without one. Right: the paper's values after 10,000 passes (RoBERTa-large, hollow)."
    )
    return Drawn("fig-mezo-prompt", fig, alt, caption)


METHODS = {
    "zero-shot": "zero-shot",
    "in-context": "in-\ncontext",
    "linear probe": "linear\nprobe",
    "fine-tuning (Adam)": "Adam,\nbackprop",
    "MeZO full": "MeZO",
    "MeZO lora": "MeZO\nLoRA",
    "MeZO prefix": "MeZO\nprefix",
    "MeZO accuracy": "MeZO on\naccuracy",
}


def bars(record: Record) -> Drawn:
    """Accuracy of every method at every k, with the paper's values for TREC at k = 16."""
    table = rows(record, "few_shot")
    shots = sorted({row["k"] for row in table})
    found = {(row["method"], row["k"]): row for row in table}
    methods = [name for name in METHODS if (name, shots[-1]) in found]
    width = 0.8 / len(shots)
    with style(height=3.1):
        fig = Figure()
        ax = fig.subplots()
        for i, k in enumerate(shots):
            at = np.arange(len(methods)) + (i - (len(shots) - 1) / 2) * width
            means, sds = ([found[name, k][key] for name in methods] for key in ("mean", "std"))
            # One hue, three shades: told apart without colour vision too.
            shade = ("#d9e9f4", "#7fb8d8", COLOURS[0])[i % 3]
            ax.bar(
                at,
                means,
                0.92 * width,
                yerr=sds,
                label=f"k = {k}",
                color=shade,
                edgecolor="#333333",
                linewidth=0.6,
                error_kw={"elinewidth": 1.0},
            )
        places, values = _reported_bars(methods)
        ax.plot(places, values, label="reported (TREC, k = 16)", **reported_style())
        _ceiling(ax, record)
        ax.set_xticks(range(len(methods)), [METHODS[name] for name in methods], fontsize=8.5)
        ax.set(ylabel="test accuracy", ylim=(0, 1.05), xlim=(-0.55, len(methods) + 0.1))
        ax.grid(visible=False, axis="x")
        fig.legend(ncols=4, **LEGEND)
    last = ", ".join(
        f"{METHODS[name]} {found[name, shots[-1]]['mean']:.2f}".replace("\n", " ").replace("- ", "-")
        for name in methods
    )
    alt = f"Bars of test accuracy at k = {shots[-1]}: {last}. Chance is {CHANCE:.2f}, the best possible reader reaches {record.metrics['bayes']:.2f}."
    caption = (
        f"Test accuracy by method and k (labelled sentences per topic), {record.scale} scale: mean of {found[methods[0], shots[-1]]['seeds']} "
        f"few-shot samples, whiskers one standard deviation. Every MeZO bar spent the same forward passes. {collapsed(record)} Hollow: what the "
        "paper reports for RoBERTa-large on a task of six classes (Table 18); compare the order of the methods, not the heights."
    )
    return Drawn("fig-mezo-bars", fig, alt, caption)


def collapsed(record: Record, below: float = 0.5) -> str:
    """A sentence on the MeZO runs that went wrong: means and whiskers hide whether one seed failed or all did a little."""
    found = []
    for row in rows(record, "few_shot"):
        finals = [value for name, value in row.items() if name.startswith("seed ") and value is not None]
        count = sum(value < below for value in finals)
        if row["method"].startswith("MeZO") and count:
            name = METHODS[row["method"]].replace("\n", " ")
            found.append(f"{count} of {len(finals)} runs of {name} at k = {row['k']}")
    if not found:
        return f"No MeZO run ended below {below:g}."
    return f"Ended below {below:g}: {', '.join(found)}."


def _reported_bars(methods: list[str]) -> tuple[list[int], list[float]]:
    """Positions and values of the bars that the paper has a TREC number for at k = 16."""
    names = {
        "linear probe": "LP",
        "fine-tuning (Adam)": "FT",
        "MeZO full": "MeZO",
        "MeZO lora": "MeZO (LoRA)",
        "MeZO prefix": "MeZO (prefix)",
    }
    at, values = [], []
    for i, method in enumerate(methods):
        if method == "zero-shot":
            at.append(i)
            values.append(reported_value("mezo", "Table 18 (RoBERTa-large)", "Zero-shot", "TREC") / 100)
        elif method in names:
            at.append(i)
            values.append(reported_value("mezo", TABLE_18, names[method], "TREC") / 100)
    return at, values


def checkpoints(record: Record) -> Drawn:
    """Accuracy of MeZO, in-context learning and the bare prompt, from checkpoints of pretraining."""
    table = rows(record, "checkpoints")
    steps = [row["pretraining steps"] for row in table]
    with style(height=2.7):
        fig = Figure()
        ax = fig.subplots()
        for column, index, label in (
            ("MeZO", 0, "MeZO"),
            ("in-context", 5, "in-context learning"),
            ("zero-shot", 6, "zero-shot"),
        ):
            values = [row[column] for row in table]
            ax.plot(steps, values, label=label, **series_style(index, points=len(steps)))
            if column == "MeZO":
                sd = np.array([row["MeZO std"] for row in table])
                ax.fill_between(
                    steps, values - sd, values + sd, color=COLOURS[index], alpha=0.18, linewidth=0.6
                )
        _ceiling(ax, record)
        ax.set(xlabel="steps of pretraining before the task", ylabel="test accuracy", ylim=(0, 1.03))
        fig.legend(ncols=3, **LEGEND)
    first, last = table[0], table[-1]
    alt = (
        f"Accuracy against pretraining steps. MeZO goes from {first['MeZO']:.2f} without pretraining to {last['MeZO']:.2f} after "
        f"{last['pretraining steps']:,} steps, in-context learning from {first['in-context']:.2f} to {last['in-context']:.2f}, "
        f"zero-shot stays between {min(r['zero-shot'] for r in table):.2f} and {max(r['zero-shot'] for r in table):.2f}."
    )
    caption = (
        "The same MeZO run from five checkpoints of one pretraining: mean of three few-shot samples, band one standard deviation "
        f"({record.scale} scale, k = {max(record.config['shots'])}). What MeZO reaches depends on what the model knew before."
    )
    return Drawn("fig-mezo-checkpoints", fig, alt, caption)


def _ceiling(ax: Any, record: Record) -> None:
    """Thin lines at chance and at the accuracy of the best possible reader."""
    for value, label in ((CHANCE, "chance"), (record.metrics.get("bayes"), "best possible")):
        if value is not None:
            ax.axhline(value, color=GREY, linewidth=1.0, linestyle=":")
            ax.annotate(
                label,
                (0.995, value),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
                color=GREY,
            )
