"""Real processes against virtual workers, through the chapter's own parts; the jobs of the digits; blocks with a lost seed."""

from __future__ import annotations

import numpy as np
import pytest

from papercore.experiments import configure
from papercore.experiments.qsr import digits, digits_processes, engines
from papercore.lab.record import Record
from papercore.lab.stages import Stages

SMALL = {"seeds": 3, "steps": 40, "control_steps": 30, "hot_seeds": 3, "workers": 2}


def test_both_engines_end_with_the_same_weights(tmp_path):
    record = Record.start(configure("qsr", "quick", "cpu"))
    engines.compare(record, Stages(tmp_path), processes=2, steps=40, seed=0)
    assert record.metrics["engine_difference"] <= 1e-6
    assert record.metrics["engine_rounds"] == len(
        engines.SCHEDULE.rounds(engines.cosine_lr(engines.PEAK, 40), 40)
    )
    assert record.metrics["engine_bytes"] == record.metrics["engine_rounds"] * 4 * 5962


def test_the_digits_train_alike_under_processes_and_virtual_workers():
    job = next(job for job in digits.jobs(configure("qsr", "quick", "cpu", 0, SMALL)) if job.method == "QSR")
    real, virtual = digits_processes.train_under_torchrun(job, 2), digits.train(job)
    assert real["share"] == virtual["share"] and real["steps"].tolist() == virtual["steps"].tolist()
    for name in ("accuracy", "test_loss", "train_loss"):
        np.testing.assert_allclose(real[name], virtual[name], atol=1e-4)


def test_every_method_of_a_block_sees_the_same_seeds_and_the_longest_jobs_come_first():
    found = digits.jobs(configure("qsr", "quick", "cpu", 2))
    assert {job.seeds[:2] for job in found} == {(2000, 2001)}
    assert [len([j for j in found if j.block == block]) for block in ("main", "hot", "control")] == [6, 3, 3]
    assert {len(job.seeds) for job in found if job.block == "hot"} == {12}
    assert found[-1].steps == 300 and found[0].steps == 2000


def test_a_lost_seed_is_left_out_of_means_and_pairs_and_counted():
    def run(accuracy):
        end = np.array(accuracy)[:, None]
        return {
            "steps": np.array([10]), "accuracy": end, "test_loss": end, "train_loss": end, "share": 10.0,
            "lost": int(np.isnan(end).sum()),
        }  # fmt: skip

    record = Record.start(configure("qsr", "quick", "cpu"))
    runs = {
        "data parallel": run([0.70, 0.72, 0.74]),
        "H = 16": run([0.80, 0.83, 0.80]),
        "QSR": run([0.82, np.nan, 0.84]),
    }
    digits._block(record, "hot", runs)
    rows = {row[0]: row for row in record.tables["digits_hot"]["rows"]}
    assert rows["QSR"][2] == pytest.approx(83.0) and rows["QSR"][-1] == 1
    assert rows["QSR"][4] == pytest.approx(3.0) and rows["QSR"][6:8] == [2, 2]
    assert record.metrics["hot_qsr_minus_h16"] == pytest.approx(3.0)
    assert record.metrics["hot_h16_minus_dp"] == pytest.approx(100 * (0.10 + 0.11 + 0.06) / 3)
