"""The chapter's figures. Each function reads a record alone (the idea: none) and returns a `Drawn`.

The figures on trust (calibration, the other domain, continual learning) are in figures_trust.py and reached from here::

    from papercore.experiments.grafting import figures
    page.show(figures.curves, record)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from papercore.experiments.grafting.figures_trust import away, calibration, stages
from papercore.experiments.grafting.masks import RULES
from papercore.experiments.grafting.world import TASKS
from papercore.grafting import Graft, magnitude_mask, task_vector
from papercore.lab.figures import COLOURS, GREY, series_style, style
from papercore.lab.page import Drawn, require, rows
from papercore.lab.record import Record

__all__ = [
    "away",
    "calibration",
    "curves",
    "deranged",
    "idea",
    "law",
    "overlaps",
    "stages",
    "unions",
    "where",
]

LEGEND: dict[str, Any] = {"loc": "outside upper center", "frameon": False}
SHOWN = ("sentiment", "style")


def idea(record: Record | None = None) -> Drawn:
    """One matrix: pre-trained, what fine-tuning changed, the mask, the grafted model; made by the kernel on toy numbers."""
    g = torch.Generator().manual_seed(4)
    before, after = (torch.nn.Linear(18, 10, bias=False) for _ in range(2))
    with torch.no_grad():
        before.weight.copy_(torch.randn(10, 18, generator=g))
        change = torch.randn(10, 18, generator=g) ** 3 * 0.35
        after.weight.copy_(before.weight + change)
    mask = magnitude_mask(task_vector(before, after), k=9)
    graft = Graft.from_mask(after, mask)
    old = before.weight.detach().clone()
    with graft.applied(before):
        grafted = before.weight.detach().clone()
    panels = (
        ("pre-trained", old), ("change by fine-tuning", change), ("mask", mask["weight"].float()),
        ("grafted", torch.where(mask["weight"], grafted, torch.nan)),
    )  # fmt: skip
    with style(height=1.75):
        fig = Figure()
        for ax, (title, values) in zip(fig.subplots(1, 4), panels, strict=True):
            if title == "grafted":
                ax.imshow(old.numpy(), cmap="Greys", vmin=-6, vmax=6)
            limits = {"vmin": 0, "vmax": 1.2} if title == "mask" else {"vmin": -3, "vmax": 3}
            ax.imshow(values.numpy(), cmap="Greys" if title == "mask" else "cividis", **limits)
            ax.set(xticks=[], yticks=[], title=title)
            ax.grid(False)
    alt = (
        f"Four pictures of one small matrix: pre-trained weights; the change that fine-tuning made, nearly everywhere; a mask of {mask.count} of "
        f"{mask.total} entries; and the grafted matrix, grey as the pre-trained one except at those {mask.count} entries."
    )
    caption = (
        "The idea on one matrix of toy numbers. Fine-tuning moves nearly every weight a little. A mask picks a few of them; the grafted model has the "
        f"fine-tuned values there and the pre-trained ones everywhere else (grey). Here the mask takes the {mask.count} largest changes of "
        f"{mask.total}; the paper learns it."
    )
    return Drawn("fig-grafting-idea", fig, alt, caption)


def curves(record: Record) -> Drawn:
    """Accuracy against entries for every rule, two tasks."""
    require(record, "ks", *(f"{t}_accuracy" for t in SHOWN), *(f"{t}_ends" for t in SHOWN))
    ks, m = np.asarray(record.arrays["ks"]), record.metrics
    words = []
    with style(height=3.3):
        fig = Figure()
        for ax, task in zip(fig.subplots(1, 2, sharey=True), SHOWN, strict=True):
            acc, ends = (
                np.asarray(record.arrays[f"{task}_accuracy"]),
                np.asarray(record.arrays[f"{task}_ends"]),
            )
            for r, rule in enumerate(RULES):
                ax.plot(ks, acc[:, r].mean(0), label=rule, **series_style(r))
                ax.fill_between(
                    ks, acc[:, r].min(0), acc[:, r].max(0), color=COLOURS[r], alpha=0.15, linewidth=0.6
                )
            for kind, index, marker in (("paper", 4, "v"), ("biases", 6, "X")):
                points = np.asarray(record.arrays[f"{task}_{kind}"]).reshape(-1, 2)
                name = "paper's rule" if kind == "paper" else "all biases"
                ax.plot(
                    points[:, 0],
                    points[:, 1],
                    linestyle="none",
                    marker=marker,
                    color=COLOURS[index],
                    label=name,
                )
            for value, name in ((ends[:, 1].mean(), "fine-tuned"), (ends[:, 0].mean(), "pre-trained")):
                ax.axhline(value, color=GREY, linewidth=1.0, linestyle=":")
                ax.annotate(name, (ks[0], value), va="bottom", fontsize=8.5, color=GREY)
            ax.set(xscale="log", xlabel="entries grafted", ylim=(0.4, 1.05))
            ax.set_title(task)
            means = ", ".join(f"{rule} {acc[:, r, -2].mean():.2f}" for r, rule in enumerate(RULES))
            words.append(
                f"{task}: pre-trained {ends[:, 0].mean():.2f}, fine-tuned {ends[:, 1].mean():.2f}; at {ks[-2]:,} entries {means}"
            )
            if task == SHOWN[0]:
                ax.set_ylabel("test accuracy")
                fig.legend(ncols=6, columnspacing=1.0, fontsize=8.5, handlelength=1.8, **LEGEND)
    caption = (
        f"Accuracy of the pre-trained model with some entries grafted ({record.scale} scale, line: mean of {m['seeds']:.0f} seeds, band: least to "
        f"greatest; N = {m['graftable']:,.0f}). A learned mask needs the fewest entries; first-order scores (one backward pass) and the largest "
        "changes (movement) need several times as many; random entries do nothing. Ten entries, about the "
        "paper's 0.01 %, do nothing either: at this size that number cannot be tested."
    )
    return Drawn(
        "fig-grafting-curves",
        fig,
        "Test accuracy against grafted entries. " + ". ".join(words) + ".",
        caption,
    )


def law(record: Record) -> Drawn:
    """Entries switched on by the paper's rule and those predicted, against rate times steps."""
    require(record, "law_rate_times_steps", "law_predicted", "law_found", "graftable")
    x, predicted, seen = (
        np.asarray(record.arrays[f"law_{n}"]) for n in ("rate_times_steps", "predicted", "found")
    )
    with style(height=2.7):
        fig = Figure()
        ax = fig.subplots()
        ax.plot(x, seen, label="switched on by the paper's rule", **series_style(0))
        ax.plot(x, predicted, label="predicted from one backward pass", **series_style(1))
        ax.set(xscale="log", yscale="log", xlabel="rate × steps", ylabel="entries", ylim=(1, 3e4))
        ax.legend()
    alt = "Entries against rate times steps. " + "; ".join(
        f"{a:.0e}: {b:,.0f} on, {c:,.0f} predicted" for a, b, c in zip(x, seen, predicted, strict=True)
    )
    caption = (
        "How many entries the paper's rule switches on, against its rate (10 updates, one seed), beside what equation "
        "{eq}`eq-grafting-law` predicts from a single backward pass at the pre-trained weights. The product of rate and steps is the knob of the "
        "density; the prediction drifts off where many entries are on and the gradient has changed."
    )
    return Drawn("fig-grafting-law", fig, alt + ".", caption)


