"""The paper's data sets: where each lies on the hub or on disk, and the samples that the paper drew from it (section 3).

RoBERTa: k examples of each class for training and k others for validation, drawn from the training split with one of five seeds;
at most 1,000 test examples. OPT: 1,000 training, 500 validation (CB, COPA: 100) and 1,000 test examples; 32 demonstrations for
in-context learning, drawn anew for every test example.

On disk a set is a folder `$PAPERCORE_DATA/<task>/` with `train.parquet` and `validation.parquet` or `test.parquet` in the hub's
columns (pyarrow reads it); without it the `datasets` library fetches it from the hub.

Glossary
    train, test   the hub's split that training examples, and test examples, come from; the hub's own test labels are hidden for
                  GLUE and SuperGLUE, so the validation split is the test set there, as in the paper
    sample        the training, validation and test rows of one seed

Known consequences, kept: WSC has 554 training rows, so 500 validation examples leave 54 to train on; the class ABBR of TREC has
86, so k = 512 leaves no validation example of it.

The draws are numpy's RandomState(seed), the generator of the released scripts. Where the hub keeps the order of the original
files they choose the same examples; that was not checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from papercore.experiments.mezo.prompts import CAUSAL, MASKED, CausalPrompt, MaskedPrompt, Row, label_of
from papercore.lab import data
from papercore.lab.config import checked_choice

# Fixed by the released scripts, whatever the seed of the training examples: every seed is tested on the same rows.
TEST_SEED_ROBERTA = 42
TEST_SEED_OPT = 0
DEMONSTRATION_SEED = 0


@dataclass(frozen=True)
class Task:
    """One data set.

    Fields:
        name: short name; title: the column of the paper's tables.
        hub: the hub's id; config: its part there.
        label: column of the label number.
        test: split that test examples are drawn from.
        validation: OPT's number of validation examples.
        metric: "accuracy" or "f1".
    """

    name: str
    title: str
    hub: str
    config: str | None = None
    label: str = "label"
    test: str = "validation"
    validation: int = 500
    metric: str = "accuracy"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst2", "SST-2", "nyu-mll/glue", "sst2"),
        Task("sst5", "SST-5", "SetFit/sst5", test="test"),
        Task("trec", "TREC", "CogComp/trec", label="coarse_label", test="test"),
        Task("snli", "SNLI", "stanfordnlp/snli"),
        Task("mnli", "MNLI", "nyu-mll/glue", "mnli", test="validation_matched"),
        # The same rows as GLUE's RTE, under other column names.
        Task("rte", "RTE", "aps/super_glue", "rte"),
        Task("cb", "CB", "aps/super_glue", "cb", validation=100),
        Task("boolq", "BoolQ", "aps/super_glue", "boolq"),
        Task("wsc", "WSC", "aps/super_glue", "wsc.fixed"),
        Task("wic", "WIC", "aps/super_glue", "wic"),
        Task("multirc", "MultiRC", "aps/super_glue", "multirc"),
        Task("copa", "COPA", "aps/super_glue", "copa", validation=100),
        Task("record", "ReCoRD", "aps/super_glue", "record"),
        Task("squad", "SQuAD", "rajpurkar/squad", metric="f1"),
        Task("drop", "DROP", "ucinlp/drop", metric="f1"),
    )
}

# The order of the columns of Tables 1 and 18.
OF_FAMILY = {
    "masked": ("sst2", "sst5", "snli", "mnli", "rte", "trec"),
    "causal": ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop"),
}


@dataclass(frozen=True)
class Sample:
    """The rows of one seed; demonstrations are drawn from `pool`, the whole training split."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    pool: list[Row]


def task_named(name: str, family: str) -> Task:
    """The task of this name; ValueError when the paper does not run it on this family of models."""
    return TASKS[checked_choice(f"task of the {family} models", name, OF_FAMILY[family])]


def prompt_of(task: Task, family: str) -> MaskedPrompt | CausalPrompt:
    """The template and label words of a task for one family of models."""
    return MASKED[task.name] if family == "masked" else CAUSAL[task.name]


def load_rows(task: Task, split: str) -> list[Row]:
    """All rows of one split: from `$PAPERCORE_DATA/<task>`, else from the hub's cache or the hub.

    Raises:
        Missing: the set is nowhere; the message says where it was looked for and how to get it.
        ValueError: the folder is there without this split.
    """
    try:
        place = data.folder(task.name)
    except data.Missing as missing:
        return _from_hub(task, split, missing)
    # MNLI's two validation sets share a folder name with everyone else's one.
    names = [split, split.partition("_")[0]]
    for name in dict.fromkeys(names):
        if any(place.rglob(f"{name}*")):
            return list(data.rows(task.name, name, path=place))
    return list(data.rows(task.name, split, path=place))


