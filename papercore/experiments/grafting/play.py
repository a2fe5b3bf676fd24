"""What the chapter's controls turn: masks of every size, and unions that are grafted into the model here and now."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from papercore.experiments.grafting.encoder import graftable
from papercore.experiments.grafting.finetuning import accuracy, probabilities
from papercore.experiments.grafting.masks import RULES
from papercore.experiments.grafting.multitask import from_entries
from papercore.experiments.grafting.pretraining import pretrained
from papercore.experiments.grafting.world import TASKS, documents
from papercore.lab.page import require, rows
from papercore.lab.plot import Plot
from papercore.lab.record import Record

SHARES = (10, 25, 50, 75, 100)  # percent of a mask that is grafted
SWITCH = ("off", "on")
DOCUMENTS = 300


def union(record: Record) -> Callable[..., Plot]:
    """Accuracy on every task with some of the record's grafts applied to the pre-trained model, which is done at once.

    A share below 100 grafts the entries of each mask that fine-tuning moved most.
    """
    names = list(TASKS)
    require(record, "unions", *(f"graft_{name}_index" for name in names))
    model = pretrained()
    tensors = [name for name, _ in model.named_parameters() if graftable(name)]
    flat = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if graftable(n)]).numpy()
    tests = documents(DOCUMENTS, 10_000 * int(record.config["seed"]) + 9991, domain="A")
    batches = [task.batch(tests) for task in TASKS.values()]
    ends = {row["grafted"]: [row[n] for n in names] for row in rows(record, "unions")}

    @cache
    def scores(chosen: tuple[str, ...], share: int) -> tuple[tuple[float, ...], int]:
        values: dict[int, float] = {}
        for name in chosen:
            index, new = (np.asarray(record.arrays[f"graft_{name}_{what}"]) for what in ("index", "values"))
            order = np.argsort(-np.abs(new - flat[index]), kind="stable")[: max(1, len(index) * share // 100)]
            values |= dict(zip(index[order].tolist(), new[order].tolist(), strict=True))
        if not values:
            return tuple(accuracy(probabilities(model, b), b.targets) for b in batches), 0
        at = np.array(sorted(values))
        graft = from_entries(model, tensors, at, np.array([values[i] for i in at.tolist()], dtype=np.float32))
        with graft.applied(model):
            return tuple(accuracy(probabilities(model, b), b.targets) for b in batches), len(graft)

    def shown(sentiment: str = "on", style: str = "off", topic: str = "off", share: int = 100) -> Plot:
        switches = {"sentiment": sentiment, "style": style, "topic": topic}
        chosen = tuple(name for name in names if switches[name] == "on")
        found, entries = scores(chosen, share if chosen else 100)
        told = ", ".join(
            f"{i} {name} {value:.2f}" for i, (name, value) in enumerate(zip(names, found, strict=True), 1)
        )
        return Plot(
            [1, 2, 3],
            {"grafted": list(found), "pre-trained": ends["none"], "fine-tuned": ends["all weights"]},
            "task: 1 sentiment, 2 style, 3 topic", "test accuracy", xlim=(0.8, 3.2), ylim=(-0.03, 1.05),
            text=f"{entries:,} entries grafted: {told}",
        )  # fmt: skip

    return shown


def sizes(record: Record) -> list[int]:
    """Sizes of masks in the record."""
    require(record, "ks")
    return [int(k) for k in record.arrays["ks"]]


def sparsity(record: Record) -> Callable[..., Plot]:
    """Accuracy of every rule up to k entries, of one task."""
    require(record, "ks", "sentiment_accuracy", "style_accuracy")
    ks = sizes(record)

    def shown(task: str = "sentiment", entries: int = ks[-1]) -> Plot:
        acc = np.asarray(record.arrays[f"{task}_accuracy"]).mean(0)
        agree = np.asarray(record.arrays[f"{task}_agreement"]).mean(0)
        before, after = np.asarray(record.arrays[f"{task}_ends"]).mean(0)
        at = ks.index(entries)
        series = {
            rule: [round(float(v), 3) if i <= at else float("nan") for i, v in enumerate(acc[r])]
            for r, rule in enumerate(RULES)
        }
        gain = (acc[0, at] - before) / (after - before)
        return Plot(
            ks, series, "entries grafted", "test accuracy", xscale="log", ylim=(0.4, 1.03),
            text=f"{entries:,} entries, {8 * entries / 1000:g} kB: learned mask {acc[0, at]:.2f} ({acc[0, at] / after:.0%} of the fine-tuned accuracy, "
            f"{gain:.0%} of its gain, {agree[0, at]:.0%} of its answers)",
        )  # fmt: skip

    return shown
