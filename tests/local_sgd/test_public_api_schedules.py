"""Schedules and rates through their public names: the rule, and what must not change it."""

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papercore.local_sgd import (
    QSR,
    SWAP,
    ConstantH,
    PostLocal,
    Round,
    SyncSchedule,
    cosine_lr,
    linear_lr,
)
from tests.local_sgd import public_api_reference as truth

VIT = (0.008, 93_600, 10_000)  # peak rate, steps, warm-up steps


def pairs(found: list[Round]) -> list[tuple[int, int]]:
    return [(r.start, r.length) for r in found]


@pytest.fixture
def quiet() -> Iterator[None]:
    """Random rates may start at so small a value that the long first round is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- learning rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("made", "plain"), [(cosine_lr, truth.cosine), (linear_lr, truth.line)])
@pytest.mark.parametrize(("peak", "total", "warm"), [(0.8, 97, 13), (0.008, 50, 0), (3.0, 7, 1)])
def test_rates_against_their_formula(
    made: Callable, plain: Callable, peak: float, total: int, warm: int
) -> None:
    rate, expected = made(peak, total, warmup_steps=warm), plain(peak, total, warm)
    for t in range(total):
        assert rate(t) == pytest.approx(expected(t), rel=1e-12)
        assert type(rate(t)) is float
    assert rate(warm) == pytest.approx(peak, rel=1e-15)
    if warm:
        assert rate(0) == pytest.approx(1e-6, rel=1e-12), "the warm-up starts at 1e-6, not at 0"


@pytest.mark.parametrize("made", [cosine_lr, linear_lr])
def test_rates_end_at_final(made: Callable) -> None:
    for final in (0.0, 0.01, 0.3):
        rate = made(0.5, 1_000_000, final=final)
        assert rate(999_999) == pytest.approx(final, abs=1e-5)
        assert rate(500_000) == pytest.approx((0.5 + final) / 2, rel=1e-9)


@pytest.mark.parametrize("made", [cosine_lr, linear_lr])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"peak": -0.5}, ("peak", "-0.5")),
        ({"peak": math.nan}, ("peak", "nan")),
        ({"total_steps": 0}, ("total_steps", "0")),
        ({"total_steps": -7}, ("total_steps", "-7")),
        ({"warmup_steps": -3}, ("warmup_steps", "-3")),
        ({"final": -0.25}, ("final", "-0.25")),
    ],
)
def test_rates_refuse_bad_input(made: Callable, arguments: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        made(**{"peak": 0.5, "total_steps": 10, **arguments})
    assert all(word in str(error.value) for word in words), str(error.value)


# ---- the rule (V1, V3 - V7) ------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> dict:
    total = draw(st.integers(1, 60))
    rates = draw(st.lists(st.floats(1e-3, 2.0), min_size=total, max_size=total))
    return {
        "total": total,
        "rates": rates,
        "warm": draw(st.integers(0, total)),
        "alpha": draw(st.one_of(st.just(0.0), st.floats(0.01, 3.0))),
        "h_base": draw(st.integers(1, 9)),
        "power": draw(st.sampled_from([0.5, 1.0, 2.0, 2.5, 3.0])),
    }


@given(problems())
def test_rounds_follow_the_rule(problem: dict) -> None:
    total, rates, warm = problem["total"], problem["rates"], problem["warm"]
    schedule = QSR(problem["alpha"], problem["h_base"], power=problem["power"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pairs(schedule.rounds(rates.__getitem__, total, warmup_steps=warm))
        again = pairs(schedule.rounds(rates.__getitem__, total, warmup_steps=warm))
    options = {key: problem[key] for key in ("warm", "alpha", "h_base", "power")}
    assert found == truth.rounds(rates.__getitem__, total, **options)
    assert found == again, "a schedule keeps nothing from one call to the next"


SCHEDULES = st.one_of(
    st.builds(ConstantH, st.integers(1, 12)),
    st.builds(QSR, st.floats(0, 3), st.integers(1, 8)),
    st.builds(PostLocal, st.integers(0, 50), st.integers(1, 12)),
    st.builds(SWAP, st.integers(0, 50)),
)


@given(SCHEDULES, problems())
def test_rounds_tile_the_run(schedule: SyncSchedule, problem: dict) -> None:
    """V1: the rounds follow one another, none is empty, and the last ends exactly at the total."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = schedule.rounds(problem["rates"].__getitem__, problem["total"], warmup_steps=problem["warm"])
    position = 0
    for r in found:
        assert type(r.start) is int and type(r.length) is int
        assert r.start == position and r.length >= 1
        position += r.length
    assert position == problem["total"]


