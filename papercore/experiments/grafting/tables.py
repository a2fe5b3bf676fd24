"""The chapter's tables and the numbers of its prose, from a record alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from papercore.experiments.grafting.trust import METHODS
from papercore.lab.claims import reported_value
from papercore.lab.page import require, rows, table
from papercore.lab.record import Record

MISSING = "not available to us"


def unions(record: Record) -> str:
    """Accuracy of every task under every union."""
    found = rows(record, "unions")
    heads = list(found[0]) if found else ["grafted"]
    return table(heads, [list(row.values()) for row in found], dict.fromkeys(heads[1:], ".3f"))


def trust(record: Record) -> str:
    """One line a method: accuracies and calibration errors."""
    heads = ["method", "train", "at home", "away", "ECE at home", "ECE away"]
    body = [
        [row["method"], *(row[k] for k in ("train", "home", "away", "ece", "ece_away"))]
        for row in rows(record, "trust")
    ]
    return table(heads, body, dict.fromkeys(heads[1:], ".3f"))


def beside(record: Record) -> str:
    """What the paper reports beside what this record holds."""
    require(record, "sentiment_share", "style_share", "ece_reduction", "overlap", "forgetting_plain")
    m = record.metrics

    def paper(place: str, row: str, column: str) -> str:
        return f"{reported_value('grafting', place, row, column):g}"

    recalled = "(recalled, unconfirmed)"
    body = [
        [
            "entries that keep 95 % of the accuracy", f"{paper('abstract', 'region size', 'share of parameters')} % of the parameters",
            f"{m['sentiment_share']:.1%} (sentiment), {m['style_share']:.1%} (style)",
        ],
        [
            "calibration error, reduction",
            f"{paper('abstract', 'calibration error reduction', 'low end')} to {paper('abstract', 'calibration error reduction', 'high end')} %",
            f"{m['ece_reduction']:.0%} (median, where fine-tuning over-fits)",
        ],
        ["overlap of two tasks' regions", "almost disjoint", f"{m['overlap']:.2f} (chance {m['overlap_chance']:.2f})"],
        [
            "another domain, graft minus fine-tuned", f"about {paper('ood', 'large shift average', 'graft minus FT accuracy')} points {recalled}",
            f"{100 * m['away_graft_minus_tuned']:+.1f} points",
        ],
        [
            "first task lost by plain fine-tuning on two more",
            f"about {paper('continual', 'QNLI after AG News and SST-2', 'accuracy drop naive sequential FT')} points {recalled}",
            f"{100 * m['forgetting_plain']:.1f} points (mean of two tasks; grafts {100 * m['forgetting_grafts']:.1f})",
        ],
    ]  # fmt: skip
    return table(["quantity", "paper", f"this book, {record.scale} scale"], body)


def ratios(record: Record) -> dict[str, Any]:
    """Numbers of the prose on masks: percentages and kilobytes."""
    require(record, "sentiment_share", "style_share", "learned_minus_movement", "sentiment_bytes")
    m = record.metrics
    return {
        "sentiment_percent": 100 * m["sentiment_share"],
        "style_percent": 100 * m["style_share"],
        "kilobytes": m["sentiment_bytes"] / 1000,
        "over_movement": 100 * m["learned_minus_movement"],
        "over_movement_se": 100 * m["learned_minus_movement_se"],
        "over_first": 100 * m["learned_minus_first_order"],
        "over_first_se": 100 * m["learned_minus_first_order_se"],
    }


def trusted(record: Record) -> dict[str, Any]:
    """Numbers of the prose on calibration and the other domain, in points."""
    require(record, "trust", "away_graft_minus_tuned")
    m, mean = record.metrics, np.asarray(record.arrays["trust"]).mean(0)
    names = [
        "away_graft_minus_tuned", "away_graft_minus_tuned_se", "away_graft_minus_wise", "away_graft_minus_wise_se",
        "away_graft_minus_early", "away_graft_minus_early_se", "ece_graft_minus_temperature", "ece_graft_minus_temperature_se",
        "ece_graft_minus_wise", "ece_graft_minus_wise_se",
    ]  # fmt: skip
    return {f"p_{name}": 100 * m[name] for name in names} | {
        "train_tuned": float(mean[METHODS.index("fine-tuned"), 0]),
        "train_graft": float(mean[METHODS.index("graft, learned"), 0]),
    }


def staged(record: Record) -> dict[str, Any]:
    """kept_share: of all entries, those that the grafts of continual learning hold at the end; points forgotten."""
    require(record, "stages_kept", "graftable", "forgetting_plain")
    m = record.metrics
    return {
        "kept_share": 100 * float(np.asarray(record.arrays["stages_kept"]).sum(1).mean()) / m["graftable"],
        "p_plain": 100 * m["forgetting_plain"],
        "p_plain_se": 100 * m["forgetting_plain_se"],
        "p_grafts": 100 * m["forgetting_grafts"],
        "p_grafts_se": 100 * m["forgetting_grafts_se"],
        "p_cost": 100 * m["newest_cost"],
    }