def overlaps(record: Record) -> Drawn:
    """Containment of masks and transfer of gains, task by task."""
    require(record, "containment", "density", "union_gain", "unions")
    contained = np.asarray(record.arrays["containment"]).mean(0)
    density = np.asarray(record.arrays["density"]).mean(0)
    names = list(TASKS)
    subsets = [row["grafted"] for row in rows(record, "unions")]
    gain = np.asarray(record.arrays["union_gain"]).mean(0)[[subsets.index(n) for n in names]]  # [mask, task]
    with style(height=2.9):
        fig = Figure()
        for ax, values, title, side in zip(
            fig.subplots(1, 2), (contained, gain.T), ("share of column's mask in row's", "gain of row's task, column's mask"), ("mask", "task"), strict=True
        ):  # fmt: skip
            ax.imshow(values, vmin=0, vmax=1)
            ax.grid(False)
            ax.set(xticks=range(3), yticks=range(3), xticklabels=names)
            ticks = (
                [f"{n}\n(chance {d:.2f})" for n, d in zip(names, density, strict=True)]
                if side == "mask"
                else names
            )
            ax.set_yticks(range(3), ticks)
            ax.set_title(title, fontsize=9)
            for i in range(3):
                for j in range(3):
                    ax.text(
                        j,
                        i,
                        f"{values[i, j]:.2f}",
                        ha="center",
                        va="center",
                        color="black" if values[i, j] > 0.5 else "white",
                    )
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    alt = (
        "Two heat maps. Shares of one task's mask inside another's: "
        + ", ".join(f"{names[j]} in {names[i]} {contained[i, j]:.2f}" for i, j in pairs)
        + ". Gains under another task's mask: "
        + ", ".join(f"{names[i]} under {names[j]} {gain[j, i]:.2f}" for i, j in pairs)
        + "."
    )
    caption = (
        f"Masks of three tasks in one multi-task model (mean of {record.metrics['seeds']:.0f} seeds). Left: little of one region lies in another, but "
        "always more than the chance level, which is the density of the row's mask. Right: a mask brings its own task back and hardly any other."
    )
    return Drawn("fig-grafting-overlaps", fig, alt, caption)


