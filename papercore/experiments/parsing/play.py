"""What the chapter's controls turn: blanks, charts and kept symbols, all from the record.

explore(play.blank(record), name=..., sentence=play.sentences(record), ...)

Each function takes a record and returns a function for `explore`, whose settings are read from the record's tables and arrays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from papercore.experiments.parsing.examples import EXAMPLES
from papercore.lab.page import require, rows
from papercore.lab.plot import Plot
from papercore.lab.record import Record


def sentences(record: Record) -> list[str]:
    """Sentences with a blank."""
    return list(dict.fromkeys(row["sentence"] for row in rows(record, "blanks")))


def blank(record: Record) -> Callable[..., Plot]:
    """Posterior of the grammar and the model's guess for the most likely words of a blank."""
    found = rows(record, "blanks")
    first = sentences(record)[0]

    def shown(sentence: str = first) -> Plot:
        some = [row for row in found if row["sentence"] == sentence]
        listed = ", ".join(f"{row['rank']} {row['word']}" for row in some)
        series = {name: [float(f"{row[key]:.3g}") for row in some]
                  for name, key in (("inside-outside", "posterior"), ("masked language model", "model"))}  # fmt: skip
        return Plot(
            [row["rank"] for row in some], series, "word, most likely first", "probability", yscale="log", ylim=(1e-4, 1.0), text=listed
        )  # fmt: skip

    return shown


def texts() -> list[str]:
    """The sentences whose charts are kept."""
    return [text for text, _ in EXAMPLES]


def chart(record: Record) -> Callable[..., Plot]:
    """Marginals of all spans of one width: inside-outside, the built transformer, the probe."""
    require(record, "chart_lengths", "chart_io", "chart_built", "chart_probe")
    trees = {row["sentence"]: row for row in rows(record, "trees")}
    names = {"inside-outside": "chart_io", "built transformer": "chart_built", "probe": "chart_probe"}
    longest = max(int(n) for n in record.arrays["chart_lengths"])

    def shown(sentence: str = texts()[0], width: int = 2) -> Plot:
        number = texts().index(sentence)
        words = sentence.split()
        spans = max(len(words) - width + 1, 1)
        series = {
            label: np.round(np.asarray(record.arrays[name])[number, :spans, width - 1], 3)
            for label, name in names.items()
        }
        best = int(np.argmax(series["inside-outside"]))
        tree = trees[sentence]
        same = tree["labelled recall"] == tree["most probable"]
        text = (
            f"likeliest here: “{' '.join(words[best : best + width])}”. The most probable tree (probability {tree['probability of the latter']:.2f}) "
            f"{'is also' if same else 'is not'} the tree of highest expected recall."
        )
        return Plot(
            range(1, spans + 1), series, "first word of the span", "probability of being a constituent", xlim=(0.5, longest - 0.5),
            ylim=(-0.03, 1.03), text=text,
        )  # fmt: skip

    return shown


def widths(record: Record) -> list[int]:
    """Widths that every example has."""
    require(record, "chart_lengths")
    return list(range(2, min(int(n) for n in record.arrays["chart_lengths"])))


def kept(record: Record) -> Callable[..., Plot]:
    """F1, and share of sentences that still have a tree, against kept in-terminals."""
    found = rows(record, "truncation")
    most = max(row["pre-terminals"] for row in found)
    base = next(
        row for row in found if row["pre-terminals"] == most and row["share of in-terminals"] > 1 - 1e-9
    )

    def shown(pre_terminals: int = most) -> Plot:
        some = sorted(
            (r for r in found if r["pre-terminals"] == pre_terminals), key=lambda r: r["in-terminals"]
        )
        best = some[-1]
        return Plot(
            [row["in-terminals"] for row in some],
            {"F1 of the trees": [round(row["F1"], 3) for row in some],
             "sentences with a tree": [round(row["possible"], 3) for row in some]},
            "in-terminals kept", "share", ylim=(0.0, 1.03), hlines={"F1, all symbols": round(base["F1"], 3)},
            text=f"{pre_terminals} pre-terminals are {best['share of pre-terminals']:.1%} of all uses; with all in-terminals F1 {best['F1']:.3f}",
        )  # fmt: skip

    return shown


def pre_terminals(record: Record) -> list[int]:
    """Numbers of kept pre-terminals in the record."""
    return sorted({row["pre-terminals"] for row in rows(record, "truncation")})
