"""The chapter's figures: the whole step. Each function reads a record alone and returns a `Drawn`.

The other files of this kind: figures_layout.py (the simulator's sequence), figures_modules.py (single operations) and figures_size.py (size
and cost). All are reached from here::

    from papercore.experiments.tint import figures
    page.show(figures.perplexity, record)

Glossary
    gain      perplexity of the model as it is minus perplexity after the update
    stop      autograd with detached attention scores; full: through everything
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from papercore.experiments.tint.figures_layout import LEGEND, layout
from papercore.experiments.tint.figures_modules import differences, modules, softmax
from papercore.experiments.tint.figures_size import cost, size
from papercore.lab.claims import reported_value
from papercore.lab.figures import COLOURS, GREY, reported_style, series_style, style
from papercore.lab.page import Drawn, require, rows
from papercore.lab.record import Record

__all__ = [
    "cosines", "cost", "differences", "idea", "layout", "modules", "perplexity", "size", "softmax", "steps", "sweep", "variants",
]  # fmt: skip

SMALLEST = 1e-12  # of 1 - cosine, where rounding ends


def idea(record: Record | None = None) -> Drawn:
    """One forward pass of the simulator in four blocks. A drawing; needs no record."""
    stages = (
        ("Forward", "run the\nauxiliary,\nkeep inputs"),
        ("Backward", "send the loss\ngradient back\nthrough W"),
        ("Descent", "add −η Σ δ xᵀ\nto the weights\nin the prefix"),
        ("Forward", "run it again\nwith the new\nweights"),
    )
    with style(height=2.5):
        fig = Figure()
        ax = fig.subplots()
        for number, (name, text) in enumerate(stages):
            x = 1.9 + 2.15 * number
            ax.add_patch(
                FancyBboxPatch(
                    (x, 0.1),
                    1.65,
                    2.8,
                    boxstyle="round,pad=0.04",
                    facecolor="#f4f4f4",
                    edgecolor="#555555",
                    linewidth=1.0,
                )
            )
            ax.text(x + 0.82, 2.62, name, ha="center", va="center", fontsize=9.5, fontweight="bold")
            ax.text(x + 0.82, 1.95, text, ha="center", va="center", fontsize=8)
            changed = number >= 2
            for row, (colour, y) in enumerate(
                ((COLOURS[1] if changed else COLOURS[4], 0.85), (COLOURS[0], 0.28))
            ):
                for column in range(4):
                    ax.add_patch(FancyBboxPatch((x + 0.12 + 0.37 * column, y), 0.27, 0.36, boxstyle="square,pad=0", facecolor=colour, edgecolor="white",
                                                hatch="//" if changed and row == 0 else None))  # fmt: skip
            start = (x - 0.46, 1.5) if number else (1.35, 1.5)
            ax.add_patch(
                FancyArrowPatch(start, (x - 0.08, 1.5), arrowstyle="-|>", mutation_scale=11, color="#555555")
            )
        ax.text(0.02, 1.03, "prefix tokens:\nweights W", fontsize=8.5, va="center", color="#222222")
        ax.text(0.02, 0.46, "text tokens", fontsize=8.5, va="center", color="#222222")
        ax.text(0.02, 2.3, "in: a document\nand a model", fontsize=8.5, va="center", color="#222222")
        ax.set(xlim=(0, 10.3), ylim=(0, 3.05))
        ax.axis("off")
    alt = (
        "Four boxes from left to right: forward, backward, descent, forward. In each stand prefix tokens, which hold the weights of a model, above the "
        "tokens of a text. From descent on the prefix tokens have another colour: the weights have changed."
    )
    caption = (
        "One pass through the simulator. Its first tokens, the prefix, are the weights of a smaller model. Its first layers run that model, "
        "the next send the gradient back and change the prefix, the last run the model again with the changed weights. Nothing outside this one "
        "forward pass is needed, and nothing in the simulator was learned: all its own weights are set by hand."
    )
    return Drawn("fig-tint-idea", fig, alt, caption)


def cosines(record: Record) -> Drawn:
    """1 - cosine of every tensor's change, to autograd with detached scores and to full autograd, random and trained weights."""
    names = [row["tensor"] for row in rows(record, "tensors")]
    kinds = [f"cosines_{label}_{target}" for label in ("random", "trained") for target in ("stop", "full")]
    require(record, "cos_stop_least", "cos_full_least", "dropped_trained", *kinds)
    m, found = record.metrics, {kind: np.asarray(record.arrays[kind]).mean(0) for kind in kinds}
    with style(height=5.0):
        fig = Figure()
        axes = fig.subplots(1, 2, sharey=True, sharex=True)
        for ax, label in zip(axes, ("random", "trained"), strict=True):
            for index, (target, text) in enumerate(
                (("stop", "to autograd, scores held fixed"), ("full", "to full autograd"))
            ):
                values = np.maximum(1 - found[f"cosines_{label}_{target}"], SMALLEST)
                drawn = series_style(index) | {"linestyle": "none", "markersize": (4.0, 6.5)[index]}
                if index:  # hollow, so that a point under it is seen
                    drawn |= {"markerfacecolor": "none", "markeredgewidth": 1.3}
                ax.plot(values, np.arange(len(names)), label=text if ax is axes[0] else None, **drawn)
            ax.axvline(1e-3, color=GREY, linewidth=0.9, linestyle=":", marker="none")
            ax.set(xscale="log", xlabel=f"1 − cosine, {label} weights")
        axes[0].set_yticks(
            range(len(names)),
            [name.replace(".weight", " W").replace(".bias", " b") for name in names],
            fontsize=7.5,
        )
        axes[0].invert_yaxis()
        fig.legend(ncols=2, **LEGEND)
    worst = {kind: names[int(values.argmin())] for kind, values in found.items()}
    alt = (
        f"One minus the cosine of {len(names)} tensors' changes on a logarithmic axis, random and trained weights. To autograd with fixed scores the lowest cosine of "
        f"all is {m['cos_stop_least']:.5f}. To full autograd the lowest is {m['cos_full_random_least']:.2f} ({worst['cosines_random_full']}) with random weights and "
        f"{m['cos_full_least']:.2f} ({worst['cosines_trained_full']}) with trained ones."
    )
    caption = (
        f"Direction of the simulated step, tensor by tensor: mean over documents and {m['seeds']:.0f} seeds; left is better. Against the gradient that the construction aims at, "
        "with attention scores held fixed, every tensor is right. Against the model's own gradient the tensors below a layer's attention, its first norm "
        f"above all, are off. Not in the picture: queries and keys, which are never updated; in trained models they hold {m['dropped_trained']:.0%} of "
        f"the gradient's squared norm, in random ones {m['dropped_random']:.0%}."
    )
    return Drawn("fig-tint-cosines", fig, alt, caption, dpi=100)