@given(problems())
def test_only_the_last_round_may_be_below_the_base(problem: dict) -> None:
    schedule = QSR(problem["alpha"], problem["h_base"], power=problem["power"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = schedule.rounds(problem["rates"].__getitem__, problem["total"], warmup_steps=problem["warm"])
    assert all(r.length >= problem["h_base"] for r in found[:-1])


@given(problems())
def test_rounds_do_not_shrink_while_the_rate_falls(problem: dict) -> None:
    """V3."""
    falling = sorted(problem["rates"], reverse=True)
    schedule = QSR(problem["alpha"], problem["h_base"], power=problem["power"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = schedule.rounds(falling.__getitem__, problem["total"], warmup_steps=problem["warm"])
    lengths = [r.length for r in found[:-1]]
    assert lengths == sorted(lengths)


@given(problems())
def test_alpha_zero_is_constant(problem: dict) -> None:
    """V4."""
    total, warm, rate = problem["total"], problem["warm"], problem["rates"].__getitem__
    for h in (1, problem["h_base"]):
        found = QSR(0.0, h, power=problem["power"]).rounds(rate, total, warmup_steps=warm)
        assert found == ConstantH(h).rounds(rate, total, warmup_steps=warm)
        assert len(found) == math.ceil(total / h)
    assert QSR(0.0, 1).rounds(rate, total) == [Round(t, 1) for t in range(total)]


@given(problems(), st.integers(-12, 12))
def test_scale_invariance(problem: dict, exponent: int) -> None:
    """V5: only alpha / eta counts; exact for a power of two."""
    c = 2.0**exponent
    total, warm = problem["total"], problem["warm"]
    scaled = [c * r for r in problem["rates"]]
    one = QSR(problem["alpha"], problem["h_base"], power=problem["power"])
    other = QSR(c * problem["alpha"], problem["h_base"], power=problem["power"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = one.rounds(problem["rates"].__getitem__, total, warmup_steps=warm)
        second = other.rounds(scaled.__getitem__, total, warmup_steps=warm)
    assert first == second


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.7, 1e-3, 1 / 3])
def test_powers_agree_where_the_ratio_is_one(rate: float) -> None:
    """V6: (alpha / eta)^gamma is 1 for every gamma."""
    for power in (1, 1.0, 2.0, 3.0):
        assert QSR(rate, 1, power=power).next_h(5, rate) == 1
        assert QSR(rate, 1, power=power).rounds(lambda t: rate, 7) == [Round(t, 1) for t in range(7)]
        assert QSR(rate, 3, power=power).next_h(5, rate) == 3


def test_powers_order_the_lengths_above_one() -> None:
    lengths = [QSR(0.5, 1, power=p).next_h(0, 0.1) for p in (1, 2, 3)]
    assert lengths == [5, 25, 125]
    assert QSR(0.5, 1).next_h(0, 0.1) == 25, "the default is the square"


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("unit", [0.1, 0.01, 0.3, 0.7, 1e-4])
def test_exact_powers_do_not_lose_a_step_to_rounding(power: int, unit: float) -> None:
    """(0.3 / 0.1)^2 is 8.999999999999998 in floating point; the guard of section 2 gives 9."""
    for ratio in range(1, 41):
        assert QSR(ratio * unit, 1, power=power).next_h(0, unit) == ratio**power
    assert QSR(0.3, 1).next_h(0, 0.1) == 9


def test_the_floor_is_a_floor() -> None:
    assert QSR(0.0175, 1).next_h(0, 0.008) == 4, "4.785 is cut, not rounded"
    assert QSR(0.0175, 1).next_h(0, 0.0175 / 3.15) == 9, "9.92 is cut, and not to a power of two"
    assert QSR(0.0999, 1).next_h(0, 0.05) == 3, "3.992"


def test_the_rate_is_that_of_the_first_step_of_the_round() -> None:
    rates = [1.0, 1.0, 0.5, 0.25, 0.25, 0.25, 0.1, 1.0, 1.0, 1.0, 1.0]
    # rounds begin at 0 (H 1), 1 (H 1), 2 (rate 1/2: H 4), 6 (rate 0.1: H 100, cut to the 5 that are left)
    assert pairs(QSR(1.0, 1).rounds(rates.__getitem__, 11)) == [(0, 1), (1, 1), (2, 4), (6, 5)]


# ---- warm-up (V7) ----------------------------------------------------------------------------------------------------


def test_warm_up_never_uses_the_formula() -> None:
    peak, total, warm = VIT
    rate = cosine_lr(peak, total, warmup_steps=warm)
    found = QSR(0.0175, 4).rounds(rate, total, warmup_steps=warm)
    assert all(r.length == 4 for r in found if r.start < warm)
    assert pairs(found[:3]) == [(0, 4), (4, 4), (8, 4)]


def test_the_disaster_without_warm_up_steps_is_warned_of() -> None:
    """eta_0 = 1e-6 gives H of 3e8: one synchronization in the whole run."""
    peak, total, warm = VIT
    rate = cosine_lr(peak, total, warmup_steps=warm)
    with pytest.warns(UserWarning, match="first round") as caught:
        found = QSR(0.0175, 4).rounds(rate, total)
    assert pairs(found) == [(0, total)]
    text = str(caught[0].message)
    assert "93600" in text.replace(",", "").replace("_", "") and "warmup_steps" in text, text


def test_a_round_begun_in_warm_up_keeps_its_length() -> None:
    rate = lambda t: 0.5 if t < 5 else 0.1  # noqa: E731
    found = QSR(0.3, 4).rounds(rate, 30, warmup_steps=5)
    assert pairs(found) == [(0, 4), (4, 4), (8, 9), (17, 9), (26, 4)]


def test_a_rate_of_zero_inside_warm_up_keeps_the_base() -> None:
    rate = lambda t: 0.1 * t / 6 if t < 6 else 0.1  # noqa: E731
    assert pairs(QSR(0.2, 2).rounds(rate, 14, warmup_steps=6)) == [(0, 2), (2, 2), (4, 2), (6, 4), (10, 4)]


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
def test_a_rate_of_zero_takes_the_remaining_steps() -> None:
    assert pairs(QSR(0.2, 2).rounds(lambda t: 0.1 if t < 8 else 0.0, 50)) == [(0, 4), (4, 4), (8, 42)]
    assert pairs(QSR(0.2, 2).rounds(lambda t: 0.0, 50)) == [(0, 50)]
    assert QSR(0.2, 2).next_h(8, 0.0, total_steps=50) == 42


def test_a_rate_of_zero_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="(?i)total_steps|min_lr|end"):
        QSR(0.2, 2).next_h(8, 0.0)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1e-160])
def test_a_tiny_rate_does_not_overflow(rate: float) -> None:
    for power in (1, 2.0, 3.0):
        assert QSR(0.2, 2, power=power).next_h(10, rate, total_steps=50) == 40
        assert pairs(QSR(0.2, 2, power=power).rounds(lambda t: rate, 50)) == [(0, 50)]


@pytest.mark.parametrize(("rate", "text"), [(math.nan, "nan"), (-0.125, "-0.125")])
def test_no_rate_at_the_start_of_a_round(rate: float, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        QSR(0.2, 2).rounds(lambda t: 0.1 if t < 8 else rate, 50)
    with pytest.raises(ValueError, match=text):
        QSR(0.2, 2).next_h(8, rate, total_steps=50)


def test_a_bad_rate_inside_a_round_is_not_asked_for() -> None:
    """Only the first step of a round counts."""
    assert pairs(QSR(0.2, 2).rounds(lambda t: 0.1 if t % 4 == 0 else math.nan, 12)) == [
        (0, 4),
        (4, 4),
        (8, 4),
    ]


@given(problems())
def test_next_h_walks_the_same_rounds(problem: dict) -> None:
    total, warm, rates = problem["total"], problem["warm"], problem["rates"]
    schedule = QSR(problem["alpha"], problem["h_base"], power=problem["power"])
    walked, t = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while t < total:
            h = schedule.next_h(t, rates[t], total_steps=total, warmup_steps=warm)
            walked.append(Round(t, h))
            t += h
        assert walked == schedule.rounds(rates.__getitem__, total, warmup_steps=warm)


def test_next_h_is_uncut_without_a_total() -> None:
    assert QSR(1.0, 2).next_h(95, 0.01) == 10_000
    assert QSR(1.0, 2).next_h(95, 0.01, total_steps=100) == 5
    assert ConstantH(8).next_h(95, 0.01) == 8
    assert ConstantH(8).next_h(95, 0.01, total_steps=100) == 5


# ---- post-local and SWAP ---------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 40))
def test_post_local_is_one_until_the_switch(switch: int, h: int, total: int) -> None:
    found = pairs(PostLocal(switch, h).rounds(lambda t: 0.1, total))
    head = [(t, 1) for t in range(min(switch, total))]
    tail = [(t, min(h, total - t)) for t in range(switch, total, h)]
    assert found == head + tail


@given(st.integers(0, 40), st.integers(1, 40))
def test_swap_averages_once_at_the_end(switch: int, total: int) -> None:
    found = pairs(SWAP(switch).rounds(lambda t: 0.1, total))
    assert found == [(t, 1) for t in range(min(switch, total))] + (
        [(switch, total - switch)] if switch < total else []
    )


# ---- refused input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QSR(-0.25, 2), ("alpha", "-0.25")),
        (lambda: QSR(math.nan, 2), ("alpha", "nan")),
        (lambda: QSR(0.2, 0), ("h_base", "0")),
        (lambda: QSR(0.2, -3), ("h_base", "-3")),
        (lambda: QSR(0.2, 2.5), ("h_base", "2.5")),
        (lambda: QSR(0.2, 2, power=0.0), ("power", "0")),
        (lambda: QSR(0.2, 2, power=-2.0), ("power", "-2")),
        (lambda: QSR(0.2, 2, power=math.nan), ("power", "nan")),
        (lambda: ConstantH(0), ("h", "0")),
        (lambda: ConstantH(-4), ("h", "-4")),
        (lambda: ConstantH(3.5), ("h", "3.5")),
        (lambda: PostLocal(-1, 4), ("switch_step", "-1")),
        (lambda: PostLocal(5, 0), ("h", "0")),
        (lambda: PostLocal(5, 1.5), ("h", "1.5")),
        (lambda: SWAP(-2), ("switch_step", "-2")),
        (lambda: ConstantH(4).rounds(lambda t: 0.1, -5), ("total_steps", "-5")),
        (lambda: ConstantH(4).rounds(lambda t: 0.1, 5, warmup_steps=-2), ("warmup_steps", "-2")),
    ],
)
def test_wrong_values_are_named(make: Callable, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: QSR("0.2", 2), "alpha"),
        (lambda: QSR(0.2, "2"), "h_base"),
        (lambda: QSR(0.2, 2, power="square"), "power"),
        (lambda: ConstantH("four"), "h"),
        (lambda: ConstantH(None), "h"),
        (lambda: PostLocal("10", 4), "switch_step"),
    ],
)
def test_wrong_kinds_are_named(make: Callable, name: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert name in str(error.value)


def test_power_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        QSR(0.2, 2, 3.0)
