"""The closed forms of the chapter against the kernel's step-by-step theory, and the valley against the Slow SDE by autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from papercore.experiments.local_sgd.play import gauge, places, sharpness_paths
from papercore.experiments.local_sgd.rates import (
    continuous_rate,
    discrete_rate,
    early_gap,
    gap,
    psi,
    sharpness_after,
)
from papercore.experiments.local_sgd.valley import simulate_valley, stationary_square
from papercore.local_sgd import ConstantH, predict_hyperbola, slow_sde_drift
from papercore.local_sgd import psi as kernel_psi

START = 4.25


def test_psi_agrees_with_the_kernels():
    x = np.concatenate([[0.0], np.geomspace(1e-9, 1e3, 60)])
    np.testing.assert_allclose(psi(x), kernel_psi(torch.from_numpy(x)).numpy(), rtol=1e-8)


@pytest.mark.parametrize(
    ("eta", "h", "steps"),
    [(0.02, 1, 2000), (0.02, 5, 2000), (0.02, 50, 2000), (0.01, 1000, 8000), (0.1, 10, 400)],
)
@pytest.mark.parametrize("mode", ["discrete", "continuous"])
def test_sharpness_by_one_integral_is_the_kernels_recursion(eta, h, steps, mode):
    path = predict_hyperbola(ConstantH(h), lambda step: eta, steps, k=8, label_noise=0.5, mode=mode)
    ours = sharpness_after(path.steps.numpy(), eta, h, 8, 0.5, start=START, mode=mode)
    # The integral freezes the sharpness over a round and starts in the round's fixed point: differences of order eta.
    np.testing.assert_allclose(ours, path.mean.numpy(), rtol=4e-3)
    assert ours[-1] < START - 0.05


def test_rates_have_their_limits():
    assert discrete_rate(START, 1e-5, 1, 8, 0.5) == pytest.approx(1e-10 * 0.5 / 8, rel=1e-3)
    assert discrete_rate(START, 1e-5, 10**8, 8, 0.5) == pytest.approx(1e-10 * 0.5, rel=1e-3)
    for eta_h in (0.05, 0.5, 5.0):
        ratio = discrete_rate(START, 1e-4, eta_h / 1e-4, 8, 0.5) / continuous_rate(
            START, 1e-4, eta_h / 1e-4, 8, 0.5
        )
        assert ratio == pytest.approx(1, abs=2e-3)
    # One worker does not average, whatever H is.
    assert discrete_rate(START, 0.02, 1, 1, 0.5) == pytest.approx(
        float(discrete_rate(START, 0.02, 64, 1, 0.5))
    )


def test_gap_is_early_linear_and_closes():
    few = np.array([5.0, 50.0])
    np.testing.assert_allclose(
        gap(few, 0.005, 200, 8, 0.5, start=START), early_gap(few, 0.005, 200, 8, 0.5, start=START), rtol=2e-3
    )
    assert gap(10**7, 0.05, 20, 8, 0.5, start=START) == pytest.approx(0, abs=1e-6)


def test_valley_drift_and_diffusion_are_those_of_the_slow_sde():
    """The equation in the head of valley.py, from the general formula by automatic differentiation."""
    a, s2_a, s2_b = 0.7, 0.09, 0.4

    def loss(theta):
        return 0.5 * (1 + theta[0] ** 2) * theta[1] ** 2

    point = torch.tensor([a, 0.0], dtype=torch.float64)
    for k in (1, 4, 16):
        # sigma is the covariance of one sample; with a local batch of one sample the global batch is k.
        drift = slow_sde_drift(
            loss, point, torch.diag(torch.tensor([s2_a, s2_b], dtype=torch.float64)), k=k, batch=k, eta_h=None
        )
        both = drift.drift1 + drift.drift2
        assert both[0].item() == pytest.approx(-s2_b * a / (2 * (1 + a**2)))
        assert drift.diffusion[0, 0].item() == pytest.approx((s2_a / k) ** 0.5)
        assert both[1].item() == pytest.approx(0, abs=1e-12)


def test_stationary_square_is_that_of_the_density():
    a = np.linspace(-60, 60, 400_001)
    for k in (3, 8):
        density = (1 + a**2) ** (-k * 1.0 / (2 * 0.25))
        assert stationary_square(k, 0.25, 1.0) == pytest.approx(
            float((a**2 * density).sum() / density.sum()), rel=1e-4
        )
    assert math.isinf(stationary_square(1, 1.0, 1.0))
    # A finite eta H weakens the drift and so raises the square; infinite is the limit.
    assert (
        stationary_square(8, 0.25, 1.0, eta_h=2.0)
        > stationary_square(8, 0.25, 1.0, eta_h=1e9)
        == pytest.approx(1 / 29, rel=1e-6)
    )


def test_valley_simulation_diffuses_as_it_should():
    """Without noise across there is no drift: a is a random walk with variance eta^2 s2_a steps / K."""
    seen = simulate_valley(4, 10, 100, eta=0.1, s2_a=0.25, s2_b=0.0, start=0.0, replicas=4000, seed=0)
    expected = 0.1**2 * 0.25 * 100 / 4
    assert float(seen[-1].var()) == pytest.approx(expected, rel=4 * (2 / 4000) ** 0.5)
    assert seen.shape == (11, 4000)
    with pytest.raises(ValueError, match="100 steps are no whole number of rounds of 30"):
        simulate_valley(4, 30, 100, eta=0.1, s2_a=0.25, s2_b=0.0, start=0.0, replicas=2, seed=0)


def test_control_shows_the_closed_form():
    paths = sharpness_paths(8, 0.01, 100, 0.5, points=5)
    assert {name: len(path) for name, path in paths.items()} == {
        "SGD, batch B": 5,
        "Local SGD": 5,
        "SGD, batch B / K": 5,
    }
    ends = [path[-1] for path in paths.values()]
    assert ends[0] > ends[1] > ends[2] > 2
    same = sharpness_paths(8, 0.01, 1, 0.5)
    assert same["SGD, batch B"] == same["Local SGD"]
    assert gauge(8, 0.01, 10**6, 0.5) == pytest.approx(8, rel=0.03) and gauge(
        8, 1e-4, 1, 0.5
    ) == pytest.approx(1, rel=0.01)
    u, v = places(8, 0.01, 100, 0.5, 4000)
    assert u * v == pytest.approx(1, abs=1e-3) and 1 < u < 2
    with pytest.raises(ValueError, match="expected at least two points"):
        sharpness_paths(8, 0.01, 100, 0.5, points=1)
