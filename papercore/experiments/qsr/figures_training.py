"""Figures of trained networks and of real processes: digits, their short control, seconds, and the `standard` scale.

Glossary
    se         standard error of a mean over seeds
    points     percentage points of accuracy
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from papercore.experiments.qsr.digits import METHODS, NAMES
from papercore.experiments.qsr.figures_theory import INDEX, LEGEND
from papercore.lab.claims import reported_value
from papercore.lab.figures import COLOURS, GREY, MARKERS, reported_style, series_style, style
from papercore.lab.page import Drawn, NotMeasured, require, rows
from papercore.lab.record import Record

_INDEX = {"data parallel": INDEX["dp"], "H = 16": INDEX["constant"], "QSR": INDEX["qsr"]}


def digits(record: Record) -> Drawn:
    """Accuracy and training loss along the main runs, and every method's difference from H = 16, paired over seeds."""
    require(record, "digits_main", "digits_main_steps")
    found = {row["method"]: row for row in rows(record, "digits_main")}
    steps = record.arrays["digits_main_steps"]
    with style(height=3.3):
        fig = Figure()
        left, middle, right = fig.subplots(1, 3, width_ratios=(1, 1, 1.05))
        for name, index in _INDEX.items():
            look = series_style(index, points=len(steps)) | {"markersize": 3.5}
            for ax, what, factor in ((left, "accuracy", 100), (middle, "train_loss", 1)):
                runs = factor * record.arrays[f"digits_main_{what}_{NAMES[name]}"]
                ax.plot(steps, np.nanmean(runs, axis=0), label=name, **look)
        left.set(xlabel="step", ylabel="test accuracy, %", ylim=(72, 93))
        middle.set(xlabel="step", ylabel="training loss, nat", yscale="log")
        shown = [name for name in METHODS if name != "H = 16"]
        right.axvline(0, color=GREY, linewidth=1.0)
        for place, name in enumerate(shown):
            row = found[name]
            right.errorbar([row["difference"]], [place], xerr=[2 * row["difference se"]], color=COLOURS[_INDEX.get(name, INDEX["inverse"])], marker=MARKERS[_INDEX.get(name, INDEX["inverse"])])  # fmt: skip
        right.set(xlabel="points over H = 16", ylim=(len(shown) - 0.5, -0.5))
        right.set_yticks(range(len(shown)), [f"{name}\n{found[name]['share']:.1f} %" for name in shown], fontsize=8.5)  # fmt: skip
        fig.legend(*left.get_legend_handles_labels(), ncols=3, **LEGEND)
    m = record.metrics
    alt = (
        "Test accuracy and training loss over steps, and differences from H = 16. Final accuracies: "
        + ", ".join(f"{name} {found[name]['accuracy']:.1f}" for name in METHODS)
        + f". QSR minus H = 16 is {m['main_qsr_minus_h16']:+.2f} points with a standard error of {m['main_qsr_minus_h16_se']:.2f}."
    )
    caption = (
        f"Digits with 20 % wrong labels, {m['main_seeds']:.0f} seeds, quick scale. Left: accuracy is highest early and falls as wrong labels are learned "
        "by heart; local methods fall less. Middle: the training loss on the labels given, wrong ones included: local methods memorise later. Right: final accuracy minus that of "
        "constant $H = 16$, paired over seeds, whiskers two standard errors; under each name its share of communication. A whisker that crosses zero "
        "shows no difference."
    )
    return Drawn("fig-qsr-digits", fig, alt, caption)


