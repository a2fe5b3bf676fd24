"""The chapter's figures: what the masked language model learned. Each function reads a record alone and returns a `Drawn`.

The other files of this kind: figures_charts.py (charts of sentences, the idea), figures_probes.py (probes) and
figures_construction.py (the transformer that is built: its size, its symbols, its speed). All are reached from here::

    from papercore.experiments.parsing import figures
    page.show(figures.learning, record)

Glossary
    nat     unit of cross-entropy; 1 nat = 1.44 bits
    gap     cross-entropy of a predictor minus that of the grammar's posterior
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from papercore.experiments.parsing.figures_charts import LEGEND, charts, idea
from papercore.experiments.parsing.figures_construction import layers, size, speed, truncation
from papercore.experiments.parsing.figures_probes import probes
from papercore.lab.figures import COLOURS, GREY, series_style, style
from papercore.lab.page import Drawn, require
from papercore.lab.record import Record

__all__ = ["charts", "idea", "layers", "learning", "probes", "size", "speed", "tokens", "truncation"]


def learning(record: Record) -> Drawn:
    """Cross-entropy against steps beside unigram, window and the optimum; and the gap beside the divergence."""
    require(
        record, "check_steps", "check_ce", "check_gap", "check_gap_se", "check_kl", "bayes_ce", "window_ce"
    )
    m, steps = record.metrics, np.asarray(record.arrays["check_steps"])
    ce, gap, se, kl = (np.asarray(record.arrays[f"check_{name}"]) for name in ("ce", "gap", "gap_se", "kl"))
    with style(height=3.0):
        fig = Figure()
        left, right = fig.subplots(1, 2, width_ratios=(1.5, 1))
        left.plot(steps, ce, label="masked language model", **series_style(0))
        for name, value, index in (
            ("word frequencies", m["unigram_ce"], 6),
            ("two neighbours", m["window_ce"], 1),
            ("inside-outside (the optimum)", m["bayes_ce"], 2),
        ):
            line = {**series_style(index), "marker": "none"}
            left.axhline(value, **line)
            left.annotate(
                f"{name}, {value:.2f}",
                (0.98, value),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8.5,
                color=COLOURS[index],
            )
        left.set(xlabel="training step", ylabel="cross-entropy, nat a masked word")
        left.set_ylim(
            min(m["bayes_ce"], float(ce.min())) - 0.25, max(float(ce.max()), m["unigram_ce"]) + 0.25
        )
        right.errorbar(steps, gap, yerr=2 * se, fmt="o", color=COLOURS[0], capsize=2.5, label="gap ± 2 s.e.")
        right.plot(steps, kl, label="mean KL", **{**series_style(4), "marker": "P", "markersize": 4.0})
        right.axhline(0, color=GREY, linewidth=1.0)
        right.set(xlabel="training step", ylabel="above the optimum, nat", ylim=(-0.1, None))
        fig.legend(ncols=3, **LEGEND)
    alt = (
        f"Cross-entropy of the masked language model falls from {ce[0]:.2f} to {ce[-1]:.2f} nats in {steps[-1]:,.0f} steps. Lines: word frequencies "
        f"{m['unigram_ce']:.2f}, two neighbours {m['window_ce']:.2f}, inside-outside {m['bayes_ce']:.2f}. The gap to inside-outside is "
        f"{gap[-1]:.3f} at the end, the mean divergence {kl[-1]:.3f}."
    )
    caption = (
        f"Left: cross-entropy on {len(record.arrays['token_bayes']):,} fresh sentences with one masked word each, {record.scale} scale, one training "
        "run. See how the model passes the predictor that knows two neighbours and never crosses the optimum. Right: how far it is above the "
        "optimum, measured in two ways that must agree: the difference of cross-entropies (dots, over sentences) and the mean divergence from the "
        "grammar's posterior (line)."
    )
    if record.config.get("short_share"):
        caption += (
            f" The first {record.config['short_share']:.0%} of the steps see sentences of at most {record.config['short_length']} words alone: the test, "
            "with longer ones in it, falls quickly once they are met."
        )
    return Drawn("fig-parsing-learning", fig, alt, caption)


def tokens(record: Record) -> Drawn:
    """Probability of the masked word under the model against that under the grammar, sentence by sentence."""
    require(record, "token_bayes", "token_model", "bayes_accuracy", "model_accuracy")
    p, q = (np.asarray(record.arrays[f"token_{name}"], dtype=float) for name in ("bayes", "model"))
    correlation = float(np.corrcoef(np.log(p), np.log(q))[0, 1])
    factor = float(np.median(np.abs(np.log(q / p))))
    with style(height=3.3):
        fig = Figure()
        ax = fig.subplots()
        ax.scatter(p, q, s=6, alpha=0.3, color=COLOURS[0], linewidths=0)
        low = max(float(min(p.min(), q.min())), 1e-6)
        ax.plot([low, 1], [low, 1], color=GREY, linewidth=1.0, marker="none")
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="probability under the grammar",
            ylabel="probability under the model",
        )
        ax.set(xlim=(low, 1.2), ylim=(low, 1.2))
    m = record.metrics
    alt = (
        f"Scatter of {len(p):,} masked words: probability under the model against probability under the grammar, both on logarithmic axes, around the "
        f"diagonal. Correlation of the logarithms {correlation:.2f}; the median word is off by a factor of {np.exp(factor):.2f}."
    )
    caption = (
        f"The word that was masked, under the grammar's posterior and under the trained model ({record.scale} scale). On the diagonal both agree; the "
        f"correlation of the logarithms is {correlation:.2f} and the median word is off by a factor of {np.exp(factor):.2f}. The first guess of the "
        f"grammar is right in {m['bayes_accuracy']:.0%} of the sentences, that of the model in {m['model_accuracy']:.0%}."
    )
    return Drawn("fig-parsing-tokens", fig, alt, caption)
