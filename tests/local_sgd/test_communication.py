"""What a schedule communicates: counts by hand, the cost model against runs made from it, errors as text."""

import math

import pytest
import torch

from papercore.local_sgd import (
    QSR,
    ConstantH,
    CostModel,
    communication_volume,
    constant_lr,
    cosine_lr,
    linear_lr,
    power_of_two_lr,
    step_lr,
)


def test_counts_and_bytes() -> None:
    report = communication_volume(ConstantH(4), lambda step: 0.1, 10)
    assert (report.rounds, report.fraction, report.longest, report.last) == (3, 0.3, 4, 2)
    assert report.bytes_per_rank(1000, k=4, algorithm="payload") == 3 * 4000
    # Ring: every rank sends K - 1 of K parts twice, once to add up and once to hand out.
    assert report.bytes_per_rank(1000, k=4) == 3 * 2 * 3 * 1000
    assert report.bytes_per_rank(1000, k=1) == 0
    assert report.hours(1.8, 3.6) == pytest.approx((10 * 1.8 + 3 * 3.6) / 3600)


def test_cost_model_gives_back_what_runs_were_made_of() -> None:
    true = CostModel(0.02, 0.15)
    lr = cosine_lr(0.5, 1000)
    reports = [communication_volume(s, lr, 1000) for s in (ConstantH(1), ConstantH(4), QSR(0.8, 2))]
    fitted = CostModel.fit([(r.steps, r.rounds, true.seconds(r)) for r in reports[:2]])
    assert fitted.t_step == pytest.approx(0.02, rel=1e-9) and fitted.t_sync == pytest.approx(0.15, rel=1e-9)
    assert fitted.seconds(reports[2]) == pytest.approx(true.seconds(reports[2]), rel=1e-9)
    assert true.share(reports[0]) == pytest.approx(0.15 / 0.17)


def test_cost_model_of_the_papers_hours() -> None:
    # 26.7 h at 100 % and 20.2 h at 10.375 % of the communication: S = 6.5 / (1 - 0.10375), C = 26.7 - S.
    fitted = CostModel.fit([(93_600, 93_600, 26.7), (93_600, 9_711, 20.2)])
    assert fitted.t_sync * 93_600 == pytest.approx(7.25, abs=0.01)
    assert fitted.t_step * 93_600 == pytest.approx(19.45, abs=0.01)


@pytest.mark.parametrize(("kind", "torch_class"), [("cosine", "CosineAnnealingLR"), ("linear", "LinearLR")])
def test_rates_agree_with_torch(kind: str, torch_class: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    if kind == "cosine":
        ours = cosine_lr(0.5, 50, final=0.01)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.01)
    else:
        ours = linear_lr(0.5, 50, final=0.01)
        theirs = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=50)
    for step in range(50):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), torch_class
        optimizer.step()
        theirs.step()


def test_warm_up_climbs_from_the_start_to_the_peak() -> None:
    lr = constant_lr(0.4, 100, warmup_steps=4, start=0.0)
    assert [lr(step) for step in range(6)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert lr(100) == 0.4


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: cosine_lr(-1, 10), ValueError, "peak = -1.0"),
        (lambda: cosine_lr(0.1, 0), ValueError, "total_steps = 0"),
        (lambda: cosine_lr(0.1, 10, warmup_steps=10), ValueError, "fewer than total_steps = 10"),
        (lambda: cosine_lr(0.1, 10, final=0.2), ValueError, "from 0 to peak"),
        (lambda: cosine_lr(0.1, 10)(11), ValueError, "step 11 is outside"),
        (lambda: step_lr(0.1, 10, milestones=[4, 2]), ValueError, "increasing"),
        (lambda: step_lr(0.1, 10, factor=0), ValueError, "factor = 0"),
        (lambda: power_of_two_lr(cosine_lr(0.1, 10), base=1), ValueError, "base = 1"),
        (lambda: communication_volume("QSR", lambda s: 0.1, 10), TypeError, "must be a SyncSchedule"),
        (
            lambda: communication_volume(ConstantH(1), lambda s: 0.1, 10).hours(-1, 0),
            ValueError,
            "t_step = -1.0",
        ),
        (
            lambda: communication_volume(ConstantH(1), lambda s: 0.1, 9).bytes_per_rank(
                9, k=2, algorithm="tree"
            ),
            ValueError,
            "expected one of ring, payload",
        ),
        (lambda: CostModel.fit([(10, 10, 1.0)]), ValueError, "at least two runs"),
        (lambda: CostModel.fit([(10, 10, 1.0), (20, 20, 2.0)]), ValueError, "different rounds per step"),
        (lambda: CostModel.fit([(10, 10, 1.0), (10, 5, 2.0)]), ValueError, "negative"),
        (lambda: CostModel(math.nan, 1), ValueError, "t_step = nan"),
    ],
)
def test_errors(make, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)
