"""The hyperbola through public names: predictions and simulations against the two tables of the sheets."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from papercore.local_sgd import QSR, ConstantH, SyncSchedule, cosine_lr, predict_hyperbola, simulate_hyperbola
from tests.local_sgd import public_api_reference as truth


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the hyperbola: predictions ----------------------------------------------------------------------------------------

TABLE_A = [
    (0.02, 1, 1.0435, 1.547),
    (0.02, 5, 2.970, 3.182),
    (0.02, 50, 7.2954, 7.061),
    (0.02, 500, 8.2168, 7.905),
    (0.01, 1, 1.0213, 1.282),
    (0.01, 10, 3.0826, 3.181),
    (0.01, 100, 7.1759, 7.060),
    (0.01, 1000, 8.0552, 7.905),
]
TOY = cosine_lr(0.03, 6_000)
TABLE_B: list[tuple[SyncSchedule, float, float]] = [
    (ConstantH(1), 100, 3.8431),
    (ConstantH(4), 25, 3.3093),
    (ConstantH(16), 6.25, 2.7279),
    (ConstantH(64), 1.57, 2.4727),
    (QSR(0.2, 4, power=1.0), 8.07, 3.0156),
    (QSR(0.06, 4), 10.08, 3.1465),
    (QSR(0.12, 4), 2.45, 2.6113),
    (QSR(0.24, 4), 0.63, 2.4387),
    (QSR(0.05, 4, power=3.0), 7.50, 2.9971),
    (ConstantH(6_000), 0.02, 2.378),
]


def horizon(eta: float) -> int:
    """Steps until eta^2 s2 steps = 0.4, s2 = 0.5."""
    return round(0.4 / (eta**2 * 0.5))


def scaled_rate(first: float, last: float, eta: float, steps: int, k: int = 8, s2: float = 0.5) -> float:
    """K times the rate of log D in units of eta^2 s2; D^2 = lambda^2 - 4."""
    return -k * 0.5 * math.log((last**2 - 4) / (first**2 - 4)) / (eta**2 * s2 * steps)


@pytest.mark.parametrize(("eta", "h", "discrete", "continuous"), TABLE_A)
def test_predictions_of_table_a(eta: float, h: int, discrete: float, continuous: float) -> None:
    steps = horizon(eta)
    for mode, expected in (("discrete", discrete), ("continuous", continuous)):
        path = predict_hyperbola(ConstantH(h), lambda t: eta, steps, k=8, label_noise=0.5, mode=mode)
        assert float(path.mean[0]) == pytest.approx(4.25, rel=1e-12)
        found = scaled_rate(4.25, float(path.mean[-1]), eta, steps)
        assert found == pytest.approx(expected, rel=0.005), "V16: to 0.5 %"


@pytest.mark.parametrize(("schedule", "percent", "final"), TABLE_B)
def test_predictions_of_table_b(schedule: SyncSchedule, percent: float, final: float) -> None:
    layout = [(r.start, r.length) for r in schedule.rounds(TOY, 6_000)] if percent > 0.1 else [(0, 6_000)]
    assert 100 * len(layout) / 6_000 == pytest.approx(percent, abs=0.02)
    path = predict_hyperbola(schedule, TOY, 6_000, k=8, label_noise=0.5)
    assert float(path.mean[-1]) == pytest.approx(final, rel=0.005), "V16: to 0.5 %"
    assert path.mean.shape == (len(layout) + 1,), "at the start and after every round"
    plain = truth.hyperbola_theory(layout, TOY, k=8, s2=0.5)
    if (
        percent > 0.1
    ):  # in one round of 6,000 steps the sharpness moves within the round: the recursion freezes it
        torch.testing.assert_close(path.mean, tensor(*plain), rtol=0.005, atol=0)


@pytest.mark.parametrize(("h", "k"), [(1, 8), (25, 8), (1_000, 8), (10, 1), (50, 32)])
def test_continuous_predictions_in_closed_form(h: int, k: int) -> None:
    """lambda^2 = 4 + (lambda_0^2 - 4) exp(-2 eta^2 s2 [1/K + (1 - 1/K) psi] steps), followed round by round."""
    eta, steps, s2 = 0.01, 4_000, 0.4
    layout = [(r.start, r.length) for r in ConstantH(h).rounds(lambda t: eta, steps)]
    path = predict_hyperbola(ConstantH(h), lambda t: eta, steps, k=k, label_noise=s2, mode="continuous")
    plain = truth.hyperbola_theory(layout, lambda t: eta, k=k, s2=s2, continuous=True)
    torch.testing.assert_close(path.mean, tensor(*plain), rtol=0.002, atol=0)
    if k == 1:
        exact = math.sqrt(4 + 14.0625 * math.exp(-2 * eta**2 * s2 * steps))
        assert float(path.mean[-1]) == pytest.approx(exact, rel=1e-9)


def test_two_is_the_floor() -> None:
    """At (1, 1) the sharpness is at its minimum, and D = 0 stays 0."""
    for mode in ("discrete", "continuous"):
        path = predict_hyperbola(
            ConstantH(7), lambda t: 0.02, 70, k=4, label_noise=0.5, start=(1.0, 1.0), mode=mode
        )
        torch.testing.assert_close(path.mean, torch.full_like(path.mean, 2.0), rtol=0, atol=1e-12)


def test_large_rounds_make_the_drift_independent_of_k() -> None:
    """W14: at fixed noise per worker (fixed B_loc) and large H the drift is that of the small batch."""
    finals = [
        float(predict_hyperbola(ConstantH(1_000), lambda t: 0.01, 8_000, k=k, label_noise=0.5).mean[-1])
        for k in (1, 4, 16)
    ]
    assert finals == pytest.approx([finals[0]] * 3, rel=0.01)
    ones = [
        float(predict_hyperbola(ConstantH(1), lambda t: 0.01, 8_000, k=k, label_noise=0.5).mean[-1])
        for k in (1, 4, 16)
    ]
    assert ones[0] < ones[1] - 0.2 < ones[2] - 0.3


# ---- the hyperbola: simulations (W4) -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "h", "discrete"), [row[:3] for row in TABLE_A[:4]])
def test_simulations_of_table_a(eta: float, h: int, discrete: float) -> None:
    steps = horizon(eta)
    path = simulate_hyperbola(ConstantH(h), lambda t: eta, steps, k=8, label_noise=0.5, replicas=200, seed=11)
    assert path.mean.shape == (steps // h + 1,)
    last, se = float(path.mean[-1]), float(path.se[-1])
    found = scaled_rate(4.25, last, eta, steps)
    spread = abs(scaled_rate(4.25, last + se, eta, steps) - found)
    assert abs(found - discrete) < max(4 * spread, 0.01 * discrete)
    assert 0 < spread < 0.02 * found, "the standard error is that of the mean of 200 replicas"


@pytest.mark.parametrize(("schedule", "percent", "final"), [TABLE_B[2], TABLE_B[6], TABLE_B[8]])
def test_simulations_of_table_b(schedule: SyncSchedule, percent: float, final: float) -> None:
    path = simulate_hyperbola(schedule, TOY, 6_000, k=8, label_noise=0.5, replicas=100, seed=12)
    assert float(path.mean[-1]) == pytest.approx(final, abs=max(4 * float(path.se[-1]), 0.005 * final))


def test_simulation_of_the_stationary_variance() -> None:
    """W12: at sharpness 2, which stays, the mean square of uv - 1 at a sync is s2 eta lambda / ((2 - eta lambda) K)."""
    eta, k, s2 = 0.05, 4, 0.2
    path = simulate_hyperbola(
        ConstantH(1), lambda t: eta, 300, k=k, label_noise=s2, start=(1.0, 1.0), replicas=400, seed=13
    )
    expected = s2 * eta * 2 / ((2 - eta * 2) * k)
    assert float(path.residual[100:].mean()) == pytest.approx(expected, rel=0.06)


def test_simulation_without_noise_stays() -> None:
    path = simulate_hyperbola(ConstantH(5), lambda t: 0.02, 50, k=3, label_noise=0.0, replicas=2, seed=1)
    torch.testing.assert_close(path.mean, torch.full_like(path.mean, 4.25), rtol=0, atol=1e-12)


def test_simulation_against_a_loop() -> None:
    """One worker, no averages: D is multiplied by 1 - eta^2 r^2, so it cannot grow; other seeds are other runs."""
    runs = [
        simulate_hyperbola(ConstantH(1), lambda t: 0.02, 40, k=1, label_noise=0.5, replicas=1, seed=s)
        for s in (3, 3, 4)
    ]
    assert torch.equal(runs[0].mean, runs[1].mean) and not torch.equal(runs[0].mean, runs[2].mean)
    assert bool((runs[0].mean[1:] <= runs[0].mean[:-1] + 1e-12).all())


def test_simulations_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    simulate_hyperbola(ConstantH(5), lambda t: 0.02, 10, k=2, label_noise=0.5, replicas=3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fluctuations_fall_with_k() -> None:
    """W14, L9: at equal drift (large H, fixed noise per worker) the variance of the average falls as 1/K."""
    variances = []
    for k in (2, 8):
        path = simulate_hyperbola(
            ConstantH(200), lambda t: 0.03, 400, k=k, label_noise=0.5, replicas=1_500, seed=14
        )
        variances.append(float(path.variance[-1]))
    assert variances[0] / variances[1] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("call", [simulate_hyperbola, predict_hyperbola])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, ("k", "0")),
        ({"k": -2}, ("k", "-2")),
        ({"label_noise": -0.5}, ("label_noise", "-0.5")),
        ({"label_noise": math.nan}, ("label_noise", "nan")),
        ({"total_steps": 0}, ("total_steps", "0")),
        ({"start": (2.0,)}, ("start",)),
    ],
)
def test_the_hyperbola_refuses(call: Callable, change: dict, words: tuple[str, ...]) -> None:
    options = {"k": 2, "label_noise": 0.5, "total_steps": 10, **change}
    if call is simulate_hyperbola:
        options |= {"replicas": 2, "seed": 0}
    with pytest.raises(ValueError) as error:
        call(ConstantH(2), lambda t: 0.02, options.pop("total_steps"), **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_hyperbola_names_modes_and_replicas() -> None:
    with pytest.raises(ValueError, match="(?s)exact.*discrete.*continuous|discrete.*continuous.*exact"):
        predict_hyperbola(ConstantH(2), lambda t: 0.02, 10, k=2, label_noise=0.5, mode="exact")
    with pytest.raises(ValueError, match="replicas.*0|0.*replicas"):
        simulate_hyperbola(ConstantH(2), lambda t: 0.02, 10, k=2, label_noise=0.5, replicas=0, seed=0)


@pytest.mark.parametrize("call", [simulate_hyperbola, predict_hyperbola])
def test_an_unstable_rate_is_warned_of(call: Callable) -> None:
    """eta * lambda >= 2: 0.5 * 4.25."""
    extra = {"replicas": 2, "seed": 0} if call is simulate_hyperbola else {}
    with pytest.warns((UserWarning, RuntimeWarning), match="(?i)unstable|sharpness|diverge"):
        call(ConstantH(2), lambda t: 0.5, 4, k=2, label_noise=0.01, **extra)
