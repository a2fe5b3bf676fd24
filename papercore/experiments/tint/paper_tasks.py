"""The paper's seven classification sets: where each lies on the hub or on disk, and its template.

On disk a set is a folder `$PAPERCORE_DATA/<name>/` with `train` and `test` (SST-2: `validation`) as parquet or JSON lines, columns
as below; without it the `datasets` library fetches it from the hub. The released code reads MPQA from a file of its authors; no hub
id is known for it, so it comes from a folder alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from papercore.experiments.tint.prompting import Template
from papercore.lab import data

SENTIMENT = Template("Review: ", "\nSentiment:", (" Negative", " Positive"))


@dataclass(frozen=True)
class Task:
    """One set. title: the column of the paper's table; hub, config: where it lies; text, label: columns; test: its test split.

    first: rows that are read from the hub, of a set too large for memory whose classes come mixed (the released code has a shortened
    copy of it); None: all.
    """

    name: str
    title: str
    hub: str
    template: Template
    config: str | None = None
    text: str = "text"
    label: str = "label"
    test: str = "test"
    first: int | None = None


TASKS = {
    task.name: task
    for task in (
        Task("subj", "Subj", "SetFit/subj", Template("", " This is", (" objective", " subjective"))),
        Task(
            "agnews", "AGNews", "fancyzhx/ag_news",
            Template(
                "Article: ", "\nWhat is the article about? Answer:", (" World", " Sports", " Business", " Technology"), " Answer:"
            ),
        ),
        Task("sst2", "SST2", "stanfordnlp/sst2", SENTIMENT, text="sentence", test="validation"),
        Task("cr", "CR", "SetFit/CR", SENTIMENT),
        Task("mr", "MR", "cornell-movie-review-data/rotten_tomatoes", SENTIMENT),
        Task("mpqa", "MPQA", "", SENTIMENT),
        Task("amazon", "Amazon", "fancyzhx/amazon_polarity", SENTIMENT, text="content", first=50_000),
    )
}  # fmt: skip


def examples(task: Task, split: str) -> tuple[list[str], NDArray[np.int64]]:
    """Texts and labels of one split.

    Raises:
        papercore.lab.data.Missing: the set is nowhere.
        ValueError: a column is missing, or a label has no word.
    """
    try:
        place = data.folder(task.name)
    except data.Missing as missing:
        if not task.hub:
            raise data.Missing(
                f"the data set {task.name!r}", missing.tried,
                f"put {{train,{task.test}}}.jsonl with the columns {task.text} and {task.label} under $PAPERCORE_DATA/{task.name}/",
            ) from None  # fmt: skip
        part = split if task.first is None else f"{split}[:{task.first}]"
        rows = data.rows(task.hub, part, config=task.config)
    else:
        rows = data.rows(task.name, split, path=place)
    if not rows or not {task.text, task.label} <= set(rows[0]):
        columns = sorted(rows[0]) if rows else []
        raise ValueError(
            f"{task.name}, split {split!r}: the columns are {columns}; needed: {task.text}, {task.label}."
        )
    labels = np.array([int(row[task.label]) for row in rows], dtype=np.int64)
    words = task.template.words
    if labels.min() < 0 or labels.max() >= len(words):
        raise ValueError(
            f"{task.name}, split {split!r}: labels from {labels.min()} to {labels.max()}, but there are {len(words)} label words."
        )
    return [str(row[task.text]).strip() for row in rows], labels


def longest_text(template: Template, encode: Sequence[int], shots: int, positions: int) -> int:
    """Tokens of a text so that `shots` demonstrations and a query fit. encode: tokens around one text, label and blank line.

    Raises:
        ValueError: not one token fits.
    """
    room = positions // (shots + 1) - len(encode)
    if room < 1:
        raise ValueError(
            f"{shots} demonstrations leave {positions // (shots + 1)} tokens for each of the model's {positions} positions; the template "
            f"of {template.words} alone takes {len(encode)}: take fewer."
        )
    return room
