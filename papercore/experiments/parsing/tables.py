"""The chapter's tables, as Markdown, and the numbers of its prose that are worked out from the record.

page.show_made(tables.predictors, record, caption="...")
page.tell(record, "... {closed:.0%} ...", values=tables.learned)
"""

from __future__ import annotations

from typing import Any

from papercore.lab.claims import reported_value
from papercore.lab.page import NotMeasured, require, rows, table
from papercore.lab.record import Record

MISSING = "paper value not available"
PREDICTORS = {
    "unigram": "word frequencies",
    "window": "two neighbours",
    "mlm_25": "masked model, 25 % of the steps",
    "mlm_50": "masked model, 50 %",
    "mlm_75": "masked model, 75 %",
    "mlm": "masked model, all steps",
}


def predictors(record: Record) -> str:
    """Cross-entropy, gap and mean divergence of every predictor."""
    require(record, "bayes_ce", *(f"{name}_gap" for name in PREDICTORS))
    m = record.metrics
    body: list[list[Any]] = [
        [label, *(m[f"{name}_{what}"] for what in ("ce", "gap", "gap_se", "kl", "gap_minus_kl_se"))]
        for name, label in PREDICTORS.items()
    ]
    body.append(["inside-outside", m["bayes_ce"], 0.0, 0.0, 0.0, 0.0])
    heads = ["predictor", "cross-entropy", "gap", "± s.e.", "mean KL", "s.e. of gap − KL"]
    return table(heads, body, dict.fromkeys(heads[1:], ".3f"))


def beside(record: Record) -> str:
    """What the paper reports beside what this book measured; cells that could not be read say so."""
    require(record, "exact_dims", "moderate_dims", "kept_f1", "whole_f1", "parse_linear_best", "io_f1")
    m = record.metrics

    def paper(place: str, row: str, column: str) -> str:
        return f"{reported_value('parsing', place, row, column):,.0f}"

    exact, moderate = ("intro", "exact construction PTB"), ("abstract", "moderate construction")
    body = [
        ["exact construction, numbers a token", paper(*exact, "embedding dims"), f"{m['exact_dims']:,.0f}"],
        ["exact construction, layers", paper(*exact, "layers"), f"{m['exact_layers']:.0f}"],
        ["exact construction, heads", paper(*exact, "heads per layer"), f"{m['exact_heads']:,.0f}"],
        [
            "moderate construction, numbers a token",
            paper(*moderate, "embedding dims (average)"),
            f"{m['moderate_dims']:,.0f}",
        ],
        [
            "moderate construction, F1",
            f"more than {paper(*moderate, 'PTB F1 lower bound')} % (Penn Treebank)",
            f"{m['kept_f1']:.1%} (20 in-terminals of our grammar; all: {m['whole_f1']:.1%})",
        ],
        ["model's cross-entropy above the optimum", MISSING, f"{m['mlm_gap']:.2f} nat"],
        ["trees by a linear probe, F1", MISSING, f"{m['parse_linear_best']:.1%}"],
        ["trees by inside-outside, F1", MISSING, f"{m['io_f1']:.1%}"],
        ["correlation with marginals, two-layer probe", MISSING, f"{m['marginal_mlp_best']:.2f}"],
        [
            "right-branching trees, F1",
            f"about {reported_value('parsing', 'probing', 'right-branching PTB', 'sentence F1'):g} % (recalled, unconfirmed; Penn Treebank)",
            f"{m['right_f1']:.1%}",
        ],
    ]
    return table(["quantity", "paper", f"this book, {record.scale} scale"], body)


def truncation(record: Record) -> str:
    """F1 and perplexity of some truncated grammars, with all pre-terminals."""
    found = rows(record, "truncation")
    most = max(row["pre-terminals"] for row in found)
    heads = ["in-terminals", "share of uses", "sentences with a tree", "F1", "perplexity"]
    body = [
        [row["in-terminals"], row["share of in-terminals"], row["possible"], row["F1"], row["perplexity"]]
        for row in found
        if row["pre-terminals"] == most
    ]
    return table(heads, body, {heads[1]: ".3f", heads[2]: ".2f", "F1": ".3f", "perplexity": ".1f"})


def merged(record: Record) -> str:
    """F1 of constructions with merged heads."""
    found = rows(record, "merged")
    heads = ["numbers that stand for 20 in-terminals", "numbers of a state", "layers", "F1"]
    body = [[row["rank"], row["numbers of a state"], row["layers"], row["F1"]] for row in found]
    return table(heads, body, {"F1": ".3f"})