def k_shot(labels: Sequence[int], k: int, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers of k training and k validation examples of each class, after one shuffle with `seed`.

    A class with fewer than 2k rows gives its first k to training and the rest to validation.

    >>> k_shot([0, 1, 0, 1, 0, 1], k=1, seed=13)
    ([1, 4], [3, 0])
    """
    if k < 1:
        raise ValueError(f"k = {k} examples of each class: expected at least 1.")
    order = list(range(len(labels)))
    np.random.RandomState(seed).shuffle(order)
    by_label: dict[int, list[int]] = {}
    for index in order:
        by_label.setdefault(labels[index], []).append(index)
    train = [i for rows in by_label.values() for i in rows[:k]]
    return train, [i for rows in by_label.values() for i in rows[k : 2 * k]]


def few_shot_sample(task: Task, *, k: int, seed: int, test_examples: int = 1000) -> Sample:
    """The sample of a RoBERTa run. Rows of SNLI on which annotators disagree (label -1) are left out.

    Raises:
        ValueError: a label outside the label words, a class without any example, or none left for validation.
    """
    words = MASKED[task.name].words
    pool = _labelled(task, "train")
    labels = [label_of(row, task.label, words) for row in pool]
    if absent := [words[i] for i in range(len(words)) if i not in set(labels)]:
        raise ValueError(
            f"{task.name}: the training split has no example of {', '.join(absent)}; every label needs at least one."
        )
    train, validation = k_shot(labels, k, seed)
    if not validation:
        raise ValueError(
            f"{task.name}: no label has more than k = {k} training rows, so none is left for validation: lower paper_shots."
        )
    test = _labelled(task, task.test)
    if len(test) > test_examples:
        order = list(range(len(test)))
        np.random.RandomState(TEST_SEED_ROBERTA).shuffle(order)
        test = [test[i] for i in order[:test_examples]]
    return Sample([pool[i] for i in train], [pool[i] for i in validation], test, pool)


def large_sample(
    task: Task,
    *,
    seed: int,
    train_examples: int = 1000,
    validation_examples: int = 500,
    test_examples: int = 1000,
) -> Sample:
    """The sample of an OPT run: one permutation of the training split, its tail of validation examples first reserved.

    Raises:
        ValueError: the training split is too small to leave a training example.
    """
    pool = load_rows(task, "train")
    validation_examples = min(validation_examples, task.validation)
    drawn = (
        np.random.RandomState(seed).permutation(len(pool))[: train_examples + validation_examples].tolist()
    )
    if len(drawn) <= validation_examples:
        raise ValueError(
            f"{task.name}: {len(pool)} training rows leave none beside {validation_examples} validation examples: "
            f"ask for fewer (paper_validation)."
        )
    cut = len(drawn) - validation_examples
    test = load_rows(task, task.test)
    chosen = np.random.RandomState(TEST_SEED_OPT).permutation(len(test))[:test_examples].tolist()
    return Sample(
        [pool[i] for i in drawn[:cut]], [pool[i] for i in drawn[cut:]], [test[i] for i in chosen], pool
    )


def demonstrations(pool: Sequence[Row], tests: int, *, count: int = 32) -> list[list[Row]]:
    """For each of `tests` test examples its own `count` demonstrations from the training split, without replacement.

    Raises:
        ValueError: an empty training split.
    """
    if not pool:
        raise ValueError(
            "in-context learning needs a training split with at least one row to draw demonstrations from."
        )
    seeds = np.random.RandomState(DEMONSTRATION_SEED).randint(0, 10_000, tests)
    return [[pool[i] for i in np.random.RandomState(seed).permutation(len(pool))[:count]] for seed in seeds]


def _labelled(task: Task, split: str) -> list[Row]:
    rows = load_rows(task, split)
    return [row for row in rows if row.get(task.label) != -1] if task.name == "snli" else rows


def _from_hub(task: Task, split: str, missing: data.Missing) -> list[Row]:
    try:
        return list(data.rows(task.hub, split, config=task.config))
    except data.Missing as error:
        tried = "\n".join(error.tried)
        if "scripts are no longer supported" not in tried:
            raise data.Missing(
                f"the data set {task.name!r}", [*missing.tried, *error.tried], _command(task)
            ) from error
    return _from_parquet_branch(task, split, missing)


def _from_parquet_branch(task: Task, split: str, missing: data.Missing) -> list[Row]:
    """A set whose repository still holds a loading script: the hub keeps its own parquet copy on a branch."""
    from datasets import load_dataset

    branch = "refs/convert/parquet"
    try:
        loaded: Any = load_dataset(task.hub, task.config, split=split, revision=branch)
    except Exception as error:  # offline or gone: the library has one class for each
        tried = [*missing.tried, f"the hub's {task.hub!r} at {branch}: {type(error).__name__}: {error}"]
        raise data.Missing(f"the data set {task.name!r}", tried, _command(task, branch)) from error
    return [dict(row) for row in loaded]


def _command(task: Task, branch: str | None = None) -> str:
    config = f", {task.config!r}" if task.config else ""
    revision = f", revision={branch!r}" if branch else ""
    load = f"from datasets import load_dataset; load_dataset({task.hub!r}{config}{revision})"
    return f'pip install datasets && python -c "{load}"  (or put {{train,{task.test}}}.parquet under $PAPERCORE_DATA/{task.name}/)'
