"""Records: what goes in comes out again, a damaged file is refused with the place, a full disk leaves the old record whole."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import time
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from papercore.lab import record as module
from papercore.lab.config import Config
from papercore.lab.record import Record


@dataclasses.dataclass(frozen=True)
class Small(Config):
    slug: ClassVar[str] = "small"


@pytest.fixture(autouse=True)
def _source(monkeypatch):
    """The hash of the source has tests of its own; here it is a word that a test may change."""
    monkeypatch.setattr(module, "source_hash", lambda slug, scale: f"source of {slug} at {scale}")


@pytest.fixture
def record():
    made = Record.start(Small.quick(device="cpu", seed=3))
    made.metric("accuracy", 0.875, "rel:0.05")
    made.metric("accuracy_se", 0.01, "abs:0.005")
    made.metric("gain", 0.1, "se:2:accuracy_se")
    made.metric("weights", 121_344, "exact")
    made.metric("seconds_a_step", 0.03, "volatile")
    made.table("arms", ["arm", "k", "mean"], [["full", 4, 0.5], ["lora", np.int64(16), np.float32(0.25)]])
    made.array("curve", [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    made.array("names", np.array(["a", "bcd"]))
    made.note("where", "a generated language")
    return made.finish()


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


def _set(document, *path_and_value):
    *path, last, value = path_and_value
    for key in path:
        document = document[key]
    document[last] = value


def _remove(document, *path):
    for key in path[:-1]:
        document = document[key]
    del document[path[-1]]


DAMAGE = {
    "another schema": (lambda d: _set(d, "schema", 7), "schema 7, this version reads 1"),
    "no metrics": (lambda d: _remove(d, "metrics"), "field 'metrics' is missing, expected dict"),
    "metrics a list": (lambda d: _set(d, "metrics", []), "field 'metrics' is list, expected dict"),
    "scale unknown": (lambda d: _set(d, "scale", "huge"), "scale 'huge', expected one of quick, standard, paper"),
    "no device": (lambda d: _remove(d, "config", "device"), "config has no 'device' of kind str"),
    "text as a metric": (lambda d: _set(d, "metrics", "gain", "0.1"), "metric 'gain' is '0.1', expected a number or null"),
    "truth as a metric": (lambda d: _set(d, "metrics", "gain", True), "metric 'gain' is True, expected a number or null"),
    "no moves": (lambda d: _remove(d, "moves", "gain"), "metric 'gain' does not say how far it may move"),
    "wrong moves": (lambda d: _set(d, "moves", "gain", "much"), "metric 'gain': moves = 'much' is not one of exact"),
    "moves a number": (lambda d: _set(d, "moves", "gain", 5), "metric 'gain': moves = 5 is not one of exact"),
    "moves with what is not there": (lambda d: _set(d, "moves", "gain", "se:2:gone"), "metric 'gain' moves with the standard error 'gone'"),
    "moves of no metric": (lambda d: _set(d, "moves", "other", "exact"), "moves names 'other', which is no metric"),
    "table without rows": (lambda d: _remove(d, "tables", "arms", "rows"), "table 'arms' does not have columns and rows"),
    "table with a short row": (lambda d: d["tables"]["arms"]["rows"][1].pop(), "table 'arms', row 1: not a list of 3 cells"),
    "no source": (lambda d: _remove(d, "provenance", "source"), "provenance lacks source"),
    "a better number": (lambda d: _set(d, "metrics", "accuracy", 0.99), "its contents do not fit its checksum, so it was changed after it was written"),
    "a better cell": (lambda d: _set(d, "tables", "arms", "rows", 0, 2, 0.9), "its contents do not fit its checksum"),
    "another commit": (lambda d: _set(d, "provenance", "commit", "abc"), "its contents do not fit its checksum"),
    "no checksum": (lambda d: _remove(d, "checksum"), "field 'checksum' is missing, expected str"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_damaged_or_edited_by_hand_is_refused_with_the_place(record, tmp_path, damage):
    edit, message = DAMAGE[damage]
    path = record.save(tmp_path / "quick.json")
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError) as refused:
        Record.load(path)
    assert str(refused.value).startswith(f"{path} is not a record: {message}")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"schema": 1}', "\x00" * 50, '{"schema": NaN}'])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    path = tmp_path / "quick.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"quick\.json is not a record: .*run the chapter again"):
        Record.load(path)
    with pytest.raises(FileNotFoundError):
        Record.load(tmp_path / "none.json")


def test_a_record_cut_short_anywhere_is_refused(record, tmp_path):
    path = record.save(tmp_path / "quick.json")
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a record"):
            Record.load(path)


def test_arrays_must_be_those_of_the_record(record, tmp_path):
    path = record.save(tmp_path / "quick.json")
    arrays = path.with_suffix(".npz")
    good = arrays.read_bytes()
    for bad in (good[:-40], good[: len(good) // 2], b"", b"nothing"):
        arrays.write_bytes(bad)
        with pytest.raises(ValueError, match=r"quick\.npz is damaged: .*[Rr]un the chapter again"):
            Record.load(path)
    flipped = bytearray(good)
    with zipfile.ZipFile(arrays if arrays.write_bytes(good) else arrays) as inside:
        first = inside.infolist()[0]
    flipped[first.header_offset + 60 + first.compress_size // 2] ^= 0xFF
    arrays.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"quick\.npz is damaged"):
        Record.load(path)
    curve, names = record.arrays["curve"], record.arrays["names"]
    for others, message in (
        ({"curve": curve + 1, "names": names}, "array 'curve' is another one"),
        ({"curve": curve.ravel(), "names": names}, "array 'curve' is another one"),
        ({"curve": curve}, "array 'names' is in the record alone"),
        ({"curve": curve, "names": names, "more": curve}, "array 'more' is in this file alone"),
    ):
        np.savez_compressed(arrays, **others)
        with pytest.raises(ValueError, match=rf"quick\.npz does not belong to its record: {message}"):
            Record.load(path)
    arrays.unlink()
    with pytest.raises(ValueError, match=r"quick\.npz is missing"):
        Record.load(path)


def test_arrays_of_an_earlier_record_do_not_stay_behind(record, tmp_path):
    path = record.save(tmp_path / "quick.json")
    record.arrays.clear()
    record.save(path)
    assert list(tmp_path.iterdir()) == [path] and Record.load(path).arrays == {}


@pytest.mark.parametrize("call", ["write_text", "savez_compressed", "replace", "fsync"])
def test_a_full_disk_leaves_the_old_record_whole(record, tmp_path, monkeypatch, call):
    path = record.save(tmp_path / "quick.json")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    calls = []

    def full(target, *args, **kwargs):
        calls.append(target)
        if call in {"write_text", "savez_compressed"}:
            Path(target).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = {"write_text": Path, "savez_compressed": np, "replace": os, "fsync": os}[call]
    monkeypatch.setattr(owner, call, full)
    record.metrics["accuracy"] = 0.9
    record.arrays["curve"] = record.arrays["curve"] + 1
    with pytest.raises(
        OSError, match=r"No space left on device; nothing was changed there\. Free some space"
    ):
        record.save(path)
    monkeypatch.undo()
    assert len(calls) == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    Record.load(path)


def test_a_process_killed_between_the_two_files_is_noticed(record, tmp_path, monkeypatch):
    """An old record beside new arrays must not pass for either."""
    path = record.save(tmp_path / "quick.json")
    record.arrays["curve"] = record.arrays["curve"] + 1
    really = os.replace

    def killed(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        really(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record.save(path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quick.json", "quick.npz"]
    with pytest.raises(
        ValueError, match=r"quick\.npz does not belong to its record: array 'curve' is another one"
    ):
        Record.load(path)