def sweep(record: Record) -> Drawn:
    """Gain against the inner rate on the documents that choose it, for every train fraction."""
    require(record, "rates", "fractions", "sweep_vanilla", "sweep_tint", "sweep_dynamic")
    rates, fractions = np.asarray(record.arrays["rates"]), np.asarray(record.arrays["fractions"])
    vanilla = np.asarray(record.arrays["sweep_vanilla"])[:, :, None]
    gains = {
        name: (vanilla - np.asarray(record.arrays[f"sweep_{name}"])).mean(0) for name in ("tint", "dynamic")
    }
    with style(height=2.9):
        fig = Figure()
        axes = fig.subplots(1, 2, sharey=True)
        for ax, (name, label) in zip(
            axes, (("tint", "TinT"), ("dynamic", "dynamic evaluation")), strict=True
        ):
            for index, fraction in enumerate(fractions):
                ax.plot(
                    rates,
                    gains[name][index],
                    label=f"{fraction:.0%} trained on" if ax is axes[0] else None,
                    **series_style(index),
                )
            ax.axhline(0, color=GREY, linewidth=1.0, marker="none")
            ax.set(xscale="log", xlabel=f"inner rate η, {label}")
            ax.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=7.5, rotation=40)
            ax.set_xticks([], minor=True)
        low = min(float(g.min()) for g in gains.values())
        axes[0].set(ylabel="perplexity saved", ylim=(max(low, -0.8) - 0.05, None))
        fig.legend(ncols=4, **LEGEND)
    best = ", ".join(
        f"{f:.0%}: {rates[int(row.argmax())]:g} ({row.max():.2f})"
        for f, row in zip(fractions, gains["tint"], strict=True)
    )
    last = ", ".join(f"{row[-1]:+.2f}" for row in gains["tint"])
    alt = f"Perplexity saved against the inner rate. TinT's best rate and gain by fraction: {best}. At the largest rate the gains are {last}."
    caption = (
        f"The rate matters more than anything else ({record.config['choose_documents']} documents for each of {record.metrics['seeds']:.0f} seeds, of topics never trained on; none of them is "
        "reported on below). The loss is a sum over tokens, so the step grows with the training part and its best rate falls. Too large a rate "
        "hurts, for the simulator and for autograd alike. A seed takes the rate that is best on the other seeds' documents."
    )
    return Drawn("fig-tint-sweep", fig, alt, caption, dpi=100)


