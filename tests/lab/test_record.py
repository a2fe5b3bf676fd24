"""Records: what goes in comes out again, misuse is refused, and two records are compared as far as each metric may move."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from papercore.lab import record as module
from papercore.lab.record import Record
from tests.lab.small_record import Small, small_record


@pytest.fixture(autouse=True)
def _source(monkeypatch):
    """The hash of the source has tests of its own; here it is a word that a test may change."""
    monkeypatch.setattr(module, "source_hash", lambda slug, scale: f"source of {slug} at {scale}")


@pytest.fixture
def record():
    return small_record()


def test_what_goes_in_comes_out_again(record, tmp_path):
    path = record.save(tmp_path / "deep" / "quick.json")
    loaded = Record.load(path)
    assert loaded.path == path == record.path
    for field in ("slug", "scale", "config", "metrics", "moves", "tables", "notes", "provenance"):
        assert getattr(loaded, field) == getattr(record, field), field
    assert loaded.tables["arms"] == {
        "columns": ["arm", "k", "mean"],
        "rows": [["full", 4, 0.5], ["lora", 16, 0.25]],
    }
    assert loaded.arrays.keys() == record.arrays.keys()
    for name, values in record.arrays.items():
        assert np.array_equal(loaded.arrays[name], values) and loaded.arrays[name].dtype == values.dtype
    assert loaded.compare(record) == [] == record.compare(loaded)
    assert sorted(p.name for p in path.parent.iterdir()) == ["quick.json", "quick.npz"]
    # A second trip changes nothing.
    again = loaded.save(tmp_path / "again" / "quick.json")
    assert again.read_bytes() == path.read_bytes()


def test_numbers_are_the_same_before_saving_and_after_loading(tmp_path):
    record = Record.start(Small.quick(device="cpu"))
    values = {
        "third": 1 / 3,
        "large": 123_456_789_012,
        "negative": -2.5e-17,
        "nan": math.nan,
        "infinite": math.inf,
        "zero": 0.0,
    }
    for name, value in values.items():
        returned = record.metric(name, value, "exact")
        assert returned == record.metrics[name] or math.isnan(value - value)
    record.metric("tensor", torch.tensor(0.5), "exact")
    loaded = Record.load(record.finish().save(tmp_path / "quick.json"))
    assert loaded.compare(record) == [] and record.compare(loaded) == []
    assert loaded.metrics["third"] == 0.33333333  # eight digits, in memory too
    assert loaded.metrics["large"] == 123_456_789_012  # a count is kept whole
    assert math.isnan(loaded.metrics["infinite"]) and math.isnan(record.metrics["infinite"])


def test_the_record_says_what_made_it(record):
    assert record.provenance["source"] == "source of small at quick"
    assert record.provenance["digest"] == Small.quick(device="cpu", seed=3).digest()
    assert record.provenance["seed"] == 3 and record.config == {"scale": "quick", "device": "cpu", "seed": 3}
    assert record.provenance["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record.provenance["hardware"]["device"] == "cpu" and record.provenance["hardware"]["cores"] >= 1
    assert record.provenance["peak_memory_bytes"] > 10_000_000  # a Python with torch
    assert time.strptime(record.provenance["finished"], "%Y-%m-%d")
    assert 0 <= record.provenance["seconds"] < 60


def test_the_device_is_resolved_in_the_record(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Record.start(Small.quick(device="auto")).finish().config["device"] == "cpu"
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        Record.start(Small.quick(device="cuda"))


def test_a_record_is_fresh_until_the_source_changes(record, monkeypatch, tmp_path):
    loaded = Record.load(record.save(tmp_path / "quick.json"))
    assert loaded.fresh
    monkeypatch.setattr(module, "source_hash", lambda slug, scale: "other")
    assert not loaded.fresh


def test_the_source_is_hashed_when_the_run_begins(monkeypatch):
    record = Record.start(Small.quick(device="cpu"))
    monkeypatch.setattr(module, "source_hash", lambda slug, scale: "edited meanwhile")
    assert record.finish().provenance["source"] == "source of small at quick"


@pytest.mark.parametrize("moves", ["", "exactly", "exact:1", "exact:", "rel", "rel:0", "rel:-1", "rel:x", "rel:nan", "rel:inf", "rel:1:2", "abs:", "se:2", "se:2:", "se::x", "se:0:x", "volatile:1", 5, None])  # fmt: skip
def test_how_far_a_metric_may_move_is_checked(moves):
    record = Record.start(Small.quick(device="cpu"))
    with pytest.raises(
        ValueError, match=r"metric 'x': moves = .* is not one of exact, rel:X, abs:X, se:K:NAME, volatile"
    ):
        record.metric("x", 1.0, moves)
    assert record.metrics == {}
    record.finish()


def test_misuse_is_refused(record, tmp_path):
    with pytest.raises(ValueError, match="metric 'gain' is already in the record of small"):
        record.metric("gain", 1.0)
    record.metric("eps_1e-4", 1.0)
    with pytest.raises(ValueError, match=r"metric 'eps_1e_4' reads like 'eps_1e-4' in a rule \(eps_1e_4\)"):
        record.metric("eps_1e_4", 1.0)
    with pytest.raises(ValueError, match=r"table 'arms': a row of 1 cells under 2 columns \['a', 'b'\]"):
        record.table("arms", ["a", "b"], [[1]])
    with pytest.raises(TypeError, match="array 'mixed' holds Python objects"):
        record.array("mixed", [None, {}])
    with pytest.raises(ValueError, match="a record is a .json file, got .*quick.npz"):
        record.save(tmp_path / "quick.npz")
    running = Record.start(Small.quick(device="cpu"))
    with pytest.raises(
        ValueError, match=r"the record of small is still running: call finish\(\) before save\(\)"
    ):
        running.save(tmp_path / "quick.json")
    running.metric("gain", 1.0, "se:2:gone")
    with pytest.raises(
        ValueError, match="metric 'gain' moves with the standard error 'gone', which the record does not hold"
    ):
        running.finish()
    assert list(tmp_path.iterdir()) == []


def _pair(moves, mine, theirs, **others):
    records = []
    for value in (mine, theirs):
        made = Record.start(Small.quick(device="cpu"))
        for name, other in others.items():
            made.metric(name, other, "volatile")
        made.metric("x", value, moves)
        records.append(made.finish())
    return records


@pytest.mark.parametrize(
    ("moves", "mine", "theirs", "agree"),
    [
        ("exact", 3.0, 3.0, True),
        ("exact", 3.0, 3.0000001, False),
        ("rel:0.1", 1.0, 1.1, True),  # a tenth of the larger
        ("rel:0.1", -1.0, -1.2, False),
        ("rel:0.1", 0.0, 1e-9, False),
        ("abs:0.05", 0.0, 0.049, True),
        ("abs:0.05", 0.0, 0.051, False),
        ("se:2:error", 1.0, 1.19, True),
        ("se:2:error", 1.0, 1.21, False),
        ("volatile", 1.0, 1e9, True),
        ("volatile", 1.0, math.nan, True),
        ("exact", math.nan, math.nan, True),
        ("rel:0.1", math.nan, 1.0, False),
        ("abs:0.05", 1.0, math.nan, False),
    ],
)
def test_records_are_compared_as_far_as_each_metric_may_move(moves, mine, theirs, agree):
    first, second = _pair(moves, mine, theirs, error=0.1)
    for problems in (first.compare(second), second.compare(first)):
        assert (problems == []) is agree
        assert agree or (
            len(problems) == 1 and problems[0].startswith("x: ") and problems[0].endswith(f"({moves})")
        )


def test_a_metric_that_one_record_lacks_is_a_difference():
    first, second = _pair("exact", 1.0, 1.0)
    second.metrics["y"], second.moves["y"] = 1.0, "volatile"
    assert first.compare(second) == ["y: only in the other record"]
    assert second.compare(first) == ["y: only in this record"]
    second.scale = "paper"
    with pytest.raises(
        ValueError, match="a record of small at quick is not comparable to one of small at paper"
    ):
        first.compare(second)
