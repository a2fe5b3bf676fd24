"""Accounting through public names: rounds, share of data parallel, bytes on the wire, hours."""

import math
import warnings
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papercore.local_sgd import (
    QSR,
    SWAP,
    ConstantH,
    CostModel,
    PostLocal,
    communication_volume,
    cosine_lr,
)
from tests.local_sgd import public_api_reference as truth

STEPS, WARM = 93_600, 10_000
VIT = cosine_lr(0.008, STEPS, warmup_steps=WARM)
RESNET_PARAMS = 60_192_808


@pytest.mark.parametrize(
    ("alpha", "h_base", "count", "percent"), [(0.0175, 4, 9_711, 10.375), (0.0175, 8, 6_461, 6.903)]
)
def test_vit_of_the_paper(alpha: float, h_base: int, count: int, percent: float) -> None:
    report = communication_volume(QSR(alpha, h_base), VIT, STEPS, warmup_steps=WARM)
    assert report.rounds == count and type(report.rounds) is int
    assert report.fraction == count / STEPS and type(report.fraction) is float
    assert round(100 * report.fraction, 3) == percent


@pytest.mark.parametrize(("alpha", "h_base", "published"), [(0.2, 2, 39.7), (0.25, 4, 20.1)])
def test_resnet_of_the_paper(alpha: float, h_base: int, published: float) -> None:
    rate = cosine_lr(0.8, 62_400, warmup_steps=1_560)
    report = communication_volume(QSR(alpha, h_base), rate, 62_400, warmup_steps=1_560)
    assert round(100 * report.fraction, 1) == published


@pytest.mark.parametrize(("h", "total"), [(1, 100), (4, 100), (7, 100), (600, 3_000), (200, 100)])
def test_constant_h(h: int, total: int) -> None:
    report = communication_volume(ConstantH(h), lambda t: 0.1, total)
    assert report.rounds == math.ceil(total / h)
    assert report.fraction == math.ceil(total / h) / total


def test_data_parallel_is_one() -> None:
    assert communication_volume(ConstantH(1), lambda t: 0.1, 17).fraction == 1.0


def test_post_local_and_swap() -> None:
    assert communication_volume(PostLocal(60, 10), lambda t: 0.1, 100).rounds == 64
    assert communication_volume(SWAP(60), lambda t: 0.1, 100).rounds == 61


def test_constants_of_the_official_scripts() -> None:
    """The Local SGD sheet, section 5: 0.167 % and 3.846 % of data parallel."""
    assert round(100 * communication_volume(ConstantH(600), lambda t: 0.32, 3_000).fraction, 3) == 0.167
    assert round(100 * communication_volume(ConstantH(26), lambda t: 0.16, 7_800).fraction, 3) == 3.846


