"""The standard scale on a few made images: the whole run, what shares a start, resuming, and settings."""

from __future__ import annotations

import numpy as np
import pytest

from papercore import experiments
from papercore.experiments.local_sgd import standard
from papercore.experiments.local_sgd.standard_forms import FULL, REDUCED
from papercore.lab.image_set import ImageSet
from papercore.lab.record import Record
from papercore.lab.stages import Stages

SMALL = {
    "standard_train_images": 0, "standard_depth": 8, "standard_width": 2, "standard_workers": 2, "standard_local_batch": 2, "standard_seeds": (0, 1),
    "standard_start_steps": 2, "standard_post_steps": 8, "standard_periods": (2, 4), "standard_large_steps": 4, "standard_large_period": 2,
    "standard_noise_start_steps": 2, "standard_noise_steps": 4, "standard_noise_periods": (2, 4), "standard_measure": 2, "standard_sharpness": 100,
    "standard_probes": 1,
    "standard_products": 2,
}  # fmt: skip


@pytest.fixture
def images(monkeypatch):
    rng = np.random.default_rng(0)
    made = ImageSet.of(
        *((rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8), rng.integers(0, 3, n)) for n in (24, 12))
    )
    monkeypatch.setattr(ImageSet, "load", classmethod(lambda cls, name, **options: made))
    return made


@pytest.fixture
def small(images):
    return experiments.configure("local_sgd", "standard", "cpu", overrides=SMALL)


def test_a_small_run_fills_the_record_and_resumes(small, tmp_path, monkeypatch):
    record = Record.start(small)
    standard.run_standard(small, record, Stages(tmp_path))
    record.finish()
    m = record.metrics
    assert m["standard_seeds"] == 2 and m["standard_shortest_h"] == 2 and m["standard_longest_h"] == 4
    for part, periods in (("post", (1, 2, 4)), ("large", (1, 2)), ("noise", (1, 2, 4))):
        for h in periods:
            assert 0 <= m[f"standard_{part}_h{h}_accuracy"] <= 100
    gains = record.arrays["standard_post_seed_accuracy"]
    assert m["standard_post_h4_gain"] == pytest.approx((gains[2] - gains[0]).mean())
    assert {claim_metric for claim_metric in m if "main" in claim_metric} >= {
        "standard_main_gain",
        "standard_main_short_gain",
    }

    # Every part is on disk now: a second run trains nothing and finds the same numbers.
    def untrained(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(standard, "train_images", untrained)
    again = Record.start(small)
    standard.run_standard(small, again, Stages(tmp_path))
    assert again.metrics == m


def test_all_arms_of_a_seed_share_their_start(small, tmp_path):
    stages = Stages(tmp_path)
    record = Record.start(small)
    standard.run_standard(small, record, stages)
    for seed in (0, 1):
        start = stages.get(f"post/start/seed{seed}", lambda: pytest.fail("missing"))
        for h in (1, 2, 4):
            run = stages.get(f"post/h{h}/seed{seed}", lambda: pytest.fail("missing"))
            assert run["test_loss"][0] == pytest.approx(start["test_loss"][-1])


def test_plans_differ_only_in_how_workers_average(small, tmp_path):
    trainer = standard.Trainer(small, small.form(), Stages(tmp_path))
    sgd, local = (trainer.plan("noise", h, 10, 0.1, 5) for h in (1, 4))
    assert (sgd.k, sgd.local_batch, local.k, local.local_batch) == (1, 4, 2, 2)
    for name in (
        "steps",
        "lr",
        "first_step",
        "flips",
        "replacement",
        "augment",
        "weight_decay",
        "measure_every",
    ):
        assert getattr(sgd, name) == getattr(local, name)
    assert local.replacement and not local.augment and local.flips == REDUCED.flips
    post = trainer.plan("post", 4, 10, 0.1, 5)
    assert post.augment and not post.replacement and post.flips == 0


def test_forms():
    auto = experiments.configure("local_sgd", "standard", "cpu")
    assert auto.form() == REDUCED
    full = auto.replace(standard_form="full")
    # The paper's code: 32 workers of 128 images, learning rates 0.32 and 0.1, a tenth of the labels redrawn.
    assert full.form() == FULL and (FULL.workers, FULL.local_batch, FULL.lr, FULL.noise_lr, FULL.flips) == (
        32,
        128,
        0.32,
        0.1,
        0.1,
    )
    changed = auto.replace(standard_workers=4, standard_periods=(8, 16))
    assert (
        changed.form().workers == 4 and changed.form().periods == (8, 16) and changed.form().lr == REDUCED.lr
    )
    for form in (FULL, REDUCED):
        # Gains after a tenth of the time are read at measurements that both arms have.
        assert all(form.measure % h == 0 or h % form.measure == 0 for h in form.periods)
        assert form.post_steps % max(form.periods) == 0
    with pytest.raises(ValueError, match="unknown standard_form 'tiny': expected one of auto, full, reduced"):
        auto.replace(standard_form="tiny")