def unions(record: Record) -> Drawn:
    """Accuracy of every task under every union of masks."""
    require(record, "union_accuracy", "unions")
    acc = np.asarray(record.arrays["union_accuracy"]).mean(0)
    names, subsets = list(TASKS), [row["grafted"] for row in rows(record, "unions")]
    order = [
        subsets.index("none"),
        *(i for i, s in enumerate(subsets) if s not in ("none", "all weights")),
        subsets.index("all weights"),
    ]
    with style(height=3.6):
        fig = Figure()
        ax = fig.subplots()
        ax.imshow(acc[order], vmin=0, vmax=1, aspect="auto")
        ax.grid(False)
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(order)), [subsets[i] for i in order])
        ax.set(xlabel="tested on", ylabel="masks grafted")
        for row, i in enumerate(order):
            for j, name in enumerate(names):
                inside = name in subsets[i].split(" + ")
                ax.text(
                    j, row, f"{acc[i, j]:.2f}", ha="center", va="center", fontweight="bold" if inside else "normal",
                    color="black" if acc[i, j] > 0.5 else "white",
                )  # fmt: skip
    alt = (
        "Accuracy on "
        + ", ".join(names)
        + " by what is grafted: "
        + "; ".join(f"{subsets[i]} {', '.join(f'{v:.2f}' for v in acc[i])}" for i in order)
    )
    caption = (
        f"Unions of masks of one multi-task model ({record.scale} scale, mean of {record.metrics['seeds']:.0f} seeds). Bold: tasks whose mask is in the "
        "union. The model becomes good at the chosen tasks and stays what it was at the others."
    )
    return Drawn("fig-grafting-unions", fig, alt + ".", caption)


def where(record: Record) -> Drawn:
    """Enrichment of the masks by layer and kind of tensor."""
    require(record, "enrichment", "enrichment_names")
    values = np.asarray(record.arrays["enrichment"]).mean(0)
    labels = [str(n) for n in record.arrays["enrichment_names"]]
    kinds = list(dict.fromkeys(label.split(" ", 1)[1] for label in labels))
    table = {tuple(label.split(" ", 1)): v for label, v in zip(labels, values, strict=True)}
    layers = sorted({layer for layer, _ in table})
    with style(height=3.6):
        fig = Figure()
        ax = fig.subplots()
        at = np.arange(len(kinds))
        for i, layer in enumerate(layers):
            ax.barh(
                at + 0.2 - 0.4 * i, [table[layer, kind] for kind in kinds], 0.38, color=COLOURS[i], hatch=("", "///")[i % 2],
                edgecolor="white", label=f"layer {int(layer) + 1}",
            )  # fmt: skip
        ax.axvline(1, color=GREY, linewidth=1.0)
        ax.set_yticks(at, [kind.replace("_", " ").replace(".", ", ") for kind in kinds])
        ax.invert_yaxis()
        ax.set(xlabel="share of the masks / share of the parameters")
        ax.legend()
    best = sorted(table.items(), key=lambda kv: -kv[1])[:4]
    alt = "Enrichment by tensor and layer; the largest: " + ", ".join(
        f"{kind.replace('_', ' ')} of layer {int(layer) + 1} {v:.1f}" for (layer, kind), v in best
    )
    caption = (
        f"Where the masks lie (three tasks, mean of {record.metrics['seeds']:.0f} seeds). The line at 1 is what random entries would give. Layer "
        f"norms are over-represented {record.metrics['norm_enrichment']:.1f} times and still make only {record.metrics['norm_share']:.1%} of the "
        "masks: nearly all entries sit in the matrices."
    )
    return Drawn("fig-grafting-where", fig, alt + ".", caption)


def deranged(record: Record) -> Drawn:
    """The task whose every answer has to move."""
    require(record, "deranged_accuracy", "deranged_ks", "deranged_ends")
    acc, ks = np.asarray(record.arrays["deranged_accuracy"]).mean(0), np.asarray(record.arrays["deranged_ks"])
    before, after = np.asarray(record.arrays["deranged_ends"]).mean(0)
    with style(height=2.4):
        fig = Figure()
        ax = fig.subplots()
        for r, rule in enumerate(("learned", "first-order", "movement")):
            ax.bar(
                np.arange(len(ks)) + 0.27 * (r - 1), acc[r], 0.25, label=rule, color=COLOURS[r], hatch=("", "///", "...")[r],
                edgecolor="white",
            )  # fmt: skip
        ax.axhline(after, color=GREY, linestyle=":", linewidth=1.2)
        ax.annotate(
            "fine-tuned",
            (1, after),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8.5,
            color=GREY,
        )
        ax.set_xticks(range(len(ks)), [f"{k:,} entries" for k in ks])
        ax.set(ylabel="test accuracy", ylim=(0, 1.12))
        fig.legend(ncols=3, **LEGEND)
    alt = f"Accuracy on the deranged task, pre-trained {before:.2f}, fine-tuned {after:.2f}: " + "; ".join(
        f"{k:,} entries learned {acc[0, i]:.2f}, first-order {acc[1, i]:.2f}, movement {acc[2, i]:.2f}"
        for i, k in enumerate(ks)
    )
    caption = (
        f"Topic with its four label words shifted by one: pre-training says the wrong word every time ({before:.2f}), and fine-tuning has to move "
        f"every answer. With {ks[0]:,} entries the learned mask keeps {acc[0, 0] / after:.0%} of the accuracy, first-order scores "
        f"{acc[1, 0] / after:.0%} and movement {acc[2, 0] / after:.0%} (mean of {record.metrics['seeds']:.0f} seeds)."
    )
    return Drawn("fig-grafting-deranged", fig, alt + ".", caption)
