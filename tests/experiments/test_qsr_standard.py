"""The standard scale on a few made images: the grid, warm-up, shorter runs, resuming, and the differences that claims rest on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from papercore.experiments import configure
from papercore.experiments.qsr import figures, standard, tables
from papercore.experiments.qsr.standard import Warmed, compared, grid
from papercore.experiments.qsr.standard_forms import FULL, REDUCED
from papercore.lab.image_set import ImageSet
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.local_sgd import QSR, communication_volume, cosine_lr

TINY = {
    "standard_form": "reduced", "standard_steps": 16, "standard_warmup": 2, "standard_seeds": (0, 1), "standard_workers": 2,
    "standard_local_batch": 2, "standard_measure": 8, "standard_sharpness": 16, "standard_probes": 1, "standard_periods": (4,),
    "standard_train_images": 24, "standard_test_images": 12, "standard_pool": 1, "standard_post_h": 4,
    "standard_parts": ("clean", "noisy", "shorter"), "standard_switch": 0.5, "standard_flips": 0.1,
}  # fmt: skip


@pytest.fixture
def images(monkeypatch):
    rng = np.random.default_rng(0)
    made = ImageSet.of(
        (rng.integers(0, 255, (24, 8, 8, 3), dtype=np.uint8), np.arange(24) % 3),
        (rng.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8), np.arange(12) % 3),
    )
    monkeypatch.setattr(ImageSet, "load", lambda *args, **options: made)


def _run(tmp_path, **more):
    config = configure("qsr", "standard", "cpu", 0, TINY | more)
    record, stages = Record.start(config), Stages(tmp_path / "stages")
    standard.run_standard(config, record, stages)
    return record.finish(), stages


def test_a_tiny_run_fills_the_record_and_is_not_run_twice(images, tmp_path, monkeypatch):
    record, _ = _run(tmp_path)
    table = record.tables["standard_grid"]
    names = list(grid(configure("qsr", "standard", "cpu", 0, TINY).form(), 16))
    assert [row[1] for row in table["rows"] if row[0] == "clean"] == names
    assert {row[0] for row in table["rows"]} == {"clean", "noisy", "short", "middle"}
    assert "standard_qsr_minus_constant" in record.metrics and "standard_short_qsr_minus_dp" in record.metrics
    gap = record.metrics["standard_gain_long_minus_short"]
    expected = record.metrics["standard_qsr_minus_dp"] - record.metrics["standard_short_qsr_minus_dp"]
    assert gap == pytest.approx(expected, abs=1e-5)
    drawn, gap = figures.standard(record), record.metrics["standard_short_qsr_minus_dp"]
    assert drawn.name == "fig-qsr-standard" and "SWAP" in tables.standard(record)
    assert f"{gap:+.2f} after 2, " in drawn.alt and drawn.alt.count(" after ") == 3

    def forbidden(*args, **options):
        raise AssertionError("a finished run must not be trained again")

    monkeypatch.setattr(standard, "train_images", forbidden)
    again, _ = _run(tmp_path)
    assert again.tables["standard_grid"] == table


def test_a_form_without_noise_or_switch_has_no_such_runs(images, tmp_path):
    form = configure("qsr", "standard", "cpu", 0, TINY).form()
    some = grid(dataclasses.replace(form, switch=0.0), 16)
    assert "SWAP" not in some and "post-local" not in some and set(compared(form)) <= set(some)
    record, _ = _run(
        tmp_path,
        standard_seeds=(0,),
        standard_flips=0.0,
        standard_parts=("noisy", "clean"),
        standard_sharpness=0,
    )
    assert {row[0] for row in record.tables["standard_grid"]["rows"]} == {"clean"}
    assert "trace" not in tables.standard(record)  # no column for what the reduced form leaves out


def test_one_part_can_be_run_alone(images, tmp_path):
    record, _ = _run(tmp_path, standard_parts=("shorter",), standard_seeds=(0,))
    assert {row[0] for row in record.tables["standard_grid"]["rows"]} == {"short", "middle"}
    assert record.metrics == {"standard_seeds": 1.0}


@pytest.mark.parametrize("form", [FULL, REDUCED])
def test_the_forms_hold_what_is_compared_and_rules_that_communicate_less(form):
    schedules = grid(form, form.steps)
    assert set(compared(form)) <= set(schedules)
    lr = cosine_lr(form.lr, form.steps, warmup_steps=form.warmup)
    share = {
        name: communication_volume(schedule, lr, form.steps, warmup_steps=form.warmup).fraction
        for name, (_, schedule) in schedules.items()
    }
    assert share["data parallel"] == 1.0
    assert share[compared(form)[2]] < share[compared(form)[1]] < share.get("post-local", 1.0)
    assert ("post-local" in share) == ("SWAP" in share) == bool(form.switch)


def test_a_warmed_schedule_uses_no_formula_in_the_warm_up():
    lr = cosine_lr(0.4, 200, warmup_steps=20)
    told = QSR(0.4, 4).rounds(lr, 200, warmup_steps=20)
    assert Warmed(QSR(0.4, 4), 20).rounds(lr, 200) == told
    assert told[0].length == 4
