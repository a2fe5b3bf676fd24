"""Schedules through their public names: the counts of the papers' runs, in rounds and in percent of data parallel."""

import math

import pytest

from papercore.local_sgd import QSR, ConstantH, SyncSchedule, cosine_lr, linear_lr, step_lr
from tests.local_sgd import public_api_reference as truth

RESNET, VIT = (0.8, 62_400, 1_560), (0.008, 93_600, 10_000)  # peak rate, steps, warm-up steps


# ---- the runs of the paper (sheet, section 5) ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "alpha", "h_base", "count", "percent", "longest", "last"),
    [
        (RESNET, 0.0, 2, 31_200, 50.000, 2, 2),
        (RESNET, 0.0, 4, 15_600, 25.000, 4, 4),
        (RESNET, 0.2, 2, 24_792, 39.731, 2_051, 829),
        (RESNET, 0.25, 4, 12_539, 20.095, 2_876, 2_876),
        (VIT, 0.0, 4, 23_400, 25.000, 4, 4),
        (VIT, 0.0, 8, 11_700, 12.500, 8, 8),
        (VIT, 0.0175, 4, 9_711, 10.375, 8_142, 8_142),
        (VIT, 0.0175, 8, 6_461, 6.903, 6_461, 2_339),
    ],
)
def test_the_eight_counts(
    run: tuple, alpha: float, h_base: int, count: int, percent: float, longest: int, last: int
) -> None:
    peak, total, warm = run
    rate = cosine_lr(peak, total, warmup_steps=warm)
    schedules: list[SyncSchedule] = [QSR(alpha, h_base)] if alpha else [QSR(0.0, h_base), ConstantH(h_base)]
    for schedule in schedules:
        found = schedule.rounds(rate, total, warmup_steps=warm)
        assert len(found) == count
        assert round(100 * len(found) / total, 3) == percent
        assert max(r.length for r in found) == longest
        assert found[-1].length == last
        assert found[-1].start + found[-1].length == total


@pytest.mark.parametrize(
    ("run", "alpha", "h_base", "percent"),
    [
        (RESNET, 0.2, 4, 20.631),
        (RESNET, 0.3, 4, 19.606),
        (VIT, 0.015, 4, 12.311),
        (VIT, 0.02, 4, 8.351),
        (VIT, 0.02, 8, 6.342),
    ],
)
def test_neighbouring_settings(run: tuple, alpha: float, h_base: int, percent: float) -> None:
    peak, total, warm = run
    found = QSR(alpha, h_base).rounds(cosine_lr(peak, total, warmup_steps=warm), total, warmup_steps=warm)
    assert round(100 * len(found) / total, 3) == percent


LINEAR_VIT = zip((0.01, 0.0125, 0.015, 0.0175, 0.02), (16.053, 13.815, 11.577, 9.339, 7.688), strict=True)
LINEAR_2 = zip((0.1, 0.2, 0.25, 0.3), (47.348, 44.691, 43.361, 42.032), strict=True)
LINEAR_4 = zip((0.1, 0.2, 0.25, 0.3), (24.027, 23.051, 22.562, 22.074), strict=True)


@pytest.mark.parametrize(
    ("run", "alpha", "h_base", "percent"),
    [
        *((VIT, alpha, 4, percent) for alpha, percent in LINEAR_VIT),
        *((RESNET, alpha, 2, percent) for alpha, percent in LINEAR_2),
        *((RESNET, alpha, 4, percent) for alpha, percent in LINEAR_4),
    ],
)
def test_linear_decay(run: tuple, alpha: float, h_base: int, percent: float) -> None:
    peak, total, warm = run
    found = QSR(alpha, h_base).rounds(linear_lr(peak, total, warmup_steps=warm), total, warmup_steps=warm)
    assert round(100 * len(found) / total, 3) == percent


@pytest.mark.parametrize(
    ("power", "strength", "percent"),
    [(1, 0.0175, 17.861), (1, 0.03, 15.073), (3, 0.0075, 14.849), (3, 0.01, 12.735), (3, 0.0125, 10.353)],
)
def test_other_powers(power: float, strength: float, percent: float) -> None:
    peak, total, warm = VIT
    rate = cosine_lr(peak, total, warmup_steps=warm)
    found = QSR(strength, 4, power=power).rounds(rate, total, warmup_steps=warm)
    assert round(100 * len(found) / total, 3) == percent


@pytest.mark.parametrize(
    ("epochs", "milestones", "percents"),
    [(90, (30, 60, 80), (22.261, 12.066)), (200, (50, 100, 150), (16.708, 9.056))],
)
def test_step_decay(epochs: int, milestones: tuple[int, ...], percents: tuple[float, float]) -> None:
    total = 312 * epochs
    steps = [312 * m for m in milestones]
    plain, made = (
        truth.staircase(0.8, 1_560, steps),
        step_lr(0.8, total, milestones=steps, warmup_steps=1_560),
    )
    assert all(math.isclose(made(t), plain(t), rel_tol=1e-12) for t in range(total))
    for (alpha, h_base), percent in zip(((0.2, 2), (0.25, 4)), percents, strict=True):
        for rate in (plain, made):
            found = QSR(alpha, h_base).rounds(rate, total, warmup_steps=1_560)
            assert round(100 * len(found) / total, 3) == percent


@pytest.mark.parametrize(
    ("alpha", "percent"), [(0.01, 14.927), (0.0125, 13.406), (0.015, 12.728), (0.0175, 10.556), (0.02, 9.168)]
)
def test_cosine_rounded_to_powers_of_two(alpha: float, percent: float) -> None:
    peak, total, warm = VIT
    rate = truth.powers_of_two(cosine_lr(peak, total, warmup_steps=warm))
    found = QSR(alpha, 4).rounds(rate, total, warmup_steps=warm)
    assert round(100 * len(found) / total, 3) == percent


@pytest.mark.parametrize(
    ("peak", "total", "warm", "alpha", "percents"),
    [
        (1.6, 15_600, 390, 0.2, {2: 42.83, 4: 21.95}),
        (3.2, 15_600, 390, 0.4, {2: 42.83, 4: 21.95}),
        (0.016, 23_400, 2_500, 0.0175, {4: 16.12, 8: 8.83}),
        (0.016, 23_400, 10_000, 0.0175, {4: 19.31, 8: 10.15}),
    ],
)
def test_batch_16384(peak: float, total: int, warm: int, alpha: float, percents: dict[int, float]) -> None:
    for h_base, percent in percents.items():
        found = QSR(alpha, h_base).rounds(cosine_lr(peak, total, warmup_steps=warm), total, warmup_steps=warm)
        assert 100 * len(found) / total == pytest.approx(percent, abs=0.005 + 1e-9)


def test_post_local_runs_of_the_official_scripts() -> None:
    """CIFAR-10: 5 rounds of 600 steps; ImageNet: 300 rounds of 26; the Local SGD sheet, section 5."""
    assert len(ConstantH(600).rounds(lambda t: 0.32, 3_000)) == 5
    assert len(ConstantH(26).rounds(lambda t: 0.16, 7_800)) == 300
