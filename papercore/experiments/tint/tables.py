"""The chapter's tables, as Markdown, and the numbers of its prose that are worked out from the record.

page.show_made(tables.perplexity, record, caption="...")
page.tell(record, "... {kept_low:.0%} ...", values=tables.kept)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from papercore.experiments.tint.cost import METHODS
from papercore.lab.claims import reported_value
from papercore.lab.page import NotMeasured, require, rows, table
from papercore.lab.record import Record

MISSING = "paper value not available"
RECALLED = " (recalled, unconfirmed)"


def auxiliaries(record: Record) -> str:
    """Cross-entropy of the auxiliary, of counted pairs and of the rules themselves, on known and on new topics."""
    kinds = {"known": "trained topics", "test": "new topics"}
    require(
        record, *(f"{kind}_{name}" for kind in kinds for name in ("model", "pair", "oracle", "model_recall"))
    )
    m = record.metrics
    heads = [
        "documents",
        "auxiliary",
        "pair counts",
        "the rules",
        "behind a name: auxiliary",
        "behind a name: pair counts",
    ]
    body = [
        [label, *(m[f"{kind}_{name}"] for name in ("model", "pair", "oracle", "model_recall", "pair_recall"))]
        for kind, label in kinds.items()
    ]
    return table(heads, body, dict.fromkeys(heads[1:], ".2f"))


def attribution(record: Record) -> str:
    """The error of the whole step, each approximation by itself and all together."""
    heads = [
        "what is approximated",
        "precision",
        "error to full autograd",
        "error, scores held fixed",
        "lowest cosine",
        "loss − dynamic evaluation",
    ]
    body = [list(row.values()) for row in rows(record, "attribution")]
    for row in body:
        # Where the scores are not held fixed, the second error would compare two different gradients.
        if row[0].startswith(("none", "layer norm", "activation")):
            row[3] = None
            row[4] = None
    return table(heads, body, {heads[2]: ".1e", heads[3]: ".1e", heads[4]: ".5f", heads[5]: "+.4f"})


def perplexity(record: Record) -> str:
    """Perplexity of the rest and what is saved, by train fraction."""
    found = rows(record, "perplexity")
    heads = [
        "trained on",
        "no update",
        "TinT",
        "dynamic",
        "TinT saves",
        "95 % interval",
        "documents better",
        "sign test p",
        "gap / dynamic gain",
    ]
    body = [
        [f"{r['fraction']:.0%}", r["vanilla"], r["tint"], r["dynamic"], r["gain"], f"{r['gain low']:.2f} to {r['gain high']:.2f}",
         f"{r['share better']:.0%}", r["p"], f"{r['gap'] / r['dynamic gain']:.1%}"]
        for r in found
    ]  # fmt: skip
    return table(heads, body, dict.fromkeys(heads[1:5], ".2f") | {"sign test p": ".0e"})


def sizes(record: Record) -> str:
    """Sizes by formula beside the paper's recalled table."""
    found = rows(record, "sizes")
    heads = [
        "auxiliary",
        "D_sim",
        "H_sim",
        "prefix tokens",
        "forward",
        "backward",
        "descent",
        "total, billions",
        "paper, recalled",
        "off by",
    ]
    body: list[list[Any]] = []
    for row in found:
        name = row["auxiliary"]
        told = None if name == "GPT-2" else reported_value("tint", "size", name, "total")
        parts = [row[what] / 1e9 for what in ("forward", "backward", "descent", "total")]
        off = (
            None
            if told is None
            else f"{parts[-1] / told - 1:+.1%}" + (" (mismatch)" if name == "OPT-350M" else "")
        )
        body.append([name, row["D_sim"], row["H_sim"], row["prefix tokens"], *parts, told, off])
    return table(heads, body, dict.fromkeys(heads[4:8], ".3f") | {heads[8]: ".1f"})


def flop(record: Record) -> str:
    """Multiply-adds by phase in units of dynamic evaluation's total."""
    found = rows(record, "flops")
    phases = ["forward", "loss", "backward", "descent", "forward_again"]
    base = {row["auxiliary"]: row["total"] for row in found if row["method"] == "dynamic"}
    heads = ["model", "way", "first forward", "loss", "backward", "descent", "second forward", "total"]
    body = [
        [
            row["auxiliary"],
            METHODS[row["method"]],
            *(row[p] / base[row["auxiliary"]] for p in phases),
            row["over dynamic evaluation"],
        ]
        for row in found
    ]
    return table(heads, body, dict.fromkeys(heads[2:], ".2f"))


