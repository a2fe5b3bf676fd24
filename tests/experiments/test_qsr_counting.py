"""What the chapter counts, against numbers worked out apart and a plain training loop's counter; and the control's closed forms."""

from __future__ import annotations

import pytest

from papercore.experiments.qsr import counting, play
from papercore.experiments.qsr.recipes import NEIGHBOURS, ROWS, Recipe, named, predictions, resnet, vit
from papercore.local_sgd import QSR, ConstantH, communication_volume, constant_lr, cosine_lr

# Rounds of the eight rows at B = 4,096, computed by another program.
ROUNDS = (31_200, 24_792, 15_600, 12_539, 23_400, 9_711, 11_700, 6_461)
SHARES = {
    ("ViT-B, linear decay", 0.0175): 9.339,
    ("ViT-B, cosine rounded to powers of 2", 0.0175): 10.556,
    ("ResNet-152, steps at 30/60/80 of 90 epochs", 0.2): 22.261,
    ("ResNet-152, steps at 50/100/150 of 200 epochs", 0.25): 9.056,
    ("ViT-B, 1/η rule", 0.0175): 17.861,
    ("ViT-B, cubic rule", 0.0125): 10.353,
}


def test_the_eight_rows_have_their_rounds():
    assert tuple(row.recipe.volume(row.schedule).rounds for row in ROWS) == ROUNDS


def test_predictions_have_the_shares_that_another_program_gave():
    found = {
        (text, schedule.alpha): 100 * recipe.volume(schedule).fraction
        for text, recipe, schedule in predictions()
        if (text, schedule.alpha) in SHARES
    }
    assert found == {key: pytest.approx(value, abs=6e-4) for key, value in SHARES.items()}


@pytest.mark.parametrize("schedule", [ConstantH(3), QSR(0.4, 2), QSR(0.9, 1, power=1), QSR(0.2, 4, power=3)])
@pytest.mark.parametrize("warmup", [0, 30])
def test_a_plain_loop_counts_the_same_rounds(schedule, warmup):
    recipe = Recipe(cosine_lr(0.5, 301, warmup_steps=warmup, start=0.1), 301, warmup)
    assert counting.literal_rounds(recipe, schedule) == recipe.volume(schedule).rounds


def test_the_check_of_the_rule_notices_a_wrong_rule(monkeypatch):
    assert counting.rule_mismatches(300) == 0
    right = QSR.next_h
    monkeypatch.setattr(QSR, "next_h", lambda self, step, lr: right(self, step, lr) + (lr < 0.003))
    assert counting.rule_mismatches(300) > 0


def test_neighbouring_settings_are_no_rows_of_the_table():
    rows = {(row.model, row.schedule) for row in ROWS}
    assert not any((model, QSR(alpha, h_base)) in rows for model, alpha, h_base in NEIGHBOURS)


def test_schedules_have_names():
    assert [named(s) for s in (ConstantH(4), QSR(0.2, 2), QSR(0.03, 4, power=1), QSR(1, 4, power=3))] == [
        "H = 4",
        "QSR, 0.2, H ≥ 2",
        "1/η rule, 0.03, H ≥ 4",
        "cubic rule, 1, H ≥ 4",
    ]


def test_recipes_are_those_of_the_scripts():
    assert (resnet().steps, resnet().warmup, resnet().lr(1560)) == (62_400, 1_560, 0.8)
    assert (vit().steps, vit().warmup, vit().lr(10_000)) == (93_600, 10_000, 0.008)
    assert resnet("step", at=(50, 100, 150)).lr(50 * 312) == pytest.approx(0.08)


def test_the_control_knows_hours_from_bytes_and_bandwidth():
    # 86,567,656 weights of 4 bytes once over the link of two nodes: 2.77 Gbit.
    assert play.sync_seconds(1) == pytest.approx(86_567_656 * 32 / 1e9)
    parallel = communication_volume(ConstantH(1), constant_lr(1.0, play.STEPS), play.STEPS)
    expected = 93_600 * (play.STEP_SECONDS + play.sync_seconds(25)) / 3600
    assert play.hours(parallel, 25) == pytest.approx(expected)
    # A wire of infinite speed leaves the computation, about the 19.5 hours that the paper's own numbers leave for it.
    assert play.hours(parallel, 1e12) == pytest.approx(19.5)


def test_the_control_thins_the_run_and_keeps_the_share():
    whole = vit().volume(QSR(0.0175, 4)).fraction
    assert play.report("QSR (1/η²)", 0.0175 / 0.008, 4, "cosine").fraction == pytest.approx(whole, abs=0.004)
    steps, heights = play.heights(play.report("constant H", 1.0, 8, "linear"), 14)
    assert set(heights[:-1]) == {8.0} and steps[0] == 0.0 and len(steps) == 14


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: play.schedule("QRS", 1.0, 4, 1.0), "unknown rule 'QRS'"),
        (lambda: play.report("QSR (1/η²)", 1.0, 4, "cosin"), "unknown decay 'cosin'"),
        (lambda: play.sync_seconds(0), "bandwidth is 0 Gbit/s: expected a finite number above 0."),
    ],
)
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
