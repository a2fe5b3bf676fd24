"""Figures of what a step costs: memory, storage, hours, and the time beside two forward passes.

All but the last rest on arithmetic: the paper's own tables and the number of weights (experiments/mezo/closed_forms.py). The
last one reads the benchmarks of the book, `records/benchmarks/mezo.json`.

Glossary
    GiB        2^30 bytes; the paper's tables call it GB
    floor      16 bytes for each weight that Adam trains; activations and buffers come on top
    ratio      seconds of a MeZO step over seconds of its two forward passes, of one model in one run
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from papercore.experiments.mezo.closed_forms import GPU_GIB
from papercore.experiments.mezo.figures_theory import LEGEND
from papercore.lab.benchmarks import find_benchmark
from papercore.lab.figures import COLOURS, GREY, MARKERS, reported_style, series_style, style
from papercore.lab.page import Drawn, NotMeasured, require, rows
from papercore.lab.record import Record


def memory(record: Record) -> Drawn:
    """Table 22 beside bytes per weight, and Figure 4: the largest OPT that fits on so many GPUs."""
    sizes, fits = rows(record, "memory"), rows(record, "figure_4")
    require(record, "memory_worst_gap_gib", "figure_4_matches", "figure_4_cells")
    weights = np.array([row["weights"] for row in sizes]) / 1e9
    with style(height=3.0):
        fig = Figure()
        left, right = fig.subplots(1, 2, width_ratios=(1.35, 1))
        for name, closed, reported, index in (
            ("MeZO", "MeZO GiB, closed form", "MeZO reported", 0),
            ("Adam, floor", "FT GiB, floor", "FT reported", 1),
        ):
            left.plot(
                weights,
                [row[closed] for row in sizes],
                label=name,
                **series_style(index) | {"marker": "none"},
            )
            given = [
                (w, row[reported]) for w, row in zip(weights, sizes, strict=True) if row[reported] is not None
            ]
            left.plot(
                *zip(*given, strict=True), label=f"{name.split(',')[0]}, reported", **reported_style(index)
            )
        left.axhline(GPU_GIB, color=GREY, linewidth=1.0, linestyle=":")
        left.annotate(
            f"one {GPU_GIB:.0f} GB GPU",
            (0.01, GPU_GIB),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=8.5,
            color=GREY,
        )
        left.set(xscale="log", yscale="log", xlabel="OPT, billions of weights", ylabel="GPU memory, GiB")
        left.set_xticks(weights, [row["size"].rstrip("B") for row in sizes])
        left.set_xticks([], minor=True)
        for method, index in (("Inference/MeZO", 0), ("FT", 1)):
            found = [row for row in fits if row["method"] == method]
            gpus = [row["GPUs"] for row in found]
            right.plot(
                gpus,
                [_billions(row["closed form"]) for row in found],
                **series_style(index) | {"markersize": 3.5},
            )
            right.plot(
                gpus,
                [_billions(row["reported"]) for row in found],
                **reported_style(index) | {"markersize": 8.0, "zorder": 1.5},
            )
            for row in found:
                shift = (-2, 7) if index == 0 else (2, -14)
                right.annotate(row["closed form"], (row["GPUs"], _billions(row["closed form"])), xytext=shift, textcoords="offset points",
                               fontsize=8, ha="center", color=COLOURS[index])  # fmt: skip
        right.set(
            xscale="log",
            yscale="log",
            xlabel="80 GB GPUs",
            ylabel="largest OPT that fits",
            xlim=(0.75, 11),
            ylim=(1.4, 400),
        )
        right.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        right.set_xticks([], minor=True)
        ticks = [2.7, 6.7, 13, 30, 66, 175]
        right.set_yticks(ticks, [f"{t:g}B" for t in ticks])
        right.set_yticks([], minor=True)
        fig.legend(ncols=4, **LEGEND)
    m = record.metrics
    alt = (
        "Left: GPU memory against model size. MeZO, computed and reported: "
        + ", ".join(
            f"OPT-{row['size']} {row['MeZO GiB, closed form']:.1f} and {row['MeZO reported']:g}"
            for row in sizes
        )
        + ". Right: largest model that fits: "
        + ", ".join(f"{row['GPUs']} GPUs {row['method']} {row['closed form']}" for row in fits)
        + "."
    )
    caption = (
        "Left: two bytes a weight and 2 GiB a GPU give the reported memory of MeZO (hollow: Table 22) to within "
        f"{m['memory_worst_gap_gib']:.1f} GiB on one GPU; 16 bytes a weight is a floor under Adam's. Right: the largest OPT for a number of GPUs; "
        f"{m['figure_4_matches']:.0f} of {m['figure_4_cells']:.0f} cells of the paper's Figure 4 (hollow) follow from bytes a weight. Nothing here was trained."
    )
    return Drawn("fig-mezo-memory", fig, alt, caption)


def _billions(size: str) -> float:
    return float(size.removesuffix("B")) if size != "none" else float("nan")


def storage(record: Record) -> Drawn:
    """Bytes that a fine-tuned OPT-66B takes beside its base."""
    found = rows(record, "storage")
    require(record, "log_bytes_20000_steps")
    with style(height=2.6):
        fig = Figure()
        ax = fig.subplots()
        colours = [COLOURS[6], COLOURS[2], COLOURS[3], COLOURS[0], COLOURS[0]]
        for line, row in enumerate(found):
            ax.barh(
                line, row["bytes"], height=0.6, color=colours[line % 5], edgecolor="#333333", linewidth=0.6
            )
            ax.annotate(
                _bytes(row["bytes"]),
                (row["bytes"], line),
                xytext=(13, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        given = [
            (row["reported MB"] * 1e6, line)
            for line, row in enumerate(found)
            if row["reported MB"] is not None
        ]
        ax.plot(*zip(*given, strict=True), label="reported (for the log: an upper bound)", **reported_style())
        ax.set_yticks(
            range(len(found)),
            [row["what is stored"].replace(", fp32 scalars", "").replace(" (RoBERTa)", "") for row in found],
        )
        ax.invert_yaxis()
        ax.set(xscale="log", xlim=(1e3, 2e13), xlabel="bytes")
        ax.grid(visible=False, axis="y")
        fig.legend(**LEGEND)
    alt = (
        "Bytes on a logarithmic axis: "
        + ", ".join(f"{row['what is stored']} {_bytes(row['bytes'])}" for row in found)
        + "."
    )
    caption = (
        "What a fine-tuned OPT-66B takes beside its base (logarithmic axis; hollow: the paper). The log keeps one 32-bit scalar a step; "
        f"a real file of 20,000 steps, header and checksums included, has {record.metrics['log_bytes_20000_steps']:,.0f} bytes. At 100,000 steps, "
        "the paper's RoBERTa runs, it passes 0.1 MB."
    )
    return Drawn("fig-mezo-storage", fig, alt, caption)


def _bytes(size: float) -> str:
    """Bytes with a decimal unit.

    >>> _bytes(80_008), _bytes(131_439_403_008)
    ('80.0 kB', '131 GB')
    """
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.3g} {unit}" if size / one >= 100 else f"{size / one:.1f} {unit}"
    return f"{size:.0f} B"


def hours(record: Record) -> Drawn:
    """GPU-hours of a MeZO run over those of fine-tuning, by model size, from the paper's own seconds and GPUs."""
    found = rows(record, "time")
    ratios = [row["ratio"] for row in found]
    per_step = [row["FT s/step"] / row["MeZO s/step"] for row in found]
    with style(height=2.9):
        fig = Figure()
        ax = fig.subplots()
        at = range(len(found))
        ax.plot(at, ratios, color=COLOURS[0], linewidth=1.0, linestyle=":", marker="none")
        ax.plot(at, ratios, label="GPU-hours of a whole run", **reported_style(0))
        ax.plot(
            at,
            [1 / speed for speed in per_step],
            color=COLOURS[1],
            linewidth=1.0,
            linestyle=":",
            marker="none",
        )
        ax.plot(at, [1 / speed for speed in per_step], label="seconds of a step", **reported_style(1))
        for value, words in ((1.0, "equal"), (0.5, "half")):
            ax.axhline(value, color=GREY, linewidth=1.0, linestyle="-" if value == 1 else ":")
            ax.annotate(
                words,
                (0.005, value),
                xycoords=("axes fraction", "data"),
                va="bottom",
                fontsize=8.5,
                color=GREY,
            )
        for line, value in enumerate(ratios):
            ax.annotate(
                f"{value:.3g}",
                (line, value),
                xytext=(0, 8 if value > 0.6 else -16),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=COLOURS[0],
            )
        ax.set(yscale="log", ylim=(0.08, 90), xlim=(-0.55, len(found) - 0.6), ylabel="MeZO / fine-tuning")
        ax.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
        ax.set_xticks(
            list(at),
            [f"OPT-{row['size']}\n{row['GPUs']:.0f} and {row['GPUs of FT']:.0f} GPUs" for row in found],
        )
        fig.legend(ncols=2, **LEGEND)
    alt = (
        "GPU-hours of MeZO over those of fine-tuning: "
        + ", ".join(f"OPT-{row['size']} {row['ratio']:.2f}" for row in found)
        + "."
    )
    least = min(found, key=lambda row: row["ratio"])
    caption = (
        "All from the paper's Table 23 (hollow: reported, or computed from reported values): 20,000 steps of MeZO against 625 of fine-tuning. "
        f"A step gets cheaper as the model outgrows one GPU, up to {max(per_step):.1f} times; a whole run is cheaper by half at {least['size']} alone. "
        "Below each size: GPUs of MeZO and of fine-tuning."
    )
    return Drawn("fig-mezo-hours", fig, alt, caption)


