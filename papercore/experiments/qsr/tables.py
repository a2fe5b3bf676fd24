"""The chapter's tables, as Markdown, and the numbers of its prose that are worked out from tables of the record.

page.show_made(tables.communication, record, caption="...")
page.tell(record, "... {wins:.0f} of {seeds:.0f} ...", values=tables.digits_numbers)
"""

from __future__ import annotations

from typing import Any

from papercore.lab.claims import reported
from papercore.lab.page import NotMeasured, require, rows, table
from papercore.lab.record import Record


def communication(record: Record) -> str:
    """The eight rows at B = 4,096: share as recalled, share recomputed, and how strong a test the agreement is."""
    heads = ["model", "schedule", "averages", "recalled, %", "recomputed, %", "agreement is"]
    body = [
        [row["model"], row["schedule"], row["rounds"], row["reported"], row["share"], row["strength"]]
        for row in rows(record, "communication")
    ]
    return table(heads, body, {"recalled, %": "g", "recomputed, %": ".3f", "averages": ",d"})


def neighbours(record: Record) -> str:
    """Settings next to those of the table, which do not give the recalled number."""
    heads = ["model", "shortest round", "α", "recomputed, %", "recalled for this row, %"]
    body = [
        [row["model"], row["h_base"], row["alpha"], row["share"], row["reported"]]
        for row in rows(record, "neighbours")
    ]
    return table(heads, body, {"recomputed, %": ".2f", "recalled for this row, %": "g"})


def predictions(record: Record) -> str:
    """Runs whose published volume we could not recover: what this book says they must be."""
    heads = ["run", "schedule", "averages", "share, %"]
    body = [[row["run"], row["schedule"], row["rounds"], row["share"]] for row in rows(record, "predictions")]
    return table(heads, body, {"share, %": ".2f", "averages": ",d"})


def toy(record: Record) -> str:
    """Final sharpness of ten schedules, simulated beside exact theory."""
    heads = ["schedule", "share, %", "simulated", "± s.e.", "theory"]
    body = [
        [row["schedule"], row["share"], row["simulated"], row["se"], row["theory"]]
        for row in rows(record, "toy")
    ]
    return table(heads, body, {"share, %": ".2f", "simulated": ".4f", "± s.e.": ".4f", "theory": ".4f"})


def digits(record: Record, block: str = "main") -> str:
    """One block of the digits experiment; differences are from H = 16, paired over seeds."""
    heads = ["method", "share, %", "accuracy, %", "minus H = 16", "± s.e.", "wins", "training loss", "test loss", "lost"]  # fmt: skip
    found = rows(record, f"digits_{block}")
    body = [
        [
            row["method"], row["share"], row["accuracy"], row["difference"], row["difference se"],
            None if row["wins"] is None else f"{row['wins']} of {row['seeds']}",
            row["train loss"], row["test loss"], row["lost"],
        ]
        for row in found
    ]  # fmt: skip
    forms = {"share, %": ".1f", "accuracy, %": ".2f", "minus H = 16": "+.2f", "± s.e.": ".2f", "training loss": ".4f", "test loss": ".3f"}  # fmt: skip
    if not any(row["lost"] for row in found):
        heads, body = heads[:-1], [row[:-1] for row in body]
    return table(heads, body, forms)


def control(record: Record) -> str:
    """The short control."""
    return digits(record, "control")


def hot(record: Record) -> str:
    """The runs at a learning rate that is too high for QSR."""
    return digits(record, "hot")


def accuracies(record: Record) -> str:
    """The paper's accuracies and hours with what is known of each: seen, quoted by others, or recalled."""
    words = {
        "paper": "the paper's abstract",
        "third-party": "quoted from the paper by others",
        "memory": "recalled, **not checked**",
    }
    body: list[list[Any]] = []
    for row in reported("qsr"):
        if row["confidence"] in words and "communication" not in row["column"]:
            name = row["row"] if row["table"] in ("abstract", "B=4096") else f"{row['row']} ({row['table']})"
            body.append([name, row["column"], float(row["value"]), row["unit"], words[row["confidence"]]])
    return table(["run", "quantity", "reported", "unit", "how we know"], body, {"reported": "g"})


def standard(record: Record) -> str:
    """Every run of a `standard` record; a quantity that its form does not measure has no column."""
    if "standard_grid" not in record.tables:
        raise NotMeasured("the record holds no grid of the standard scale")
    found = rows(record, "standard_grid")
    runs = {"clean": "clean labels", "noisy": "labels redrawn", "short": "shortest", "middle": "shorter"}
    columns = {
        "share, %": ("share", ".2f"),
        "accuracy, %": ("accuracy", ".2f"),
        "± s.e.": ("se", ".2f"),
        "training loss": ("train loss", ".3f"),
        "trace of the Hessian": ("trace", ".3g"),
    }
    shown = {head: pair for head, pair in columns.items() if any(row[pair[0]] is not None for row in found)}
    body = [
        [runs[row["labels"]], row["schedule"], *(row[name] for name, _ in shown.values())] for row in found
    ]
    return table(["runs", "schedule", *shown], body, {head: form for head, (_, form) in shown.items()})


def digits_numbers(record: Record) -> dict[str, Any]:
    """Numbers of the prose on digits. needed: seeds at which QSR - H = 16 would be 2.5 standard errors, if it stays as it is."""
    require(record, "digits_main", "main_qsr_minus_h16", "main_qsr_minus_h16_se")
    m = record.metrics
    found = {row["method"]: row for row in rows(record, "digits_main")}
    gap, se, seeds = m["main_qsr_minus_h16"], m["main_qsr_minus_h16_se"], m["main_seeds"]
    needed = seeds * (2.5 * se / gap) ** 2 if gap else float("inf")
    beyond = abs(gap) > 2 * se
    return {
        "qsr_wins": found["QSR"]["wins"],
        "needed": f"about {needed:,.0f}" if needed < 1e5 else "an absurd number of",
        "away": abs(gap) / se if se else float("inf"),
        "verdict": "It is more than two standard errors from zero, yet see below what it may mean." if beyond
        else "That is within two standard errors of zero: **no evidence that QSR beats constant $H$ here**, and none that it does not.",
        "peak": 100 * float(record.arrays["digits_main_accuracy_dp"].mean(axis=0).max()),
    }  # fmt: skip


def hot_numbers(record: Record) -> dict[str, Any]:
    """Numbers of the prose on the higher learning rate: runs that end as NaN, and runs that end below one half."""
    require(record, "digits_hot", *(f"digits_hot_accuracy_{name}" for name in ("dp", "h16", "qsr")))
    found = {row["method"]: row for row in rows(record, "digits_hot")}
    said = []
    for name, method in (("qsr", "QSR"), ("h16", "H = 16"), ("dp", "data parallel")):
        end = record.arrays[f"digits_hot_accuracy_{name}"][:, -1]
        poor = int((end < 0.5).sum())
        said.append(f"under {method} {found[method]['lost']} end as NaN and {poor} below 50 %")
    return {"said": "; ".join(said), "hot_seeds": len(end), "hot_lr": record.config["hot_lr"]}
