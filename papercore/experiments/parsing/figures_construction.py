"""Figures of the transformer that is built: its layers at work, its size, what fewer symbols cost, and how fast the chart is.

Glossary
    dims      numbers of a token's state
    L         words of the longest sentence
    ratio     time over that of all marginals by this book's kernel, in one run
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

from papercore.experiments.parsing.figures_charts import LEGEND
from papercore.lab.benchmarks import find_benchmark
from papercore.lab.claims import reported_value
from papercore.lab.figures import COLOURS, GREY, reported_style, series_style, style
from papercore.lab.page import Drawn, NotMeasured, require, rows
from papercore.lab.record import Record
from papercore.parsing import ConstructedIO, english

SHOWN = "the dog likes the child"


def layers(record: Record | None = None) -> Drawn:
    """Attention of every layer of the construction on a sentence of five words. Drawn from the kernel; needs no record."""
    grammar = english(dtype=torch.float64)
    ids = grammar.encode(SHOWN).view(1, -1)
    n = ids.shape[1]
    model = ConstructedIO(grammar, n)
    attentions = [a[0].sum(0).numpy() for a in model(ids).attentions]
    used = [int((a > 0).sum()) for a in attentions]
    words = [f"{k}" for k in range(n + 1)]
    with style(height=3.7):
        fig = Figure()
        grid = fig.subplots(2, n - 1, sharex=True, sharey=True)
        axes = grid.flatten()
        for ax, layer, scores in zip(axes, model.layers(n), attentions, strict=True):
            shown = np.where(scores > 0, np.log10(np.maximum(scores, 1e-12)), np.nan)
            ax.imshow(shown, cmap="cividis", vmin=-9, vmax=0)
            ax.set_xticks(range(n + 1), words, fontsize=7)
            ax.set_yticks(range(n + 1), words, fontsize=7)
            ax.set_xlabel(f"{'inside' if layer.part == 0 else 'outside'}\n{layer.width} words", fontsize=8)
            ax.grid(color="#eeeeee", linewidth=0.4)
            ax.set_xlim(-0.5, n + 0.5)
            ax.set_ylim(n + 0.5, -0.5)
        for row in grid:
            row[0].set_ylabel("from gap")
    alt = (
        f"{len(attentions)} small matrices of attention from gap to gap, one a layer: {n - 1} inside layers for spans of 2 to {n} words and {n - 1} outside "
        f"layers for {n - 1} words down to 1. In each, only pairs of gaps at the layer's own distance have a score; numbers of them: {', '.join(map(str, used))}."
    )
    caption = (
        f"The construction on '{SHOWN}': attention between the {n + 1} gaps, summed over heads, on a logarithmic scale, in the {len(attentions)} layers in "
        f"order. Each layer looks at one distance alone. An inside layer writes how well a span fits the grammar (few spans do); the outside layers "
        "go back down and write how well the rest of the sentence fits the span. Drawn by the kernel."
    )
    return Drawn("fig-parsing-layers", fig, alt, caption)


def size(record: Record) -> Drawn:
    """Numbers of a token's state against the longest sentence: exact for 1,600 symbols, moderate, and BERT's."""
    names = ("size_lengths", "size_exact_1600", "size_exact_68", "size_moderate")
    require(record, *names, "exact_dims", "moderate_dims", "in_terminals", "pre_terminals")
    lengths, exact, small, moderate = (np.asarray(record.arrays[name]) for name in names)
    m = record.metrics
    symbols = int(m["in_terminals"] + m["pre_terminals"])
    bert = reported_value("parsing", "intro", "BERT base", "embedding dims")
    with style(height=2.8):
        fig = Figure()
        ax = fig.subplots()
        ax.plot(lengths, exact, label="exact, 1,600 symbols", **series_style(0))
        ax.plot(lengths, small, label=f"exact, this book's {symbols} symbols", **series_style(1))
        ax.plot(lengths, moderate, label="moderate: 20 + 45 symbols kept", **series_style(2))
        at = reported_value("parsing", "intro", "exact construction PTB", "average length L")
        for index, (table, row, column) in enumerate(
            (
                ("intro", "exact construction PTB", "embedding dims"),
                ("abstract", "moderate construction", "embedding dims (average)"),
            )
        ):
            value = reported_value("parsing", table, row, column)
            ax.plot([at], [value], label="reported" if index == 0 else None, **reported_style(2 * index))
        ax.axhline(bert, color=GREY, linewidth=1.0, linestyle=":")
        ax.annotate(
            f"BERT base, {bert:.0f}", (0.99, bert), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8.5,
            color=GREY,
        )  # fmt: skip
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="words of the longest sentence, L",
            ylabel="numbers of a token's state",
        )
        ax.set_xticks(lengths, [str(n) for n in lengths])
        ax.set_xticks([], minor=True)
        fig.legend(ncols=2, **LEGEND)
    alt = (
        f"Numbers of a token's state against sentence length. At 25 words: exact with 1,600 symbols {m['exact_dims']:,.0f}, moderate "
        f"{m['moderate_dims']:,.0f}, BERT base {bert:.0f}. Exact with {symbols} symbols at {lengths[-1]} words: {small[-1]:,}."
    )
    caption = (
        f"The exact construction holds 2 |N| L numbers for each token: {m['exact_dims']:,.0f} for the paper's treebank grammar at L = 25, in "
        f"{m['exact_layers']:.0f} layers of {m['exact_heads']:.0f} heads. Keeping 20 in-terminals and 45 pre-terminals leaves {m['moderate_dims']:,.0f}, and merging "
        f"them {m['moderate_heads']:.0f} heads. Closed forms; hollow: what the paper reports."
    )
    return Drawn("fig-parsing-size", fig, alt, caption)


def truncation(record: Record) -> Drawn:
    """F1 and perplexity against the symbols that are kept."""
    table = rows(record, "truncation")
    require(record, "whole_f1", "kept_f1", "kept_perplexity", "whole_perplexity")
    m = record.metrics
    outer = sorted({row["pre-terminals"] for row in table}, reverse=True)
    with style(height=2.9):
        fig = Figure()
        axes = fig.subplots(1, 2)
        for index, p in enumerate(outer):
            some = sorted(
                (row for row in table if row["pre-terminals"] == p), key=lambda row: row["in-terminals"]
            )
            x = [row["in-terminals"] for row in some]
            for ax, what in zip(axes, ("F1", "perplexity"), strict=True):
                label = f"{p} pre-terminals" if what == "F1" else None
                ax.plot(x, [row[what] for row in some], label=label, **series_style(index))
        axes[0].set(xlabel="in-terminals kept", ylabel="F1 of the trees")
        axes[1].set(xlabel="in-terminals kept", ylabel="perplexity, one masked word", yscale="log")
        low, high = axes[1].get_ylim()
        ticks = [t for t in (5, 10, 15, 20, 30, 40, 60, 80, 120, 200) if low <= t <= high]
        axes[1].set_yticks(ticks, [str(t) for t in ticks])
        axes[1].set_yticks([], minor=True)
        fig.legend(ncols=4, **LEGEND)
    whole = next(row for row in table if row["F1"] == max(r["F1"] for r in table))
    alt = (
        f"F1 and one-mask perplexity against kept in-terminals, one line for each number of kept pre-terminals. With all symbols F1 {m['whole_f1']:.3f} and "
        f"perplexity {m['whole_perplexity']:.1f}; with the paper's 20 in-terminals and all {outer[0]} pre-terminals {m['kept_f1']:.3f} and "
        f"{m['kept_perplexity']:.1f}. The best F1 of all is {whole['F1']:.3f}."
    )
    caption = (
        f"What is lost when only the most frequent symbols of this book's grammar are kept ({record.config['truncation_tests']} sentences, {record.scale} scale). "
        "A hand-made grammar has no symbol to spare: without one of them, some sentences have no tree at all, and count with the right-branching one. "
        "The paper's own curve could not be read; its abstract says more than 70 % F1 on the Penn "
        "Treebank for the moderate construction."
    )
    return Drawn("fig-parsing-truncation", fig, alt, caption)


def speed(record: Record | None = None) -> Drawn:
    """Time of each peer over that of all marginals; from the benchmarks, not from `record`."""
    found = find_benchmark("parsing")
    if found is None:
        raise NotMeasured("records/benchmarks/parsing.json is missing: make bench measures the kernels")
    tasks = {"dense": "random dense grammar", "english": "this book's grammar"}
    table = sorted(found["rows"], key=lambda row: (row["task"], row["ratio"]))
    labels = [
        f"{row['name'] if row['package'] != 'papercore' else 'papercore, ' + row['name']}" for row in table
    ]
    with style(height=0.9 + 0.27 * len(table)):
        fig = Figure()
        ax = fig.subplots()
        for index, (task, name) in enumerate(tasks.items()):
            here = [(line, row) for line, row in enumerate(table) if row["task"] == task]
            if not here:
                continue
            middle = np.array([row["ratio"] for _, row in here])
            whiskers = np.abs(
                np.array([[row["low"] for _, row in here], [row["high"] for _, row in here]]) - middle
            )
            ax.barh([line for line, _ in here], middle, color=COLOURS[index], height=0.6, xerr=whiskers, label=name,
                    hatch=("", "//")[index], edgecolor="#333333", linewidth=0.5, error_kw={"elinewidth": 1.0})  # fmt: skip
            for line, row in here:
                ax.annotate(
                    f" {row['ratio']:.3g}", (max(row["ratio"], row["high"]), line), va="center", fontsize=8.5
                )
        ax.axvline(1.0, color=GREY, linewidth=1.0)
        ax.set_yticks(range(len(table)), labels, fontsize=8.5)
        ax.invert_yaxis()
        low, high = ax.get_xlim()
        ax.set(
            xscale="log",
            xlabel="CPU time over that of all marginals, papercore",
            xlim=(min(0.1, 0.6 * min(r["ratio"] for r in table)), high * 2),
        )
        ax.grid(visible=False, axis="y")
        fig.legend(ncols=2, **LEGEND)
    told = ", ".join(f"{label} {row['ratio']:.3g}" for label, row in zip(labels, table, strict=True))
    caption = (
        f"CPU time over that of all marginals by this book's kernel, one thread, {found['rounds']} interleaved rounds: medians, whiskers from the lower to the "
        f"upper quartile. Dense: {found['model']}. The limit is the time of the matrix products alone. NLTK's parsers find one tree and no marginals."
    )
    return Drawn("fig-parsing-speed", fig, f"Time over that of all marginals by papercore: {told}.", caption)