def step_time(record: Record | None = None) -> Drawn:
    """Time of a step over its two forward passes, by kernel; from the benchmarks, not from `record`."""
    found = find_benchmark("mezo")
    if found is None:
        raise NotMeasured("records/benchmarks/mezo.json is missing: make bench measures the kernels")
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for row in found["rows"]:
        noise = {"gaussian": "Gaussian", "rademacher": "signs"}[row["dist"]]
        name = row["name"].replace("step of the paper's code", "paper's code")
        lines.setdefault(f"{name}, {noise}", {})[row["tokens"]] = row
    order = sorted(lines, key=lambda name: next(iter(lines[name].values()))["ratio"])
    lengths = sorted({row["tokens"] for row in found["rows"]})
    with style(height=0.9 + 0.21 * len(order)):
        fig = Figure()
        ax = fig.subplots()
        for index, tokens in enumerate(lengths):
            here = [(line, lines[name][tokens]) for line, name in enumerate(order) if tokens in lines[name]]
            middle = np.array([row["ratio"] for _, row in here])
            whiskers = np.abs(
                np.array([[row["low"] for _, row in here], [row["high"] for _, row in here]]) - middle
            )
            ax.errorbar(
                middle,
                [line for line, _ in here],
                xerr=whiskers,
                fmt=MARKERS[index],
                color=COLOURS[index],
                elinewidth=1.1,
                capsize=2.0,
                label=f"{tokens} tokens",
            )
        ax.axvline(1.0, color=GREY, linewidth=1.0)
        ax.set_yticks(range(len(order)), order, fontsize=8.5)
        ax.invert_yaxis()
        ax.set(xscale="log", xlabel="time of a step / its two forward passes")
        low, high = ax.get_xlim()
        ticks = [t for t in (1, 1.5, 2, 3, 5, 7, 10, 15, 20) if low <= t <= high]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_xticks([], minor=True)
        ax.grid(visible=False, axis="y")
        fig.legend(ncols=len(lengths), **LEGEND)
    first = lengths[0]
    told = ", ".join(f"{name} {lines[name][first]['ratio']:.2f}" for name in order if first in lines[name])
    caption = (
        "CPU time of a step over that of its two forward passes, which no step can do without (grey line). One run, all kernels in turn, "
        f"{found['rounds']} rounds: medians, whiskers from the lower to the upper quartile. {found['model'][0].upper()}{found['model'][1:]}."
    )
    return Drawn(
        "fig-mezo-steptime",
        fig,
        f"Time of a step over its two forward passes at {first} tokens: {told}.",
        caption,
    )
