"""The chapter's figures, tables and prose on the committed record, and where a record lacks their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from papercore.experiments.qsr import figures, tables
from papercore.experiments.qsr.config import Config
from papercore.lab.claims import load_claims
from papercore.lab.page import Drawn, NotMeasured, filled
from papercore.lab.record import Record

COMMITTED = Path(__file__).resolve().parents[2] / "book" / "records" / "qsr" / "quick.json"
DRAWN = ("idea", "rule", "slow_time", "toy", "rates", "digits", "control", "clock")
MADE = ("communication", "neighbours", "predictions", "toy", "digits", "control", "hot", "accuracies")


@pytest.fixture(scope="module")
def record():
    return Record.load(COMMITTED)


@pytest.fixture
def empty():
    return Record.start(Config.at("standard", device="cpu"))


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_drawn_with_words(record, name):
    drawn = getattr(figures, name)(record)
    assert isinstance(drawn, Drawn) and drawn.name.startswith("fig-qsr-")
    assert len(drawn.alt) > 60 and len(drawn.caption) > 60
    drawn.fig.canvas.draw()
    assert "nan" not in drawn.alt


@pytest.mark.parametrize("name", MADE)
def test_every_table_is_written(record, name):
    lines = getattr(tables, name)(record).splitlines()
    assert len(lines) > 3 and len({line.count("|") for line in lines}) == 1
    assert "nan" not in "".join(lines)


@pytest.mark.parametrize("name", [n for n in DRAWN if n != "idea"])
def test_a_record_without_the_numbers_is_said_to_lack_them(empty, name):
    with pytest.raises(NotMeasured, match="does not hold"):
        getattr(figures, name)(empty)


def test_the_figures_of_the_claims_are_those_that_are_drawn(record):
    larger = figures.standard(Record.load(COMMITTED.with_name("standard-cpu.json")))
    larger.fig.canvas.draw()
    names = {getattr(figures, name)(record).name for name in DRAWN} | {larger.name}
    assert {claim.figure for claim in load_claims("qsr")} <= names


def test_numbers_that_are_recalled_are_marked(record):
    lines = [line for line in tables.accuracies(record).splitlines() if "ResNet-152" in line]
    assert lines and all("**not checked**" in line for line in lines)


def test_seeds_needed_follow_from_the_difference_and_its_error(record):
    found = tables.digits_numbers(record)
    gap, se = record.metrics["main_qsr_minus_h16"], record.metrics["main_qsr_minus_h16_se"]
    per_seed = se * np.sqrt(record.metrics["main_seeds"])
    needed = float(found["needed"].removeprefix("about ").replace(",", ""))
    assert per_seed / np.sqrt(needed) == pytest.approx(abs(gap) / 2.5, rel=0.01)
    assert ("no evidence" in found["verdict"]) == (abs(gap) <= 2 * se)


def test_broken_runs_are_counted(record):
    said = tables.hot_numbers(record)["said"]
    for name, method in (("qsr", "QSR"), ("h16", "H = 16"), ("dp", "data parallel")):
        end = record.arrays[f"digits_hot_accuracy_{name}"][:, -1]
        assert (
            f"under {method} {int(np.isnan(end).sum())} end as NaN and {int((end < 0.5).sum())} below 50 %"
            in said
        )


def test_prose_takes_its_numbers_from_the_record(record):
    text = filled(record, "{main_qsr_minus_h16:+.2f}")
    assert float(text) == pytest.approx(record.metrics["main_qsr_minus_h16"], abs=0.005)


def test_the_standard_figure_and_table_show_every_schedule(empty):
    columns = [
        "labels",
        "schedule",
        "family",
        "share",
        "accuracy",
        "se",
        "seeds",
        "train loss",
        "top",
        "trace",
        "spread",
    ]
    rows = [
        [labels, name, family, share, 80.0, 0.3, 3, 0.1, 5.0, 50.0, None]
        for labels in ("clean", "noisy", "short")
        for name, family, share in (
            ("data parallel", "dp", 100.0),
            ("QSR, 1", "qsr", 12.0),
            ("SWAP", "swap", 50.0),
        )
    ]
    empty.table("standard_grid", columns, rows)
    drawn = figures.standard(empty)
    drawn.fig.canvas.draw()
    assert "6 runs" in drawn.alt
    assert tables.standard(empty).count("SWAP") == 3