def beside(record: Record) -> str:
    """What the paper reports beside what this book measured; what is recalled says so."""
    require(
        record,
        "params_opt_125m",
        "gain_least",
        "gain_most",
        "linear_error_fp64",
        "softmax_slope",
        "layernorm_slope",
        "cos_full_least",
    )
    m = record.metrics
    low, high = (reported_value("tint", "lm_summary", "TinT vs auxiliary model on WikiText-103", f"perplexity gain {side}") for side in ("low", "high"))  # fmt: skip
    bound = reported_value("tint", "abstract", "TinT for a 125M auxiliary model", "parameters upper bound")
    told = {
        model: [
            reported_value("tint", "lm", f"{model} {method}", "50%")
            for method in ("vanilla", "dynamic evaluation", "TinT")
        ]
        for model in ("GPT-2", "OPT-125M")
    }
    half = next((row for row in rows(record, "perplexity") if row["fraction"] == 0.5), None)
    if half is None:
        raise NotMeasured("the record holds no train fraction of 50 %")
    points = [
        reported_value(
            "tint", "abstract", "TinT(OPT-125M) vs OPT-125M", f"average absolute improvement {side}"
        )
        for side in ("low", "high")
    ]
    body = [
        ["simulator of OPT-125M, parameters", f"less than {bound:g} billion", f"{m['params_opt_125m'] / 1e9:.2f} billion by formula"],
        ["perplexity saved by one pass", f"{low:g} to {high:g} (WikiText-103; a review's words)", f"{m['gain_least']:.2f} to {m['gain_most']:.2f} (our language)"],
        *(
            [f"50 % trained on: no update, dynamic, TinT ({model})", ", ".join(f"{v:g}" for v in values) + RECALLED,
             f"{half['vanilla']:.2f}, {half['dynamic']:.2f}, {half['tint']:.2f} (our model)"]
            for model, values in told.items()
        ),
        ["accuracy with TinT(OPT-125M), 7 tasks", f"{points[0]:g} to {points[1]:g} % better (abstract)", "not tested at this scale"],
        ["linear module, error", "exact", f"{m['linear_error_fp64']:.0e}"],
        ["softmax as linear attention, error", "O(ε)", f"slope {m['softmax_slope']:.2f}"],
        ["layer norm backwards, error", "O(ε)", f"slope {m['layernorm_slope']:.2f}"],
        ["gradient through values alone", MISSING, f"lowest cosine to full autograd {m['cos_full_least']:.2f}"],
    ]  # fmt: skip
    return table(["quantity", "paper", f"this book, {record.scale} scale"], body)


def kept(record: Record) -> dict[str, Any]:
    """Share of dynamic evaluation's gain that TinT keeps, least and most over fractions; where it is least; the gap there; and the same
    shares in the paper's recalled table for GPT-2."""
    found = rows(record, "perplexity")
    shares = {row["fraction"]: row["gain"] / row["dynamic gain"] for row in found}
    least = min(shares, key=lambda f: shares[f])
    worst = next(row for row in found if row["fraction"] == least)
    recalled = [
        (told["vanilla"] - told["TinT"]) / (told["vanilla"] - told["dynamic evaluation"])
        for told in (
            {
                m: reported_value("tint", "lm", f"GPT-2 {m}", column)
                for m in ("vanilla", "dynamic evaluation", "TinT")
            }
            for column in ("30%", "50%", "70%", "90%")
        )
    ]
    return {
        "recalled_low": min(recalled), "recalled_high": max(recalled),
        "kept_low": min(shares.values()), "kept_high": max(shares.values()), "kept_least_at": least,
        "worst_gap": worst["gap"], "worst_gain": worst["dynamic gain"],
        "splits_within": sum(abs(1 - share) <= 0.1 for share in shares.values()), "splits": len(shares),
    }  # fmt: skip


def errors(record: Record) -> dict[str, Any]:
    """End-to-end errors of the table by a short name."""
    found = [row["error to full autograd"] for row in rows(record, "attribution")]
    fixed = [row["error to detached scores"] for row in rows(record, "attribution")]
    if len(found) < 9:
        raise NotMeasured("the record does not attribute errors to approximations")
    return {
        "e_exact": found[0], "e_norm": found[1], "e_act": found[2], "e_attention": found[3], "e_all": found[4], "e_single": fixed[5],
        "e_official": fixed[6], "e_central": fixed[7],
    }  # fmt: skip


def rounding(record: Record) -> dict[str, Any]:
    """worse: error of layer norm's difference at the released code's step over that at the best one, in single precision."""
    require(record, "layernorm_fp32_at_1e_3", "layernorm_fp32_best")
    return {"worse": record.metrics["layernorm_fp32_at_1e_3"] / record.metrics["layernorm_fp32_best"]}


def timed(record: Record) -> dict[str, Any]:
    """Largest batch of the timing."""
    documents = [row["documents"] for row in rows(record, "times")]
    return {"many": int(np.max(documents))}
