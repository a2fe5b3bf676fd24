"""The chapter's tables, as Markdown, and the numbers of its prose that are worked out from tables of the record.

page.show_made(tables.drift, record, caption="...")
page.tell(record, "... {hours_small:.0f} times ...", values=tables.costs)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from papercore.experiments.mezo.arms import ARMS
from papercore.experiments.mezo.language import TOPICS
from papercore.experiments.mezo.theory import DRIFT_COLUMNS
from papercore.lab.claims import reported_value
from papercore.lab.page import NotMeasured, require, rows, table
from papercore.lab.record import Record

# Row here -> rows of Tables 1 and 18; None: the paper has no such row.
BESIDE: dict[str, tuple[str, str | None]] = {
    "zero-shot": ("Zero-shot", "Zero-shot"),
    "in-context": ("ICL", None),
    "linear probe": ("LP", "LP"),
    "fine-tuning (Adam)": ("FT (Adam)", "FT"),
    "MeZO full": ("MeZO", "MeZO"),
    "MeZO lora": ("MeZO (LoRA)", "MeZO (LoRA)"),
    "MeZO prefix": ("MeZO (prefix)", "MeZO (prefix)"),
}
STANDARD_ARMS = {
    "lp": "linear probe, mean state",
    "lp_word": "linear probe, first word",
    "adam": "Adam, backpropagation",
    "full": "MeZO, all weights",
    "norms_biases": "MeZO, norms and biases",
    "lora": "MeZO, LoRA",
    "no_prompt": "MeZO, no prompt",
}


def beside(record: Record) -> str:
    """Accuracy of each method as reported on two tasks of the paper and as measured here at the largest k, in percent."""
    found = rows(record, "few_shot")
    k = max(row["k"] for row in found)
    mine = {row["method"]: row for row in found if row["k"] == k}
    body: list[list[Any]] = []
    for name, (large, small) in BESIDE.items():
        if name not in mine:
            continue
        opt = reported_value("mezo", "Table 1 (OPT-13B)", large, "SST-2")
        own = "Table 18 (RoBERTa-large)" if small == "Zero-shot" else "Table 18 (RoBERTa-large) k=16"
        roberta = None if small is None else reported_value("mezo", own, small, "TREC")
        body.append(
            [
                name.replace("full", "all weights").replace("lora", "LoRA"),
                opt,
                roberta,
                100 * mine[name]["mean"],
                100 * mine[name]["std"],
            ]
        )
    heads = ["method", "OPT-13B, SST-2", "RoBERTa-large, TREC, k = 16", f"this book, k = {k}", "± s.d."]
    return table(heads, body, dict.fromkeys(heads[1:], ".1f"))


def black_box(record: Record) -> str:
    """Table 21: MeZO beside BBTv2, a method that also needs no gradient; both as reported, for k = 16."""
    body = []
    for task in ("SST-2", "SNLI", "RTE"):
        theirs, mezo = (
            reported_value("mezo", name, row, task)
            for name, row in (("Table 21 (BBTv2, k=16)", "BBTv2"), ("Table 18 (RoBERTa-large) k=16", "MeZO"))
        )
        body.append([task, theirs, mezo, mezo - theirs])
    heads = ["task", "BBTv2", "MeZO", "difference"]
    return table(heads, body, {"BBTv2": ".1f", "MeZO": ".1f", "difference": "+.1f"})


def drift(record: Record) -> str:
    """How far each way of stepping ends from exact arithmetic, over the distance travelled, in three precisions."""
    found = rows(record, "drift")
    heads = [
        "weights",
        "official order",
        "updates alone",
        "fused, this book",
        "exact mode",
        "replay against run",
    ]
    return table(
        heads,
        [[row[name] for name in DRIFT_COLUMNS] for row in found],
        dict.fromkeys(heads[1:5], ".2f") | {heads[5]: "g"},
    )


def costs(record: Record) -> dict[str, float]:
    """GPU-hours of MeZO over those of fine-tuning by size, from Table 23.

    hours_66b_strict: fine-tuning at its effective batch of 20 needs 250 steps, not 625, for five passes over 1,000 examples.
    """
    found = {row["size"]: row for row in rows(record, "time")}
    large = found["66B"]
    strict = large["FT s/step"] * large["GPUs of FT"] * (5 * 1000 / 20) / 3600
    return {f"hours_{size.lower().replace('.', '_')}": row["ratio"] for size, row in found.items()} | {
        "hours_66b_strict": large["MeZO GPU-hours"] / strict
    }


def standard(record: Record) -> str:
    """Accuracies of a `standard` record: one line a method."""
    require(record, "standard_zero_shot", "standard_test_questions")
    m = record.metrics
    body: list[list[Any]] = [["zero-shot", None, 100 * m["standard_zero_shot"], None]]
    for arm, label in STANDARD_ARMS.items():
        if f"standard_{arm}_mean" in m:
            spread = m.get(f"standard_{arm}_std")
            weights = m.get(f"standard_{arm}_parameters")
            body.append(
                [
                    label,
                    None if weights is None else int(weights),
                    100 * m[f"standard_{arm}_mean"],
                    None if spread is None else 100 * spread,
                ]
            )
    if len(body) == 1:
        raise NotMeasured("the record holds no arm of the standard scale")
    heads = ["method", "trained weights", "test accuracy, %", "± s.d."]
    return table(heads, body, dict.fromkeys(heads[2:], ".1f"))


def gaps(record: Record) -> dict[str, float]:
    """How far the run without a prompt is behind, in points: `lost` after `passes` forward passes, `lost_end` after `passes_end`.

    bare: accuracy without pretraining after `passes_end`; that arm goes on for `times` times the budget.
    """
    require(
        record,
        "full_halfway",
        "no_prompt_halfway",
        "full_mean",
        "no_prompt_mean",
        "eval_at",
        "curve_no_pretraining",
    )
    m, at = record.metrics, record.arrays["eval_at"]
    return {
        "lost": 100 * (m["full_halfway"] - m["no_prompt_halfway"]),
        "lost_end": 100 * (m["full_mean"] - m["no_prompt_mean"]),
        "passes": 2 * int(at[-2]),
        "passes_end": 2 * int(at[-1]),
        "chance": 1 / TOPICS,
        "bare": float(np.mean(record.arrays["curve_no_pretraining"], axis=0)[-1]),
        "times": ARMS["no_pretraining"].budget,
    }


def speeds(record: Record) -> dict[str, float]:
    """Largest over smallest number of trained weights, and of steps to half a nat, over four choices of what is trained."""
    names = ("full", "lora", "prefix", "norms_biases")
    require(record, *(f"{name}_{what}" for name in names for what in ("trained", "steps_to_half_nat")))
    sizes, steps = (
        [record.metrics[f"{name}_{what}"] for name in names] for what in ("trained", "steps_to_half_nat")
    )
    return {"sizes": max(sizes) / min(sizes), "steps": max(steps) / min(steps)}


def limits(record: Record) -> dict[str, float]:
    """The numbers of the chapter's honest notes. near: how many of `arms` MeZO arms end within a point of the best possible."""
    arms = [name for name in ARMS if f"{name}_mean" in record.metrics]
    require(record, "bayes")
    near = sum(record.metrics[f"{name}_mean"] >= record.metrics["bayes"] - 0.01 for name in arms)
    return costs(record) | gaps(record) | {"near": near, "arms": len(arms)}


def differences(record: Record) -> dict[str, Any]:
    """MeZO minus each reference method in points of accuracy, and the p values of the paired tests as text."""
    names = ("zero_shot", "icl", "lp", "ft")
    require(record, *(f"mezo_minus_{name}{what}" for name in names for what in ("", "_p")))
    points = {f"over_{name}": 100 * record.metrics[f"mezo_minus_{name}"] for name in names}
    return points | {f"p_{name}": p_text(record.metrics[f"mezo_minus_{name}_p"]) for name in names}


def p_text(p: float) -> str:
    """A p value as a reader wants it: beyond one in a million only the bound.

    >>> p_text(0.034), p_text(3e-17)
    ('p = 0.03', 'p < 1e-6')
    """
    return "p < 1e-6" if p < 1e-6 else f"p = {p:.1g}"


def one_point(record: Record) -> dict[str, float]:
    """How far the two-point estimate is ahead of the one-point estimate along the curve, and the standard error, in points."""
    require(record, "full_minus_one_point", "full_minus_one_point_se")
    return {
        "ahead": 100 * record.metrics["full_minus_one_point"],
        "ahead_se": 100 * record.metrics["full_minus_one_point_se"],
    }