@given(
    st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=50),
    st.floats(0.0, 2.0),
    st.integers(1, 6),
    st.data(),
)
def test_report_counts_the_rounds(rates: list[float], alpha: float, h_base: int, data: st.DataObject) -> None:
    total = len(rates)
    warm = data.draw(st.integers(0, total))
    plain = truth.rounds(rates.__getitem__, total, warm=warm, alpha=alpha, h_base=h_base, power=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = communication_volume(QSR(alpha, h_base), rates.__getitem__, total, warmup_steps=warm)
    assert report.rounds == len(plain)
    assert report.fraction == len(plain) / total
    assert 0 < report.fraction <= 1
    assert report.longest == max(length for _, length in plain)
    assert report.last == plain[-1][1]


@pytest.mark.parametrize("k", [2, 3, 8, 16])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_bytes_of_the_ring(k: int, itemsize: int) -> None:
    report = communication_volume(ConstantH(4), lambda t: 0.1, 62_400)
    expected = 15_600 * 2 * (k - 1) / k * itemsize * RESNET_PARAMS
    assert report.bytes_per_rank(RESNET_PARAMS, k=k, itemsize=itemsize) == pytest.approx(expected, rel=1e-9)


def test_one_worker_sends_nothing() -> None:
    report = communication_volume(ConstantH(4), lambda t: 0.1, 100)
    assert report.bytes_per_rank(1_000, k=1, itemsize=4) == 0


def test_ratio_of_bytes_is_the_fraction() -> None:
    """One sync moves the vector once, as data parallel moves the gradient once."""
    local = communication_volume(QSR(0.0175, 4), VIT, STEPS, warmup_steps=WARM)
    for k in (2, 16):
        sent = [report.bytes_per_rank(10_000, k=k, itemsize=4) for report in (local, PARALLEL)]
        assert sent[0] / sent[1] == pytest.approx(local.fraction, rel=1e-9)


def test_hours() -> None:
    report = communication_volume(QSR(0.0175, 4), VIT, STEPS, warmup_steps=WARM)
    expected = (STEPS * 0.75 + 9_711 * 0.28) / 3600
    assert report.hours(0.75, 0.28) == pytest.approx(expected, rel=1e-12)
    assert report.hours(0.75, 0.0) == pytest.approx(STEPS * 0.75 / 3600, rel=1e-12)


PARALLEL = communication_volume(ConstantH(1), VIT, STEPS, warmup_steps=WARM)

# ---- the cost model --------------------------------------------------------------------------------------------------


def test_decomposition_of_the_published_hours() -> None:
    """26.7 h and 20.2 h on 16 GPUs at 10.375 %: S = 7.25 h of communication, C = 19.45 h (sheet, section 4)."""
    model = CostModel.fit([(STEPS, STEPS, 26.7 * 3600), (STEPS, 9_711, 20.2 * 3600)])
    assert model.t_sync * STEPS / 3600 == pytest.approx(7.25, abs=0.005)
    assert model.t_step * STEPS / 3600 == pytest.approx(19.45, abs=0.005)
    assert model.seconds(PARALLEL) == pytest.approx(26.7 * 3600, rel=1e-9)
    assert pytest.approx(model.share(PARALLEL), abs=0.001) == 7.25 / 26.7


@given(st.floats(1e-4, 10), st.floats(1e-4, 10), st.integers(2, 50), st.integers(1, 100))
def test_fit_on_two_runs_follows_the_sheet(t_step: float, t_sync: float, h: int, scale: int) -> None:
    """S = (T_par - T_H) H / (H - 1), C = T_par - S; then any other schedule is C + S R / T."""
    steps = h * scale
    parallel, local = steps * (t_step + t_sync), steps * t_step + scale * t_sync
    s = (parallel - local) * h / (h - 1)
    model = CostModel.fit([(steps, steps, parallel), (steps, scale, local)])
    tolerance = 1e-6 * (t_step + t_sync)
    assert model.t_sync == pytest.approx(s / steps, abs=tolerance)
    assert model.t_step == pytest.approx((parallel - s) / steps, abs=tolerance)
    other = communication_volume(PostLocal(2, 3), lambda t: 0.1, steps)
    assert model.seconds(other) == pytest.approx(steps * t_step + other.rounds * t_sync, rel=1e-6)


def test_fit_on_many_runs_is_least_squares() -> None:
    runs = [(100, 100, 31.0), (100, 50, 19.0), (100, 25, 15.5), (200, 10, 22.0)]
    model = CostModel.fit(runs)

    def error(t_step: float, t_sync: float) -> float:
        return sum((n * t_step + r * t_sync - seconds) ** 2 for n, r, seconds in runs)

    best = error(model.t_step, model.t_sync)
    for d_step, d_sync in [(1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (1e-3, -1e-3)]:
        assert error(model.t_step + d_step, model.t_sync + d_sync) > best


@pytest.mark.parametrize(
    "runs",
    [[], [(100, 100, 30.0)], [(100, 50, 30.0), (200, 100, 60.0)], [(100, 100, 10.0), (100, 25, 15.0)]],
)
def test_fit_refuses_runs_that_cannot_tell(runs: list) -> None:
    with pytest.raises(ValueError, match="(?i)run"):
        CostModel.fit(runs)


# ---- refused input ---------------------------------------------------------------------------------------------------

REPORT = communication_volume(ConstantH(4), lambda t: 0.1, 100)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: REPORT.bytes_per_rank(0, k=2), ("num_params", "0")),
        (lambda: REPORT.bytes_per_rank(10, k=0), ("k", "0")),
        (lambda: REPORT.bytes_per_rank(10, k=2, itemsize=0), ("itemsize", "0")),
        (lambda: REPORT.hours(-1.5, 1.0), ("-1.5",)),
        (lambda: REPORT.hours(1.0, -0.5), ("t_sync", "-0.5")),
        (lambda: REPORT.hours(math.nan, 1.0), ("nan",)),
        (lambda: communication_volume(ConstantH(4), lambda t: 0.1, 0), ("total_steps", "0")),
        (
            lambda: communication_volume(ConstantH(4), lambda t: 0.1, 9, warmup_steps=-1),
            ("warmup_steps", "-1"),
        ),
        (lambda: communication_volume(QSR(1, 4), lambda t: math.nan, 9), ("nan",)),
    ],
)
def test_wrong_values_are_named(call: Callable, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("schedule", [4, "qsr", None])
def test_a_schedule_is_a_schedule(schedule: object) -> None:
    with pytest.raises(TypeError, match="schedule"):
        communication_volume(schedule, lambda t: 0.1, 9)


def test_warm_up_steps_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        communication_volume(ConstantH(4), lambda t: 0.1, 9, 3)