def control(record: Record) -> Drawn:
    """The short control beside the long run: gain over data parallel, and the training losses that explain it."""
    require(record, "digits_main", "digits_control")
    m = record.metrics
    tables = {
        block: {row["method"]: row for row in rows(record, f"digits_{block}")}
        for block in ("control", "main")
    }
    labels = [f"{record.config['control_steps']:,} steps", f"{record.config['steps']:,} steps"]
    with style(height=2.6):
        fig = Figure()
        ax, side = fig.subplots(1, 2)
        for place, (name, index) in enumerate(_INDEX.items()):
            x = np.arange(2) + 0.27 * (place - 1)
            look = {
                "width": 0.24,
                "color": COLOURS[index],
                "hatch": ("", "///", "...")[place],
                "edgecolor": "white",
                "linewidth": 0,
            }
            side.bar(
                x, [tables[block][name]["train loss"] for block in ("control", "main")], label=name, **look
            )
            if name != "data parallel":
                gains = [m[f"{block}_{NAMES[name]}_minus_dp"] for block in ("control", "main")]
                errors = [2 * m[f"{block}_{NAMES[name]}_minus_dp_se"] for block in ("control", "main")]
                ax.bar(x - 0.135, gains, yerr=errors, error_kw={"elinewidth": 1.1}, capsize=2.5, **look)
        ax.axhline(0, color=GREY, linewidth=1.0)
        ax.set(ylabel="gain over data parallel, points")
        side.set(ylabel="training loss, nat", yscale="log")
        for one in (ax, side):
            one.set_xticks(range(2), labels)
            one.grid(visible=False, axis="x")
        fig.legend(*side.get_legend_handles_labels(), ncols=3, **LEGEND)
    alt = (
        f"Gain over data parallel in points: H = 16 {m['control_h16_minus_dp']:+.1f} after the short run and {m['main_h16_minus_dp']:+.1f} after the long one, "
        f"QSR {m['control_qsr_minus_dp']:+.1f} and {m['main_qsr_minus_dp']:+.1f}. Training loss after the short run: data parallel "
        f"{m['control_dp_train_loss']:.2f}, H = 16 {m['control_h16_train_loss']:.2f}, QSR {m['control_qsr_train_loss']:.2f}."
    )
    caption = (
        "The negative control fails. Left: if the gain came from a slow drift, the short run should show none; it shows more than the long one "
        f"({m['control_seeds']:.0f} seeds, whiskers two standard errors). Right: why. After the short run data parallel training has already learned many wrong labels "
        "by heart, local methods have not."
    )
    return Drawn("fig-qsr-control", fig, alt, caption)


def clock(record: Record) -> Drawn:
    """Seconds of real processes beside the fitted model, and the paper's hours taken apart."""
    require(record, "wall_clock", "clock_error", "hours_sync_16")
    found, m = rows(record, "wall_clock"), record.metrics
    with style(height=2.7):
        fig = Figure()
        ax, side = fig.subplots(1, 2, width_ratios=(1.1, 1))
        share = np.linspace(0, 100, 50)
        steps = record.config["clock_steps"]
        line = steps * (m["clock_step_ms"] + m["clock_sync_ms"] * share / 100) / 1000
        ax.plot(share, line, color=GREY, marker="none", linestyle="--", label="model")
        for i, row in enumerate(found):
            fitted = row["schedule"] != "QSR"
            look = {
                "marker": MARKERS[0 if fitted else 1],
                "color": COLOURS[INDEX["constant" if fitted else "qsr"]],
            }
            ax.plot([row["share"]], [row["seconds"]], linestyle="none", label=None if i == 1 else ("fitted on" if fitted else "QSR, not in the fit"), **look)  # fmt: skip
        ax.set(xlabel="share of data parallel, %", ylabel="seconds of a run", ylim=(0, None))
        ax.legend(fontsize=9)
        compute, sync = m["hours_compute_16"], m["hours_sync_16"]
        shares = [100.0, m["share_vit_4"], m["share_vit_8"]]
        side.bar(range(3), [compute] * 3, color="#b9b9b9", width=0.6, label="computation")
        side.bar(range(3), [sync * s / 100 for s in shares], bottom=[compute] * 3, color=COLOURS[1], hatch="///", edgecolor="white", linewidth=0, width=0.6, label="communication")  # fmt: skip
        given = [reported_value("qsr", "abstract", f"ViT-B 16 GPUs {name}", "wall-clock") for name in ("Parallel AdamW", "QSR")]  # fmt: skip
        side.plot([0, 1], given, label="reported", **reported_style())
        side.set_xticks(range(3), ["parallel", "QSR\n$H_{base}$ = 4", "QSR\n$H_{base}$ = 8"], fontsize=8.5)
        side.set(ylabel="hours, 16 GPUs", ylim=(0, 45))
        side.grid(visible=False, axis="x")
        side.legend(fontsize=8.5, loc="upper right")
    alt = (
        f"Left: seconds of {m['clock_processes']:.0f} processes against share of communication, with the line of the model; QSR lies {100 * m['clock_error']:.0f} % from it. "
        f"Right: hours of ViT-B on 16 GPUs: {compute:.1f} of computation, and {sync:.1f} of communication for data parallel training, less for QSR; reported 26.7 and 20.2."
    )
    caption = (
        "Left: real processes on one machine, fastest of several runs. The dashed line was fitted on the circles alone; QSR tests it. Right: the "
        "paper's own hours (hollow) taken apart by the same model. Both reported numbers went into the fit; the third bar is its prediction."
    )
    return Drawn("fig-qsr-clock", fig, alt, caption)


