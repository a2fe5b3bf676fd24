"""Calibration errors against hand examples, a plain loop and known limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from papercore.grafting import calibration_interval, expected_calibration_error, fit_temperature, reliability
from tests.grafting.reference import seeded


def plain_ece(probs: Tensor, labels: Tensor, bins: int) -> float:
    """The definition, bin by bin, left open and right closed."""
    conf, guess = probs.max(1)
    error = 0.0
    for m in range(1, bins + 1):
        inside = [i for i in range(len(probs)) if (m - 1) / bins < float(conf[i]) <= m / bins]
        if inside:
            right = sum(float(guess[i] == labels[i]) for i in inside) / len(inside)
            error += len(inside) / len(probs) * abs(right - sum(float(conf[i]) for i in inside) / len(inside))
    return error


def sample(n: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    probs = torch.softmax(2 * torch.randn(n, classes, generator=generator, dtype=torch.float64), 1)
    return probs, torch.randint(classes, (n,), generator=generator)


def test_by_hand() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    labels = torch.tensor([0, 0, 0])
    # bins of 0.1: (.8, .9] holds 1, right; (.7, .8] holds 1, wrong; (.6, .7] holds 1, right
    assert expected_calibration_error(probs, labels, bins=10) == pytest.approx((0.1 + 0.8 + 0.3) / 3)
    # one bin: |2/3 - 0.8|
    assert expected_calibration_error(probs, labels, bins=1) == pytest.approx(abs(2 / 3 - 0.8))


@pytest.mark.parametrize("bins", [1, 5, 10, 15, 20])
@pytest.mark.parametrize("classes", [2, 4])
def test_equals_the_definition_whatever_the_order(bins: int, classes: int) -> None:
    probs, labels = sample(300, classes)
    error = expected_calibration_error(probs, labels, bins=bins)
    assert error == pytest.approx(plain_ece(probs, labels, bins), abs=1e-12)
    assert 0 <= error <= 1
    order = torch.randperm(300, generator=seeded(1))
    for strategy in ("uniform", "quantile"):
        once = expected_calibration_error(probs, labels, bins=bins, strategy=strategy)
        assert expected_calibration_error(
            probs[order], labels[order], bins=bins, strategy=strategy
        ) == pytest.approx(once)
    assert expected_calibration_error(probs.numpy(), labels.tolist(), bins=bins) == pytest.approx(error)


def test_one_bin_is_the_gap_of_the_means() -> None:
    probs, labels = sample(200, 3)
    gap = abs(float((probs.argmax(1) == labels).double().mean()) - float(probs.max(1).values.mean()))
    for strategy in ("uniform", "quantile"):
        assert expected_calibration_error(probs, labels, bins=1, strategy=strategy) == pytest.approx(gap)


def test_a_perfect_model_has_almost_no_error() -> None:
    generator = seeded(2)
    p = torch.rand(1_000_000, generator=generator, dtype=torch.float64)
    y = (torch.rand(1_000_000, generator=generator, dtype=torch.float64) < p).long()
    assert expected_calibration_error(torch.stack([1 - p, p], 1), y) < 0.002
    assert expected_calibration_error(p, y) < 0.002
    assert expected_calibration_error(p, y, strategy="quantile") < 0.002


def test_certain_and_sometimes_wrong() -> None:
    probs = torch.tensor([[1.0, 0.0]]).expand(10, 2)
    labels = torch.tensor([0] * 7 + [1] * 3)
    assert expected_calibration_error(probs, labels) == pytest.approx(0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edge_belongs_to_the_bin_below_and_counts_once(dtype: torch.dtype) -> None:
    for bins in (5, 10, 15):
        for m in range(bins // 2 + 1, bins):
            edge = torch.tensor(m, dtype=torch.float64).div(bins).to(dtype)
            table = reliability(torch.stack([edge, 1 - edge])[None], torch.tensor([0]), bins=bins)
            assert table.count.sum() == 1
            assert table.count[m - 1] == 1


def test_the_table_adds_up() -> None:
    probs, labels = sample(500, 3)
    for strategy in ("uniform", "quantile"):
        table = reliability(probs, labels, bins=8, strategy=strategy)
        assert table.count.sum() == 500
        filled = table.count > 0
        assert float((table.count * table.accuracy)[filled].sum()) == float((probs.argmax(1) == labels).sum())
        assert bool((table.lower[filled] <= table.confidence[filled] + 1e-12).all())
        assert bool((table.confidence[filled] <= table.upper[filled] + 1e-12).all())
        gaps = (table.accuracy - table.confidence)[filled].abs()
        assert table.mce == pytest.approx(float(gaps.max()))
        assert table.ece == pytest.approx(float((table.count[filled] * gaps).sum()) / 500)
    groups = reliability(probs, labels, bins=8, strategy="quantile").count
    assert 62 <= float(groups.min()) <= float(groups.max()) <= 63


def test_temperature_is_the_minimum_of_the_log_loss() -> None:
    generator = seeded(3)
    truth = 1.5 * torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(truth, 1), 1, generator=generator).squeeze(1)
    for factor in (0.2, 1.0, 5.0):
        logits = factor * truth
        t = fit_temperature(logits, labels)
        assert t == pytest.approx(factor, rel=0.1)

        def log_loss(temperature: float, logits: Tensor = logits) -> float:
            return float(torch.nn.functional.cross_entropy(logits / temperature, labels))

        assert log_loss(t) <= min(log_loss(t * 1.001), log_loss(t / 1.001))
        scaled = expected_calibration_error(torch.softmax(logits / t, 1), labels)
        assert scaled < 0.03
        if factor == 5.0:
            assert expected_calibration_error(torch.softmax(logits, 1), labels) > 0.1
    # All right: the colder the better, down to the limit of the search.
    assert fit_temperature(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])) <= 1.1e-3


def test_the_interval_holds_the_error_of_a_large_sample() -> None:
    probs, labels = sample(2000, 3)
    low, high = calibration_interval(probs, labels, bins=5, resamples=200, generator=seeded(1))
    assert low < expected_calibration_error(probs, labels, bins=5) < high
    assert high - low < 0.08
    assert (low, high) == calibration_interval(probs, labels, bins=5, resamples=200, generator=seeded(1))
    assert not math.isnan(low)


def test_refusals() -> None:
    probs, labels = sample(4, 3)
    with pytest.raises(
        ValueError, match="probs must be probabilities whose rows sum to 1; row . sums to .*apply softmax"
    ):
        expected_calibration_error(probs * 3, labels)
    with pytest.raises(
        ValueError, match=r"probs must have shape \[n, C\] with n >= 1 and C >= 2, or \[n\], got \(0, 3\)"
    ):
        expected_calibration_error(probs[:0], labels[:0])
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), one per row, got \(3,\)"):
        expected_calibration_error(probs, labels[:3])
    with pytest.raises(ValueError, match=r"labels must be in 0 .. 2, got 0 .. 3|labels must be in 0 .. 2"):
        expected_calibration_error(probs, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="bins=0 must be an integer >= 1"):
        expected_calibration_error(probs, labels, bins=0)
    with pytest.raises(ValueError, match="strategy='adaptive' is not one of 'uniform', 'quantile'"):
        expected_calibration_error(probs, labels, strategy="adaptive")
    with pytest.raises(TypeError, match="probs must be floating-point probabilities, got dtype torch.int64"):
        expected_calibration_error(np.array([[1, 0]]), [0])
    with pytest.raises(ValueError, match="probs have NaN"):
        expected_calibration_error(torch.full((4, 3), torch.nan), labels)
    with pytest.raises(ValueError, match="level=1 must be between 0 and 1"):
        calibration_interval(probs, labels, level=1.0)
