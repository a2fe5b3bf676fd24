"""The chapter's tables, as Markdown, and the numbers of its prose that are worked out from the record."""

from __future__ import annotations

from typing import Any

from papercore.lab.claims import reported_value
from papercore.lab.page import NotMeasured, require, rows, table
from papercore.lab.record import Record

POST, IMAGENET = "CIFAR-10 post-local", "ImageNet post-local"


def settings(record: Record) -> str:
    """What the paper ran (from its code) beside what was run here."""
    require(record, "workers", "seeds")
    c = record.config
    value = reported_value

    def row(name: str, column: str, mine: Any) -> list[Any]:
        return [name, *(value("local_sgd", run, "setting", column) for run in (POST, IMAGENET)), mine]

    body = [
        row("workers K", "K", c["workers"]),
        row("images of a worker and step", "B_loc", c["local_batch"]),
        row("learning rate", "lr", c["lr"]),
        row("local steps H", "H", max(c["post_periods"])),
        ["momentum", value("local_sgd", POST, "setting", "momentum"), None, 0],
    ]
    body.append(
        [
            "η H",
            *(
                value("local_sgd", run, "setting", "lr") * value("local_sgd", run, "setting", "H")
                for run in (POST, IMAGENET)
            ),
            c["lr"] * max(c["post_periods"]),
        ]
    )
    heads = ["", "CIFAR-10, ResNet-56", "ImageNet, ResNet-50", "this page, digits"]
    return table(heads, body, dict.fromkeys(heads[1:], "g"))


def communication(record: Record) -> str:
    """Rounds and communication of the paper's runs, derived from its settings, beside those of this book's count."""
    body = []
    for row in rows(record, "communication"):
        arm = f"H={row['H']}"
        stated = [
            reported_value("local_sgd", row["run"], arm, column) for column in ("rounds", "communication %")
        ]
        body.append(
            [
                row["run"],
                row["steps"],
                row["H"],
                int(stated[0]),
                row["rounds"],
                stated[1],
                row["communication %"],
            ]
        )
    heads = [
        "run",
        "steps",
        "H",
        "rounds, by hand",
        "rounds",
        "communication, %, by hand",
        "communication, %",
    ]
    return table(heads, body, dict.fromkeys(heads[5:], ".3f"))


def arms(record: Record, kind: str) -> str:
    """Final values of every arm of one kind of digit runs."""
    found = rows(record, kind)
    body = []
    for row in found:
        gain = None if row["difference"] is None else f"{row['difference']:+.2f} ± {row['se']:.2f}"
        loss = (
            None
            if row["difference of loss"] is None
            else f"{row['difference of loss']:+.3f} ± {row['se of loss']:.3f}"
        )
        body.append(
            [row["arm"], row["test accuracy"], gain, row["wins"], row["train loss"], row["test loss"], loss]
        )
    heads = [
        "",
        "test accuracy, %",
        "difference",
        "seeds won",
        "training loss",
        "test loss",
        "difference of loss",
    ]
    return table(heads, body, {heads[1]: ".2f", heads[4]: ".4f", heads[5]: ".3f"})


def post(record: Record) -> str:
    """`arms` of the post-local runs."""
    return arms(record, "post")


def scratch(record: Record) -> str:
    """`arms` of the runs from a fresh network."""
    return arms(record, "scratch")


def standard(record: Record) -> str:
    """Every arm of a `standard` record."""
    body = []
    names = {"post": "post-local, small η", "large": "post-local, large η", "noise": "label noise"}
    for row in rows(record, "standard"):
        gain = None if row["gain"] is None else f"{row['gain']:+.2f} ± {row['se']:.2f}"
        arm = "SGD" if row["H"] == 1 else f"H = {row['H']}"
        body.append(
            [names[row["part"]], arm, row["test accuracy"], gain, row["train loss"], row["top"], row["trace"]]
        )
    if not body:
        raise NotMeasured("the record holds no arm of the standard scale")
    heads = ["part", "arm", "test accuracy, %", "gain", "training loss", "largest eigenvalue", "trace"]
    return table(heads, body, {heads[2]: ".2f", heads[4]: ".3f", heads[5]: ".1f", heads[6]: ".0f"})


def longest(record: Record) -> dict[str, Any]:
    """The arm with the longest rounds, for prose: `period`, its gains and losses, and the same right after the switch."""
    require(record, "post_start_accuracy", "post_communication")
    h = max(record.config["post_periods"])
    m = record.metrics
    names = ("gain", "gain_se", "loss_change", "loss_change_se", "accuracy", "accuracy_160", "train_loss", "train_loss_160", "wins",
             "top_ratio", "trace_ratio")  # fmt: skip
    require(record, *(f"post_h{h}_{name}" for name in names))
    return {"period": h} | {f"long_{name}": m[f"post_h{h}_{name}"] for name in names}


def controls(record: Record) -> dict[str, Any]:
    """The longest arm from a fresh network, early and late, and the two controls."""
    h = max(record.config.get("periods", [0]))
    names = ("gain", "gain_se", "gain_early", "gain_early_se", "train_loss")
    require(record, *(f"scratch_h{h}_{name}" for name in names), "clean_h16_gain", "fresh_h16_gain")
    return {"fresh_period": h} | {f"new_{name}": record.metrics[f"scratch_h{h}_{name}"] for name in names}