# Families of `standard` as the legend names them; post-local SGD and SWAP have no place in INDEX.
_FAMILIES = {"dp": ("data parallel", INDEX["dp"]), "constant": ("constant H", INDEX["constant"]), "qsr": ("QSR", INDEX["qsr"]),
             "inverse": ("1/η rule", INDEX["inverse"]), "cubic": ("cubic rule", INDEX["cubic"]), "post": ("post-local", 3), "swap": ("SWAP", 5)}  # fmt: skip
_LENGTHS = (("short", "standard_short"), ("middle", "standard_middle"), ("clean", "standard"))


def standard(record: Record) -> Drawn:
    """Accuracy against communication at `standard` scale, one point a schedule, and what QSR gains against the length of the run."""
    if "standard_grid" not in record.tables:
        raise NotMeasured(f"a record at {record.scale} scale does not hold 'standard_grid'")
    grid = rows(record, "standard_grid")
    found = [row for row in grid if row["labels"] in ("clean", "noisy")]
    kinds = sorted({row["labels"] for row in found})
    m = record.metrics
    lengths = [(kind, name) for kind, name in _LENGTHS if f"{name}_qsr_minus_dp" in m]
    with style(height=3.1):
        fig = Figure()
        axes = np.atleast_1d(fig.subplots(1, len(kinds) + bool(lengths)))
        handles: dict[str, Any] = {}
        for ax, labels in zip(axes, kinds, strict=False):
            for row in (row for row in found if row["labels"] == labels):
                name, index = _FAMILIES.get(row["family"], (row["schedule"], 3))
                error = None if row["se"] is None else [2 * row["se"]]
                handles[name] = ax.errorbar([row["share"]], [row["accuracy"]], yerr=error, color=COLOURS[index], marker=MARKERS[index], linestyle="none", capsize=2.5)  # fmt: skip
            ax.set(
                xscale="log", xlabel="share of data parallel, %", ylabel=f"test accuracy, %, {labels} labels"
            )
        if lengths:
            steps = [_steps(record, grid, kind) for kind, _ in lengths]
            for shift, (what, name) in enumerate((("dp", "data parallel"), ("constant", "constant H"))):
                gaps = [m[f"{lead}_qsr_minus_{what}"] for _, lead in lengths]
                errors = [2 * m[f"{lead}_qsr_minus_{what}_se"] for _, lead in lengths]
                index = _FAMILIES["dp" if what == "dp" else "constant"][1]
                # A little apart, so that whiskers at the same length can be told from each other.
                axes[-1].errorbar([step + 0.02 * shift * steps[-1] for step in steps], gaps, yerr=errors, color=COLOURS[index], marker=MARKERS[index], capsize=2.5, label=f"over {name}")  # fmt: skip
            axes[-1].axhline(0, color=GREY, linewidth=1.0)
            axes[-1].set(xlabel="steps of the run", ylabel="gain of QSR, points", xlim=(0, 1.1 * steps[-1]))
            axes[-1].legend(fontsize=8.5)
        fig.legend(handles.values(), handles.keys(), ncols=7, **LEGEND)
    best = max(found, key=lambda row: row["accuracy"])
    alt = f"Test accuracy against communication for {len(found)} runs; the highest is {best['schedule']} with {best['accuracy']:.1f} %."
    caption = f"CIFAR-10: {record.notes.get('standard_form', '')} Whiskers: two standard errors. Left is cheaper, up is better."
    if lengths:
        gains = [f"{m[f'{name}_qsr_minus_dp']:+.2f} after {step:,}" for (_, name), step in zip(lengths, steps, strict=True)]  # fmt: skip
        alt += f" Gain of QSR over data parallel training in points: {', '.join(gains)} steps."
        caption += (
            " Last picture: what QSR gains in accuracy, paired over seeds, against the length of the run."
        )
    return Drawn("fig-qsr-standard", fig, alt, caption)


def _steps(record: Record, grid: list[dict[str, Any]], kind: str) -> int:
    """Length of the runs of one kind."""
    index = next(index for index, row in enumerate(grid) if row["labels"] == kind)
    return int(record.arrays[f"standard_{index}_step"][0][-1])
