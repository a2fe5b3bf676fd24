"""Finished parts of a run: kept through kills of a real process, equal to the last digit, and never taken for other settings."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import pytest

from papercore.lab import stages as module
from papercore.lab.config import Config, option
from papercore.lab.stages import Stages


@dataclasses.dataclass(frozen=True)
class Small(Config):
    slug: ClassVar[str] = "small"

    steps: int = option(4, "updates", minimum=1)


@pytest.fixture(autouse=True)
def _source(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "source_hash", lambda slug, scale: "0123456789abcdef")
    monkeypatch.setenv("PAPERCORE_RUNS", str(tmp_path / "runs"))


def _part(calls, name="part"):
    def part():
        calls.append(name)
        return {
            "accuracy": 1 / 3,
            "losses": [0.1, math.inf],
            "at": (0, 1),
            "text": "é",
            "none": None,
            "curve": np.array([1e-300, np.nan, 2.0]),
            "count": np.int64(3),
            "best": np.bool_(True),
            "empty": np.zeros((0, 3), dtype=np.float32),
        }

    return part


def test_a_part_is_computed_once_and_read_back_equal(tmp_path):
    calls: list[str] = []
    stages = Stages(tmp_path / "parts")
    assert not stages.done("full/k16/seed0") and not stages.root.exists()
    first = stages.get("full/k16/seed0", _part(calls))
    again = Stages(stages.root).get("full/k16/seed0", _part(calls))
    assert calls == ["part"] and stages.done("full/k16/seed0")
    assert first.keys() == again.keys()
    for key in first:
        assert type(first[key]) is type(again[key])
        assert (
            np.array_equal(first[key], again[key], equal_nan=True)
            if isinstance(first[key], np.ndarray)
            else first[key] == again[key]
        )
    assert first["accuracy"] == 1 / 3 and first["losses"] == [0.1, math.inf] and first["at"] == [0, 1]
    assert first["count"] == 3 and first["best"] is True
    assert first["empty"].shape == (0, 3) and first["empty"].dtype == np.float32
    assert [p.suffix for p in stages.root.iterdir()] == [".npz"]


def test_names_that_read_alike_do_not_share_a_file(tmp_path):
    stages = Stages(tmp_path)
    names = ["a/b", "a_b", "a b", "lr0.1", "lr0.10", "lr0", "a.b", "A:b", "é"]
    for number, name in enumerate(names):
        assert stages.get(name, lambda number=number: {"number": number}) == {"number": number}
    assert [stages.get(name, dict)["number"] for name in names] == list(range(len(names)))
    assert len({stages.folder(name) for name in names}) == len(names)
    assert all(stages.folder(name).parent == tmp_path for name in names)


def test_a_part_that_fails_leaves_nothing_and_is_tried_again(tmp_path):
    stages = Stages(tmp_path)

    def bad():
        raise FloatingPointError("the loss is nan at step 3")

    with pytest.raises(FloatingPointError):
        stages.get("x", bad)
    assert not stages.done("x") and list(tmp_path.iterdir()) == []
    assert stages.get("x", lambda: {"a": 1}) == {"a": 1}


def test_what_cannot_be_kept_is_refused_by_name(tmp_path):
    stages = Stages(tmp_path)
    with pytest.raises(
        TypeError, match="part 'x' returned what is neither JSON nor a numpy array: .*complex"
    ):
        stages.get("x", lambda: {"a": 1j})
    with pytest.raises(TypeError, match="part 'x': array 'a' holds Python objects"):
        stages.get("x", lambda: {"a": np.array([None])})
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_computed_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPERCORE_PROGRESS", "line")
    stages = Stages(tmp_path)
    stages.get("x", lambda: {"a": np.arange(1000)})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for bad in (b"", whole[:100], whole[:-30], b"text"):
        path.write_bytes(bad)
        assert stages.get("x", lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]
        assert "x.npz is damaged: computing this part again" in capsys.readouterr().err


def test_a_full_disk_keeps_the_parts_that_are_there(tmp_path, monkeypatch):
    stages = Stages(tmp_path)
    stages.get("first", lambda: {"a": 1})

    def full(target, **kwargs):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left on device; nothing was changed there"):
        stages.get("second", lambda: {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["first.npz"]
    assert stages.get("first", dict) == {"a": 1}


def test_scratch_goes_with_the_part_that_it_belongs_to(tmp_path):
    stages = Stages(tmp_path)

    def part():
        stages.folder("x").mkdir(parents=True)
        (stages.folder("x") / "state.pt").write_text("half")
        assert stages.seconds() == 0.0
        return {}

    stages.get("x", part)
    assert not stages.folder("x").exists() and stages.done("x")


def test_seconds_of_finished_parts_are_remembered(tmp_path):
    stages = Stages(tmp_path)
    for name in ("a", "b"):
        stages.get(name, lambda: time.sleep(0.05) or {})
    assert 0.1 <= Stages(tmp_path).seconds() < 5


def test_another_setting_or_another_source_starts_afresh(monkeypatch, tmp_path):
    calls: list[str] = []
    config = Small.quick(device="cpu")
    for step, (same, source) in enumerate(
        ((config, "a"), (config.replace(steps=5), "a"), (config, "b"), (config.replace(seed=1), "b"))
    ):
        monkeypatch.setattr(module, "source_hash", lambda slug, scale, source=source: source)
        Stages.of(same).get("x", _part(calls))
        assert len(calls) == step + 1
        Stages.of(same).get("x", _part(calls))
        assert len(calls) == step + 1
    expected = tmp_path / "runs" / "small" / f"quick-{config.digest()}.parts" / "a"
    monkeypatch.setattr(module, "source_hash", lambda slug, scale: "a")
    assert Stages.of(config).root == expected and expected.is_dir()


def test_clear_removes_the_parts_of_this_config_alone(monkeypatch, tmp_path):
    config, other = Small.quick(device="cpu"), Small.quick(device="cpu", steps=9)
    for source in ("a", "b"):
        monkeypatch.setattr(module, "source_hash", lambda slug, scale, source=source: source)
        Stages.of(config).get("x", dict)
    Stages.of(other).get("x", dict)
    Stages.of(config).clear()
    assert [p.name for p in (tmp_path / "runs" / "small").iterdir()] == [f"quick-{other.digest()}.parts"]
    assert Stages.of(other).done("x")


SCRIPT = """
import json, sys, time
from pathlib import Path
import numpy as np
from papercore.lab.stages import Stages

