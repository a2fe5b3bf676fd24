"""Progress: on stderr alone, nothing where nobody looks, lines on request; what is counted is passed on untouched."""

from __future__ import annotations

import itertools

import pytest

from papercore.lab import progress as module
from papercore.lab.progress import progress, say


@pytest.fixture
def ticking(monkeypatch):
    """A clock on which every look takes four seconds."""
    clock = itertools.count(0, 4)
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))


@pytest.mark.parametrize("mode", ["auto", "off", "line", "bar"])
def test_everything_is_passed_on_and_stdout_is_left_alone(monkeypatch, capsys, mode):
    monkeypatch.setenv("PAPERCORE_PROGRESS", mode)
    assert list(progress(range(5), "steps")) == [0, 1, 2, 3, 4]
    assert list(progress(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert list(progress(iter("abc"), "letters")) == ["a", "b", "c"]
    assert list(progress([], "nothing")) == []
    say("hello")
    seen = capsys.readouterr()
    assert seen.out == ""
    if mode in {"auto", "off"}:  # stderr is no terminal under pytest
        assert seen.err == ""
    else:
        assert "hello\n" in seen.err
        assert ("0/5" in seen.err) == (mode == "bar")


@pytest.mark.usefixtures("ticking")
def test_lines_come_every_ten_seconds(monkeypatch, capsys):
    monkeypatch.setenv("PAPERCORE_PROGRESS", "line")
    list(progress(range(6), "steps"))
    assert capsys.readouterr().err.splitlines() == ["steps: 3/6 after 12 s", "steps: 6/6 after 24 s"]
    list(progress(iter(range(3)), "unknown"))
    assert capsys.readouterr().err.splitlines() == ["unknown: 3 after 12 s"]


def test_a_loop_that_stops_early_ends_the_bar(monkeypatch, capsys):
    monkeypatch.setenv("PAPERCORE_PROGRESS", "bar")
    bar = progress(range(1000), "steps")
    assert next(bar) == 0
    bar.close()
    with pytest.raises(StopIteration):
        next(bar)
    assert "steps" in capsys.readouterr().err
