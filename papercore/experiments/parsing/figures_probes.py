"""The figure of what probes find, layer by layer.

Glossary
    layer     0: embeddings of words and positions
    spread    one standard deviation over probe seeds, each with sentences of its own
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from papercore.experiments.parsing.figures_charts import LEGEND
from papercore.lab.figures import GREY, series_style, style
from papercore.lab.page import Drawn, require
from papercore.lab.record import Record

LABELS = {"linear": "linear probe", "mlp": "two-layer probe"}


def probes(record: Record) -> Drawn:
    """F1 of trees and correlation with marginals by layer, with baselines, ceiling and control task."""
    names = [f"probe_{task}_{kind}" for task in ("parse", "marginal", "control") for kind in LABELS]
    require(record, *names, "right_f1", "io_f1")
    m = record.metrics
    found = {name: np.asarray(record.arrays[name]) for name in names}
    layers = np.arange(found[names[0]].shape[1])
    with style(height=3.0):
        fig = Figure()
        left, right = fig.subplots(1, 2)
        for index, (kind, label) in enumerate(LABELS.items()):
            for ax, task in ((left, "parse"), (right, "marginal"), (right, "control")):
                values = found[f"probe_{task}_{kind}"]
                own = index if task != "control" else 3 + index
                ax.errorbar(
                    layers + 0.06 * (index - 0.5), values.mean(0), yerr=values.std(0, ddof=1), capsize=2.5,
                    label=None if task == "marginal" else (label if task == "parse" else f"{label}, control task"),
                    **series_style(own),
                )  # fmt: skip
        for name, value in (("inside-outside", m["io_f1"]), ("always right-branching", m["right_f1"])):
            left.axhline(value, color=GREY, linewidth=1.0, linestyle=":")
            left.annotate(
                name, (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8.5,
                color=GREY,
            )  # fmt: skip
        left.set(xlabel="layer", ylabel="F1 of the trees", ylim=(min(0.4, m["right_f1"] - 0.05), 1.02))
        right.set(xlabel="layer", ylabel="correlation with the marginals")
        for ax in (left, right):
            ax.set_xticks(layers)
        fig.legend(ncols=2, **LEGEND)
    seeds = len(found[names[0]])

    def line(task: str, kind: str) -> str:
        return ", ".join(f"{value:.2f}" for value in found[f"probe_{task}_{kind}"].mean(0))

    alt = (
        f"By layer from 0: F1 of trees, linear probe {line('parse', 'linear')}, two-layer {line('parse', 'mlp')}; inside-outside {m['io_f1']:.2f}, "
        f"right-branching {m['right_f1']:.2f}. Correlation with marginals, linear {line('marginal', 'linear')}, two-layer {line('marginal', 'mlp')}; "
        f"on the control task {line('control', 'linear')} and {line('control', 'mlp')}."
    )
    caption = (
        f"What probes read off each layer, {record.scale} scale: mean of {seeds} seeds, whiskers one standard deviation. Layer 0 is the word and its "
        "place, before any attention. Left: trees, from how many nodes two neighbours have above them. Right: correlation with the probability that a "
        "span is a constituent; in the control task the targets are random numbers tied to pairs of words. The rise over layer 0 is what the model "
        "added, the distance to the control is what the probe did not just learn by heart."
    )
    return Drawn("fig-parsing-probes", fig, alt, caption)
