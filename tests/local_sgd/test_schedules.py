"""Schedules against the definition written out by hand, and their errors as text."""

import math
import warnings

import pytest

from papercore.local_sgd import QSR, SWAP, ConstantH, PiecewiseH, PostLocal, Round, cosine_lr
from papercore.local_sgd.schedules import SyncSchedule


def by_hand(alpha: float, h_base: int, power: float, lr_fn, total: int, warmup: int) -> list[int]:
    """The rule as a loop over single steps, as a training loop meets it: count down, then ask again."""
    lengths, left = [], 0
    for step in range(total):
        if left == 0:
            h = h_base
            if step >= warmup and alpha > 0:
                h = max(h_base, math.floor((alpha / lr_fn(step)) ** power * (1 + 1e-12)))
            left = min(h, total - step)
            lengths.append(left)
        left -= 1
    return lengths


@pytest.mark.parametrize("power", [1, 2, 3, 1.5])
@pytest.mark.parametrize(("warmup", "h_base"), [(0, 1), (37, 4)])
def test_qsr_is_the_rule_written_out(power: float, warmup: int, h_base: int) -> None:
    lr_fn = cosine_lr(0.5, 900, warmup_steps=warmup)
    rounds = QSR(0.9, h_base, power=power).rounds(lr_fn, 900, warmup_steps=warmup)
    assert [r.length for r in rounds] == by_hand(0.9, h_base, power, lr_fn, 900, warmup)
    assert [r.start for r in rounds] == [sum(x.length for x in rounds[:i]) for i in range(len(rounds))]


def test_a_whole_quotient_counts_as_whole() -> None:
    assert (0.3 / 0.1) ** 2 < 9
    assert QSR(0.3, 1).next_h(0, 0.1) == 9


def test_a_round_that_starts_in_warm_up_keeps_its_length() -> None:
    rounds = QSR(0.5, 7).rounds(lambda step: 0.1, 40, warmup_steps=10)
    assert rounds[:3] == [Round(0, 7), Round(7, 7), Round(14, 25)]


def test_rate_of_the_first_step_of_the_round_decides() -> None:
    asked: list[int] = []

    def lr_fn(step: int) -> float:
        asked.append(step)
        return 0.1

    rounds = QSR(0.2, 1).rounds(lr_fn, 10)
    assert asked[: len(rounds)] == [r.start for r in rounds] == [0, 4, 8]


@pytest.mark.parametrize("lr", [0.0, 1e-320, 1e-300])
def test_no_rate_to_speak_of_takes_the_rest(lr: float) -> None:
    assert QSR(0.02, 4).next_h(90, lr, total_steps=100) == 10
    with pytest.raises(ValueError, match="undefined without total_steps"):
        QSR(0.02, 4).next_h(90, lr)


def test_post_local_swap_and_pieces() -> None:
    lr_fn = lambda step: 0.1  # noqa: E731
    assert [r.length for r in PostLocal(3, 4).rounds(lr_fn, 12)] == [1, 1, 1, 4, 4, 1]
    assert [r.length for r in PostLocal(2, QSR(0.2, 1)).rounds(lr_fn, 12)] == [1, 1, 4, 4, 2]
    assert [r.length for r in SWAP(2).rounds(lr_fn, 12)] == [1, 1, 10]
    assert [r.length for r in PiecewiseH([(0, 4), (6, 3)]).rounds(lr_fn, 12)] == [4, 2, 3, 3]


def test_warns_of_a_first_round_that_swallows_the_run() -> None:
    with pytest.warns(UserWarning, match=r"first round would last 900 of 900 steps.*warmup_steps"):
        QSR(0.1, 4).rounds(cosine_lr(0.1, 900, warmup_steps=90), 900)  # the rule is not told of the warm-up
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QSR(1.0, 4).rounds(lambda step: 0.1, 900)  # long on purpose: the rate does not start low


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: ConstantH(0), ValueError, "h = 0: expected a whole number >= 1"),
        (lambda: ConstantH(2.5), ValueError, "h = 2.5: expected a whole number"),
        (lambda: ConstantH("4"), TypeError, "h must be a whole number, got '4'"),
        (lambda: ConstantH(True), TypeError, "h must be a whole number"),
        (lambda: QSR(-0.1, 4), ValueError, "alpha = -0.1"),
        (lambda: QSR(math.nan, 4), ValueError, "alpha = nan"),
        (lambda: QSR(0.1, 0), ValueError, "h_base = 0"),
        (lambda: QSR(0.1, 4, power=0), ValueError, "power = 0.0"),
        (lambda: QSR("a", 4), TypeError, "alpha must be a number"),
        (lambda: PostLocal(-1, 4), ValueError, "switch_step = -1"),
        (lambda: PostLocal(1, 0), ValueError, "h = 0"),
        (lambda: SWAP(0.5), ValueError, "switch_step = 0.5"),
        (lambda: PiecewiseH([]), ValueError, "at least one"),
        (lambda: PiecewiseH([(1, 4)]), ValueError, "start at step 0"),
        (lambda: PiecewiseH([(0, 4), (5, 2), (5, 3)]), ValueError, "go up"),
        (lambda: ConstantH(4).rounds(0.1, 10), TypeError, "lr_fn must be a function"),
        (lambda: ConstantH(4).rounds(lambda s: 0.1, 0), ValueError, "total_steps = 0"),
        (lambda: ConstantH(4).rounds(lambda s: 0.1, 4, warmup_steps=5), ValueError, "more than total_steps"),
        (lambda: QSR(0.1, 4).rounds(lambda s: math.nan, 4), ValueError, "lr is nan at step 0"),
        (lambda: QSR(0.1, 4).rounds(lambda s: -0.1, 4), ValueError, "lr is -0.1 at step 0"),
        (lambda: ConstantH(4).next_h(10, 0.1, total_steps=10), ValueError, "not before total_steps"),
        (lambda: SWAP(0).next_h(0, 0.1), ValueError, "undefined without total_steps"),
    ],
)
def test_errors(make, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


def test_a_schedule_of_ones_own() -> None:
    class Doubling(SyncSchedule):
        def _length(self, step: int, lr: float, left: int | None, warmup_steps: int) -> int:
            return step + 1

    assert [r.length for r in Doubling().rounds(lambda s: 0.1, 12)] == [1, 2, 4, 5]
