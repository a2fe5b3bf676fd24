"""A damaged record is refused with the place of the damage; a full disk and a killed process leave the old one or say so."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from papercore.lab import record as module
from papercore.lab.record import Record
from tests.lab.small_record import small_record


@pytest.fixture(autouse=True)
def _source(monkeypatch):
    """The hash of the source has tests of its own; here it is a word that a test may change."""
    monkeypatch.setattr(module, "source_hash", lambda slug, scale: f"source of {slug} at {scale}")


@pytest.fixture
def record():
    return small_record()


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