def perplexity(record: Record) -> Drawn:
    """Perplexity of the rest against the train fraction, and the gains with bootstrap intervals."""
    table = rows(record, "perplexity")
    require(record, "ppl_vanilla", "ppl_tint", "ppl_dynamic", "gap_ratio_worst", "documents")
    m, x = record.metrics, np.array([100 * row["fraction"] for row in table])
    labels = {"vanilla": "no update", "tint": "TinT", "dynamic": "dynamic evaluation"}
    with style(height=3.3):
        fig = Figure()
        left, right = fig.subplots(1, 2)
        for index, (name, label) in enumerate(labels.items()):
            own = (6, 0, 1)[index]
            for seed in np.asarray(record.arrays[f"ppl_{name}"]):
                left.plot(
                    x + 1.2 * (index - 1),
                    seed,
                    color=COLOURS[own],
                    marker=".",
                    markersize=4,
                    linestyle="none",
                    alpha=0.45,
                )
            left.plot(x, [row[name] for row in table], label=label, **series_style(own))
        left.set(xlabel="trained on, % of the document", ylabel="perplexity of the rest")
        for index, gain in enumerate(("gain", "dynamic gain")):
            y = np.array([row[gain] for row in table])
            err = np.abs(
                np.array([[row[f"{gain} low"] for row in table], [row[f"{gain} high"] for row in table]]) - y
            )
            right.errorbar(x + 1.2 * (index - 0.5), y, yerr=err, capsize=2.5, **series_style(index))
        for index, model in enumerate(("GPT-2", "OPT-125M")):
            told = [
                reported_value("tint", "lm", f"{model} vanilla", f"{row['fraction']:.0%}") - reported_value("tint", "lm", f"{model} TinT", f"{row['fraction']:.0%}")
                for row in table
                if f"{row['fraction']:.0%}" in ("30%", "50%", "70%", "90%")
            ]  # fmt: skip
            right.plot(
                x[: len(told)],
                told,
                label=f"TinT on {model}, recalled",
                **(reported_style(0) | {"marker": "os"[index]}),
            )
        right.axhline(0, color=GREY, linewidth=1.0, marker="none")
        right.set(xlabel="trained on, % of the document", ylabel="perplexity saved")
        for ax in (left, right):
            ax.set_xticks(x, [f"{v:.0f}" for v in x])
        fig.legend(ncols=3, **LEGEND)
    told_rows = "; ".join(
        f"{row['fraction']:.0%}: {row['vanilla']:.2f}, {row['tint']:.2f}, {row['dynamic']:.2f}"
        for row in table
    )
    alt = f"Perplexity of the rest of a document without update, with TinT and with dynamic evaluation, by trained share. {told_rows}."
    caption = (
        f"One inner step on the first part of each document, then the perplexity of the rest; {m['documents']:.0f} documents of unseen topics over {m['seeds']:.0f} seeds (dots). "
        "Dynamic evaluation updates all weights of the blocks by autograd, queries and keys too. Right: what is saved, with 95 % intervals from a paired bootstrap over "
        "documents. Hollow: what the paper's table says of its own models on WikiText-103, as recalled and unconfirmed; other text, so only the "
        "size of the effect can be compared."
    )
    return Drawn("fig-tint-perplexity", fig, alt, caption, dpi=100)


