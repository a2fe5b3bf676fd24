"""Samples as the paper drew them, data from folders and from the hub, and errors as text."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from papercore.experiments.mezo.prompts import CAUSAL, Question
from papercore.experiments.mezo.tasks import (
    TASKS,
    demonstrations,
    few_shot_sample,
    k_shot,
    large_sample,
    load_rows,
    task_named,
)
from papercore.lab.data import Missing
from tests.experiments.mezo_tiny_hub import ROWS, rows_of, write_parquet


def test_k_shot_is_balanced_disjoint_and_numpys_shuffle():
    labels = [i % 3 for i in range(90)]
    train, validation = k_shot(labels, 4, seed=13)
    assert (
        sorted(labels[i] for i in train)
        == sorted(labels[i] for i in validation)
        == [0] * 4 + [1] * 4 + [2] * 4
    )
    assert not set(train) & set(validation)
    order = list(range(90))
    np.random.RandomState(13).shuffle(order)
    assert [i for i in train if labels[i] == 0] == [i for i in order if labels[i] == 0][:4]
    assert k_shot(labels, 4, seed=21) != (train, validation)
    # A rare class gives what it has: ABBR of TREC at k = 512.
    train, validation = k_shot([0] * 10 + [1], 3, seed=0)
    assert sum(i == 10 for i in train) == 1 and 10 not in validation
    with pytest.raises(ValueError, match="k = 0 examples"):
        k_shot(labels, 0, seed=1)


def test_few_shot_sample_reads_parquet_and_drops_disputed_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    write_parquet(tmp_path / "snli", train=rows_of("snli", 60), validation=rows_of("snli", 40))
    sample = few_shot_sample(TASKS["snli"], k=2, seed=42, test_examples=10)
    assert [len(sample.train), len(sample.validation), len(sample.test), len(sample.pool)] == [6, 6, 10, 45]
    assert sorted(row["label"] for row in sample.train) == [0, 0, 1, 1, 2, 2]
    again = few_shot_sample(TASKS["snli"], k=2, seed=87, test_examples=10)
    assert again.test == sample.test and again.train != sample.train


def test_a_label_outside_the_map_is_refused_in_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    write_parquet(
        tmp_path / "sst2",
        train=[*rows_of("sst2", 6), {"idx": 9, "sentence": "x", "label": 7}],
        validation=rows_of("sst2", 4),
    )
    with pytest.raises(ValueError, match="label 7 in column 'label'"):
        few_shot_sample(TASKS["sst2"], k=1, seed=13)
    write_parquet(
        tmp_path / "sst2",
        train=[row for row in rows_of("sst2", 6) if row["label"]],
        validation=rows_of("sst2", 4),
    )
    with pytest.raises(ValueError, match="no example of terrible"):
        few_shot_sample(TASKS["sst2"], k=1, seed=13)


def test_large_sample_is_one_permutation_with_validation_at_its_tail(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    write_parquet(tmp_path / "rte", train=rows_of("rte", 50), validation=rows_of("rte", 30))
    sample = large_sample(TASKS["rte"], seed=0, train_examples=20, validation_examples=10, test_examples=12)
    order = np.random.RandomState(0).permutation(50)
    assert [row["idx"] for row in [*sample.train, *sample.validation]] == order[:30].tolist()
    assert [len(sample.train), len(sample.validation), len(sample.test)] == [20, 10, 12]
    # 50 rows, 40 of them held out: what happens to WSC.
    assert len(large_sample(TASKS["rte"], seed=0, validation_examples=40).train) == 10
    with pytest.raises(ValueError, match="50 training rows leave none beside 50 validation examples"):
        large_sample(TASKS["rte"], seed=0, validation_examples=50)
    write_parquet(tmp_path / "cb", train=rows_of("cb", 150), validation=rows_of("cb", 5))
    assert len(large_sample(TASKS["cb"], seed=0).validation) == 100


def test_each_test_example_has_its_own_demonstrations():
    pool = rows_of("sst2", 40)
    drawn = demonstrations(pool, 5, count=8)
    assert [len(d) for d in drawn] == [8] * 5 and len({row["idx"] for row in drawn[0]}) == 8
    assert drawn[0] != drawn[1] and drawn == demonstrations(pool, 5, count=8)
    with pytest.raises(ValueError, match="at least one row"):
        demonstrations([], 1)


def test_shards_and_mnlis_split_name_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    write_parquet(tmp_path / "mnli", train=rows_of("mnli", 3), validation=rows_of("mnli", 2))
    write_parquet(tmp_path / "mnli", **{"train-00000-of-00001": rows_of("mnli", 3)})
    assert len(load_rows(TASKS["mnli"], "validation_matched")) == 2
    write_parquet(tmp_path / "mnli", validation_matched=rows_of("mnli", 4))
    assert len(load_rows(TASKS["mnli"], "validation_matched")) == 4
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_rows(TASKS["mnli"], "test")


def test_missing_data_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)  # as on a machine without it
    with pytest.raises(
        Missing,
        match=r"(?s)'drop' was not found.*PAPERCORE_DATA.*datasets.*ucinlp/drop.*\$PAPERCORE_DATA/drop/",
    ):
        load_rows(TASKS["drop"], "train")


def test_super_glue_in_one_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    write_parquet(tmp_path / "super_glue" / "copa", train=rows_of("copa", 3))
    assert load_rows(TASKS["copa"], "train") == rows_of("copa", 3)


def test_a_hub_set_with_a_loading_script_comes_from_its_parquet_branch(monkeypatch):
    asked = []

    def load_dataset(name, config=None, *, split, revision=None):
        asked.append((name, config, split, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found trec.py")
        return rows_of("trec", 2)

    monkeypatch.delenv("PAPERCORE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_rows(TASKS["trec"], "train") == rows_of("trec", 2)
    assert asked[-1] == ("CogComp/trec", None, "train", "refs/convert/parquet")
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: rows_of("cb", 1))
    )
    assert load_rows(TASKS["cb"], "train") == rows_of("cb", 1)


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"unknown task of the causal models 'sst5': expected one of sst2, rte.*Did you mean 'sst2'",
    ):
        task_named("sst5", "causal")
    with pytest.raises(ValueError, match="of the masked models 'boolq'"):
        task_named("boolq", "masked")
    assert isinstance(CAUSAL["sst2"].question(ROWS["sst2"](0)), Question)