root, gate = Path(sys.argv[1]), Path(sys.argv[2])
stages = Stages(root / "parts")

def part(i):
    with open(root / "log", "a") as log:
        log.write(f"{i} ")
    if i == 2 and gate.exists():
        (root / "reached").touch()
        time.sleep(60)
    values = np.random.default_rng(i).standard_normal(50)
    return {"sum": float(values.sum()), "values": values}

results = [stages.get(f"part {i}", lambda i=i: part(i)) for i in range(4)]
print(json.dumps([[r["sum"], r["values"].tolist()] for r in results]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_goes_on_after_its_last_finished_part(tmp_path, how):
    def run(root):
        root.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(root), str(gate)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    gate, root = tmp_path / "gate", tmp_path / "killed"
    gate.touch()
    process = run(root)
    deadline = time.monotonic() + 60
    while not (root / "reached").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run never came to its third part"
        time.sleep(0.02)
    process.send_signal(how)
    assert process.communicate(timeout=60)[0] == "" and process.returncode != 0
    assert sorted(p.suffix for p in (root / "parts").iterdir()) == [".npz", ".npz"]
    gate.unlink()
    resumed = run(root).communicate(timeout=60)[0]
    whole = run(tmp_path / "whole").communicate(timeout=60)[0]
    assert json.loads(resumed) == json.loads(whole) and len(json.loads(whole)) == 4
    assert (root / "log").read_text().split() == [
        "0",
        "1",
        "2",
        "2",
        "3",
    ]  # what was finished was not run again