def steps(record: Record) -> Drawn:
    """Perplexity and lowest cosine for 1, 2, ... inner steps."""
    require(record, "steps_tint", "steps_dynamic", "steps_vanilla", "steps_cosines", "steps_cos_least")
    m = record.metrics
    tint, dynamic = (np.asarray(record.arrays[f"steps_{name}"]) for name in ("tint", "dynamic"))
    lowest = np.asarray(record.arrays["steps_cosines"])
    x = np.arange(1, len(tint) + 1)
    with style(height=2.7):
        fig = Figure()
        left, right = fig.subplots(1, 2)
        left.axhline(
            m["steps_vanilla"],
            label="no update",
            color=COLOURS[6],
            linestyle=(0, (6, 1.5, 1.2, 1.5, 1.2, 1.5)),
            marker="none",
        )
        left.plot(x, tint, label="TinT", **series_style(0))
        left.plot(x, dynamic, label="dynamic evaluation", **series_style(1))
        left.set(xlabel="inner steps, each η / steps", ylabel="perplexity of the rest")
        right.plot(x, np.maximum(1 - lowest[:, 1], SMALLEST), label="1 − lowest cosine", **series_style(2))
        right.axhline(1e-3, color=GREY, linewidth=0.9, linestyle=":", marker="none")
        right.set(xlabel="inner steps", ylabel="1 − cosine to autograd", yscale="log")
        for ax in (left, right):
            ax.set_xticks(x)
        fig.legend(ncols=4, **LEGEND)
    told = ", ".join(f"{k}: {a:.2f} and {b:.2f}" for k, a, b in zip(x, tint, dynamic, strict=True))
    alt = (
        f"Perplexity after 1 to {len(tint)} inner steps of TinT and of dynamic evaluation: {told}; without update {m['steps_vanilla']:.2f}. Lowest cosine to as many steps by "
        f"autograd with fixed scores {m['steps_cos_least']:.5f}."
    )
    caption = (
        "Several inner steps by repeating the blocks, half of each document trained on. The rate of one step is divided by their number, a rule fixed beforehand, so that "
        "all go equally far. Left: what the steps are worth. Right: the simulated walk against as many steps of autograd with fixed scores, lowest over tensors "
        "and documents; below the dotted line is what claim C11 asks."
    )
    return Drawn("fig-tint-steps", fig, alt, caption)


def variants(record: Record) -> Drawn:
    """1 - lowest cosine for every kind of auxiliary, at two steps of the finite difference."""
    found = rows(record, "variants")
    require(record, "variant_cos_least", "variant_eps")
    columns = {
        "lowest cosine": f"ε = {record.metrics['variant_eps']:g}",
        "lowest cosine, larger ε": f"ε = {record.config['fd_eps']:g}",
    }
    with style(height=3.6):
        fig = Figure()
        ax = fig.subplots()
        for index, (column, label) in enumerate(columns.items()):
            values = [max(1 - row[column], SMALLEST) for row in found]
            ax.plot(values, range(len(found)), label=label, **(series_style(index) | {"linestyle": "none"}))
        ax.axvline(1e-3, color=GREY, linewidth=0.9, linestyle=":", marker="none")
        ax.set_yticks(range(len(found)), [row["variant"] for row in found], fontsize=8.5)
        ax.invert_yaxis()
        ax.set(xscale="log", xlabel="1 − lowest cosine over tensors and documents")
        fig.legend(ncols=2, **LEGEND)
    told = ", ".join(f"{row['variant']} {row['lowest cosine']:.5f}" for row in found)
    caption = (
        "Auxiliaries of many kinds, with random weights: the direction of the simulated step against autograd with fixed scores, worst tensor of the worst document. The gradients of "
        "random models are large, and the error of a difference grows with ε times the gradient; where kinks are met (ReLU in OPT) the larger ε misses the line. RMS norm, gated units, "
        "rotary positions and shared key heads are this book's extension: the paper's code has none of them."
    )
    return Drawn("fig-tint-variants", fig, f"Lowest cosine by kind of auxiliary: {told}.", caption, dpi=100)