def learned(record: Record) -> dict[str, Any]:
    """closed: share of the way from word frequencies to the optimum; window_closed: the same of two neighbours."""
    require(record, "gap_closed", "unigram_gap", "window_gap", "mlm_gap_se")
    m = record.metrics
    return {"closed": m["gap_closed"], "window_closed": 1 - m["window_gap"] / m["unigram_gap"]}


def probed(record: Record) -> dict[str, Any]:
    """Probe numbers in points, and how far the best probe is from the ceiling."""
    names = [f"parse_{kind}_{what}" for kind in ("linear", "mlp") for what in ("gain", "gain_se", "best")]
    require(record, *names, "io_f1", "right_f1", "linear_over_mlp", "linear_over_mlp_se")
    m = record.metrics
    points = {name: 100 * m[name] for name in names}
    return {f"p_{name}": value for name, value in points.items()} | {
        "below_io": 100 * (m["io_f1"] - max(m["parse_linear_best"], m["parse_mlp_best"])),
        "above_right": 100 * (max(m["parse_linear_best"], m["parse_mlp_best"]) - m["right_f1"]),
        "p_over": 100 * m["linear_over_mlp"],
        "p_over_se": 100 * m["linear_over_mlp_se"],
    }


def lost(record: Record) -> dict[str, Any]:
    """What is lost by keeping few symbols, and by merging them, in points."""
    require(record, "whole_f1", "kept_f1")
    found = {row["rank"]: row["F1"] for row in rows(record, "merged")}
    if not found:
        raise NotMeasured("the record holds no construction with merged heads")
    most, least = max(found), min(found)
    m = record.metrics
    return {
        "drop": 100 * (m["whole_f1"] - m["kept_f1"]),
        "kept_share": 100 * m["kept_possible"],
        "merged_most": most,
        "merged_f1": 100 * found[most],
        "merged_to": sorted(found)[-2] if len(found) > 1 else least,
        "merged_to_f1": 100 * found[sorted(found)[-2] if len(found) > 1 else least],
    }


def standard(record: Record) -> str:
    """The treebank table of a `standard` record."""
    heads = ["in-terminals", "pre-terminals", "F1", "sentences with a tree", "perplexity, one mask"]
    body = [
        [row["in-terminals"], row["pre-terminals"], row["F1"], row["possible"], row["perplexity"]]
        for row in rows(record, "treebank")
    ]
    return table(heads, body, {"F1": ".3f", heads[3]: ".2f", heads[4]: ".1f"})


def treebank_merged(record: Record) -> str:
    """F1 on the treebank of constructions with merged heads."""
    heads = ["numbers that stand for 20 in-terminals", "numbers of a state", "layers", "F1"]
    body = [
        [row["rank"], row["numbers of a state"], row["layers"], row["F1"]]
        for row in rows(record, "treebank_merged")
    ]
    return table(heads, body, {"F1": ".3f"})


def treebank(record: Record) -> dict[str, Any]:
    """What few symbols and merged heads cost on the treebank, in points of F1 and per cent of perplexity."""
    names = ("corpus", "sentence", "labelled", "short", "kept", "right", "merged_15", "merged_10")
    require(record, "treebank_drop", "treebank_perplexity_ratio", *(f"treebank_{name}_f1" for name in names))
    m = record.metrics
    return {f"t_{name}": 100 * m[f"treebank_{name}_f1"] for name in names} | {
        "t_drop": 100 * m["treebank_drop"],
        "t_ppl": 100 * (m["treebank_perplexity_ratio"] - 1),
        "t_longest": record.config["standard_longest"],
        "t_truncated": record.config["standard_truncated"],
    }


def models(record: Record) -> str:
    """One line a model of a `standard` or `paper` record."""
    names = [name.removesuffix("_weights") for name in record.metrics if name.endswith("_weights")]
    if not names:
        raise NotMeasured(record.notes.get("models", "the record holds no larger model").rstrip("."))
    m = record.metrics
    heads = ["model", "weights", "gap, nat", "± s.e.", "trees, linear probe", "trees, two-layer"]
    body = [
        [name, int(m[f"{name}_weights"]), m[f"{name}_gap"], m[f"{name}_gap_se"],
         m[f"{name}_parse_linear_best"], m[f"{name}_parse_mlp_best"]]
        for name in names
    ]  # fmt: skip
    return table(heads, body, dict.fromkeys(heads[2:], ".3f"))
