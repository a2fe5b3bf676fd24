"""Figures of charts: the idea of the paper on one sentence, and one chart as three ways give it.

Glossary
    chart     unlabelled span marginals [n, n] by start and width - 1; drawn as a triangle, a span above the middle of its words
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from papercore.experiments.parsing.examples import EXAMPLES
from papercore.lab.figures import COLOURS, style
from papercore.lab.page import Drawn, require
from papercore.lab.record import Record
from papercore.parsing import english, inside_outside, masked_posterior

# Room for a line of text above a figure; the style's own spacing would cut some entries off at the edge.
LEGEND: dict[str, Any] = {
    "loc": "outside upper left",
    "columnspacing": 1.2,
    "handlelength": 2.3,
    "handletextpad": 0.5,
    "fontsize": 9,
    "borderaxespad": 0.1,
}
SENTENCE, BLANK = EXAMPLES[0][0], 2


def triangle(ax: Any, chart: NDArray[Any], words: Sequence[str]) -> None:
    """Draw the spans of two or more words: the darker, the more likely a constituent."""
    n = len(words)
    for width in range(2, n + 1):
        for start in range(n - width + 1):
            value = float(np.clip(chart[start, width - 1], 0, 1))
            shade = 1 - 0.85 * value
            at = (start + width / 2 - 0.5, width - 0.5)
            ax.add_patch(Rectangle(at, 1, 1, facecolor=(shade, shade, 1 - 0.35 * value), edgecolor="#d0d0d0", linewidth=0.5))  # fmt: skip
            if value >= 0.05:
                ax.text(
                    start + width / 2, width, f"{value:.1f}".lstrip("0") if value < 0.95 else "1",
                    ha="center", va="center", fontsize=7, color="white" if value > 0.5 else "#222222",
                )  # fmt: skip
    ax.set_xticks(np.arange(n) + 0.5, words, rotation=55, ha="right", rotation_mode="anchor", fontsize=8.5)
    ax.set(xlim=(0, n), ylim=(1.4, n + 0.6))
    ax.grid(visible=False)


def told(chart: NDArray[Any], words: Sequence[str]) -> str:
    """The spans that are likely, but for the whole sentence, in words."""
    n = len(words)
    found = [
        f"{' '.join(words[start : start + width])} {chart[start, width - 1]:.2f}"
        for width in range(2, n)
        for start in range(n - width + 1)
        if chart[start, width - 1] >= 0.3
    ]
    return ", ".join(found)


def idea(record: Record | None = None) -> Drawn:
    """A sentence with a blank: its chart, and what that says about the blank. Drawn from the grammar; needs no record."""
    grammar = english(dtype=torch.float64)
    mask = len(grammar.vocabulary)
    ids = grammar.encode(SENTENCE).view(1, -1).clone()
    ids[0, BLANK] = mask
    result = inside_outside(grammar, ids, mask_token_id=mask)
    chart = result.span_marginals[0].sum(-1).numpy()
    p = masked_posterior(grammar, ids, mask)[0, BLANK]
    tags = result.term_marginals[0, BLANK]
    top = p.argsort(descending=True, stable=True)[:8].tolist()
    classes = tags.argsort(descending=True, stable=True)[:3].tolist()
    words = SENTENCE.split()
    words[BLANK] = "___"
    with style(height=2.9):
        fig = Figure()
        left, right = fig.subplots(1, 2, width_ratios=(1.35, 1))
        triangle(left, chart, words)
        left.set(ylabel="words of the span", xlabel="")
        right.barh(range(len(top)), [float(p[i]) for i in top], color=COLOURS[0], height=0.7)
        right.set_yticks(range(len(top)), [grammar.vocabulary[i] for i in top], fontsize=9)
        right.invert_yaxis()
        right.set(xlabel="probability of the blank")
        right.grid(visible=False, axis="y")
    kinds = ", ".join(f"{grammar.preterminals[i]} {float(tags[i]):.2f}" for i in classes)
    first = ", ".join(f"{grammar.vocabulary[i]} {float(p[i]):.2f}" for i in top[:4])
    alt = (
        f"Left: the chart of '{' '.join(words)}' as a triangle of spans; likely constituents: {told(chart, words)}. Right: the most likely words "
        f"for the blank: {first}."
    )
    caption = (
        "Left: the probability that a span of words is a constituent, one square for each span, under a small grammar of English that knows nothing of "
        f"the blank. Right: the words for the blank that follow from it. The most likely classes of the blank: {kinds} (verbs with an object, in the "
        "singular here). To predict the word, the parse is all that one needs, and one can do no better. Drawn by the kernel."
    )
    return Drawn("fig-parsing-idea", fig, alt, caption)


def charts(record: Record, row: int = 0) -> Drawn:
    """One chart three times: inside-outside, the transformer that was built, a probe of the one that was trained."""
    require(record, "chart_lengths", "chart_io", "chart_built", "chart_probe", "marginal_mlp_layer")
    words = EXAMPLES[row][0].split()
    kinds = {
        "chart_io": "inside-outside",
        "chart_built": "built transformer",
        "chart_probe": "probe of the trained one",
    }
    drawn = {name: np.asarray(record.arrays[name])[row] for name in kinds}
    with style(height=2.7):
        fig = Figure()
        axes = fig.subplots(1, 3, sharey=True)
        for ax, (name, label) in zip(axes, kinds.items(), strict=True):
            triangle(ax, drawn[name], words)
            ax.set_xlabel(label)
        axes[0].set_ylabel("words of the span")
    n = len(words)
    cells = [(s, w - 1) for w in range(2, n) for s in range(n - w + 1)]
    off = {
        name: float(np.mean([abs(drawn[name][c] - drawn["chart_io"][c]) for c in cells])) for name in kinds
    }
    alt = (
        f"Three charts of '{EXAMPLES[row][0]}'. Inside-outside: {told(drawn['chart_io'], words)}. Built transformer: mean difference "
        f"{off['chart_built']:.3f}. Probe: {told(drawn['chart_probe'], words)}; mean difference {off['chart_probe']:.3f}."
    )
    caption = (
        f"Span marginals of one sentence ({record.scale} scale). The transformer that was built gives those of inside-outside. The two-layer probe "
        f"reads layer {record.metrics['marginal_mlp_layer']:.0f} of the trained model and is off by {off['chart_probe']:.2f} in the mean over spans: it "
        "finds most constituents, and blurs."
    )
    return Drawn("fig-parsing-charts", fig, alt, caption, colours=48)
