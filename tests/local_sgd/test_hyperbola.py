"""The hyperbola: exact identities, the closed forms, and simulation against both theories (tables of the papers' sheets)."""

import math

import pytest
import torch

from papercore.local_sgd import (
    QSR,
    ConstantH,
    HyperbolaPath,
    cosine_lr,
    predict_hyperbola,
    psi,
    simulate_hyperbola,
)
from papercore.local_sgd.hyperbola import _Points, _Targets
from papercore.local_sgd.hyperbola_path import phi_on_hyperbola


def points(k: int, replicas: int, seed: int) -> _Points:
    generator = torch.Generator().manual_seed(seed)
    out = _Points(k, replicas, (2.0, 0.5))
    out.u += 0.3 * torch.randn(k, replicas, generator=generator, dtype=torch.float64)
    out.v += 0.3 * torch.randn(k, replicas, generator=generator, dtype=torch.float64)
    return out


def targets(steps: int, k: int, replicas: int, seed: int, s2: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1 + math.sqrt(s2) * torch.randn(steps, k, replicas, generator=generator, dtype=torch.float64)


def gap(p: _Points) -> torch.Tensor:
    return p.u**2 - p.v**2


# ---- exact identities ----------------------------------------------------------------------------------------------


def test_a_step_multiplies_d_by_one_minus_eta_squared_r_squared() -> None:
    p, target, eta = points(3, 50, 0), targets(1, 3, 50, 1), 0.2
    expected = gap(p) * (1 - (eta * (p.u * p.v - target[0])) ** 2)
    p.descend(target, [eta])
    torch.testing.assert_close(gap(p), expected, atol=1e-14, rtol=1e-14)


def test_an_average_changes_d_by_the_variances() -> None:
    p, average = points(5, 50, 2), _Points(1, 50, (0.0, 0.0))
    average.set_to_mean_of(p)
    spread = p.u.var(0, correction=0) - p.v.var(0, correction=0)
    torch.testing.assert_close(gap(average)[0], gap(p).mean(0) - spread, atol=1e-14, rtol=1e-14)


def test_sharpness_is_the_top_eigenvalue_at_the_projection_and_its_square_is_d_squared_plus_4() -> None:
    p = points(1, 200, 3)
    sharpness, u, v = phi_on_hyperbola(p.u, p.v)
    torch.testing.assert_close(u * v, torch.ones_like(u), atol=1e-14, rtol=0)
    torch.testing.assert_close(u**2 - v**2, gap(p), atol=1e-13, rtol=0)
    torch.testing.assert_close(sharpness**2, gap(p) ** 2 + 4 * (u * v) ** 2, atol=1e-13, rtol=1e-13)
    hessian = torch.stack((torch.stack((v**2, 2 * u * v - 1)), torch.stack((2 * u * v - 1, u**2))))[:, :, 0]
    top = torch.linalg.eigvalsh(hessian.permute(2, 0, 1))[:, -1]
    torch.testing.assert_close(sharpness[0], top)
    assert (u.sign() == torch.where(p.u.abs() > p.v.abs(), p.u, p.v).sign()).all()


def test_a_step_is_gradient_descent_by_autograd() -> None:
    p, target = points(2, 7, 4), targets(1, 2, 7, 5)
    u, v = p.u.clone().requires_grad_(), p.v.clone().requires_grad_()
    du, dv = torch.autograd.grad(((u * v - target[0]) ** 2 / 2).sum(), (u, v))
    p.descend(target, [0.1])
    torch.testing.assert_close(p.u, u.detach() - 0.1 * du, atol=1e-15, rtol=1e-14)
    torch.testing.assert_close(p.v, v.detach() - 0.1 * dv, atol=1e-15, rtol=1e-14)


def test_one_local_step_is_sgd_with_the_pooled_batch() -> None:
    target = targets(40, 8, 30, 6)
    workers, average, pooled = (_Points(n, 30, (2.0, 0.5)) for n in (8, 1, 1))
    for t in target:
        workers.descend(t[None], [0.05])
        average.set_to_mean_of(workers)
        workers.set_to(average)
        pooled.descend(t[None].mean(1, keepdim=True), [0.05])
    torch.testing.assert_close(average.u, pooled.u, atol=1e-13, rtol=0)
    torch.testing.assert_close(average.v, pooled.v, atol=1e-13, rtol=0)


@pytest.mark.parametrize("h", [1, 5, 40])
def test_identical_noise_makes_local_sgd_the_single_worker(h: int) -> None:
    target = targets(40, 1, 30, 7).expand(-1, 6, -1)
    workers, average, single = (_Points(n, 30, (2.0, 0.5)) for n in (6, 1, 1))
    for begin in range(0, 40, h):
        workers.descend(target[begin : begin + h], [0.05] * h)
        average.set_to_mean_of(workers)
        workers.set_to(average)
    single.descend(target[:, :1], [0.05] * 40)
    torch.testing.assert_close(average.u, single.u, atol=1e-13, rtol=0)
    torch.testing.assert_close(average.v, single.v, atol=1e-13, rtol=0)


def test_a_simulation_is_the_loop_that_it_claims_to_be() -> None:
    """Same noise, a plain loop over workers, every synchronisation compared; rounds of 1 and rounds of more."""
    k, replicas, s2, steps, h = 3, 6, 0.5, 23, 4
    source = _Targets(k, replicas, s2, torch.Generator().manual_seed(9))
    noise = source.take(steps)
    for length in (h, 1):
        path = simulate_hyperbola(
            ConstantH(length),
            lambda t: 0.05 / (1 + t),
            steps,
            k=k,
            label_noise=s2,
            replicas=replicas,
            seed=9,
        )
        u, v = torch.full((k, replicas), 2.0).double(), torch.full((k, replicas), 0.5).double()
        rows = [(u[0], v[0])]
        for t in range(steps):
            r = u * v - noise[t]
            u, v = u - 0.05 / (1 + t) * r * v, v - 0.05 / (1 + t) * r * u
            if (t + 1) % length == 0 or t + 1 == steps:
                u, v = u.mean(0).expand(k, -1), v.mean(0).expand(k, -1)
                rows.append((u[0], v[0]))
        us, vs = (torch.stack(x) for x in zip(*rows, strict=True))
        sharp = torch.sqrt((us**2 - vs**2) ** 2 + 4)
        torch.testing.assert_close(path.mean, sharp.mean(1), atol=1e-12, rtol=0)
        torch.testing.assert_close(path.se, sharp.std(1) / math.sqrt(replicas), atol=1e-12, rtol=0)
        torch.testing.assert_close(path.residual, (us * vs - 1).square().mean(1), atol=1e-12, rtol=0)
        assert path.steps.tolist() == list(range(0, steps, length)) + [steps]
        assert len(path) == len(path.steps) and path[-1] == path.mean[-1]
        expected = [sum((0.05 / (1 + t)) ** 2 for t in range(n)) for n in path.steps.tolist()]
        assert path.slow_time.tolist() == pytest.approx(expected)


# ---- tables --------------------------------------------------------------------------------------------------------

# eta, H, K rate / s2 in the discrete theory of the sheet, and in the continuous one
RATES = [
    (0.02, 1, 1.0435, 1.547),
    (0.02, 5, 2.970, 3.182),
    (0.02, 50, 7.2954, 7.061),
    (0.02, 500, 8.2168, 7.905),
    (0.01, 1, 1.0213, 1.282),
    (0.01, 10, 3.0826, 3.181),
    (0.01, 100, 7.1759, 7.060),
    (0.01, 1000, 8.0552, 7.905),
]


@pytest.mark.parametrize("eta, h, discrete, continuous", RATES)
def test_decay_rates_of_the_sheet(eta: float, h: int, discrete: float, continuous: float) -> None:
    """Simulation within 4 standard errors, or 1 %, of the discrete theory; both theories at the printed values.

    The sheet freezes the sharpness within a round; ours follows it, which moves the longest rounds by 0.2 % (continuous: 0.01 %).
    """
    steps = round(0.4 / (eta**2 * 0.5))
    schedule, scale = ConstantH(h), 8 / 0.5

    def lr(_: int) -> float:
        return eta

    rate, se = simulate_hyperbola(
        schedule, lr, steps, k=8, label_noise=0.5, replicas=100, seed=3
    ).decay_rate()
    theory, none = predict_hyperbola(schedule, lr, steps, k=8, label_noise=0.5).decay_rate()
    limit, _ = predict_hyperbola(schedule, lr, steps, k=8, label_noise=0.5, mode="continuous").decay_rate()
    assert none == 0
    assert scale * theory == pytest.approx(discrete, rel=2.5e-3)
    assert scale * limit == pytest.approx(continuous, rel=2e-4, abs=6e-4)
    assert rate == pytest.approx(theory, rel=0.01, abs=4 * se)
    assert se < 0.005 * rate


# schedule, final sharpness simulated and by theory, in the sheet
SHARPNESS = [
    (ConstantH(1), 3.8435, 3.8431),
    (ConstantH(4), 3.3104, 3.3093),
    (ConstantH(16), 2.7280, 2.7279),
    (ConstantH(64), 2.4735, 2.4727),
    (QSR(0.2, 4, power=1), 3.0173, 3.0156),
    (QSR(0.06, 4), 3.1448, 3.1465),
    (QSR(0.12, 4), 2.6125, 2.6113),
    (QSR(0.24, 4), 2.4395, 2.4387),
    (QSR(0.05, 4, power=3), 2.9962, 2.9971),
    (ConstantH(6000), 2.388, 2.378),
]


@pytest.mark.parametrize("schedule, simulated, theory", SHARPNESS)
def test_final_sharpness_of_the_sheet(schedule, simulated: float, theory: float) -> None:
    lr = cosine_lr(0.03, 6000)
    path = simulate_hyperbola(schedule, lr, 6000, k=8, label_noise=0.5, replicas=100, seed=4)
    discrete = predict_hyperbola(schedule, lr, 6000, k=8, label_noise=0.5)
    assert float(path.mean[0]) == float(discrete.mean[0]) == 4.25
    assert torch.equal(path.steps, discrete.steps) and int(path.steps[-1]) == 6000
    end, se = float(path.mean[-1]), float(path.se[-1])
    assert se < 0.003
    assert end == pytest.approx(float(discrete.mean[-1]), abs=4 * se)
    assert end == pytest.approx(simulated, abs=5 * se)  # the sheet's error is about 0.7 of ours
    # One round of 6,000 steps: the sheet's theory freezes the sharpness of 4.25 throughout it.
    one_round = schedule == ConstantH(6000)
    assert float(discrete.mean[-1]) == pytest.approx(theory, rel=5e-3 if one_round else 6e-4)


# ---- theory --------------------------------------------------------------------------------------------------------


def test_the_continuous_theory_has_the_closed_forms() -> None:
    """K = 1 is SGD; for large eta H the rate is K times that of the global batch."""
    steps, eta, s2 = 4000, 0.01, 0.5
    path = predict_hyperbola(ConstantH(1), lambda t: eta, steps, k=1, label_noise=s2, mode="continuous")
    expected = torch.sqrt(4 + (4.25**2 - 4) * torch.exp(-2 * eta**2 * s2 * path.steps.double()))
    torch.testing.assert_close(path.mean, expected)
    many = predict_hyperbola(ConstantH(4000), lambda t: eta, steps, k=8, label_noise=s2, mode="continuous")
    share = psi(2 * eta * 4000 * 3.9)
    assert many.decay_rate()[0] == pytest.approx(s2 * (1 / 8 + 7 / 8 * share), rel=2e-3)
    assert math.isnan(float(many.residual[-1]))


def test_simulation_nears_the_continuous_theory_about_linearly_in_eta() -> None:
    """Rounds of eta H = 0.1: the gap between the discrete moments and the Slow SDE halves with eta."""
    gaps = []
    for eta in (0.02, 0.01, 0.005):
        steps, schedule = round(0.8 / eta**2), ConstantH(round(0.1 / eta))
        a, b = (
            predict_hyperbola(schedule, lambda t, eta=eta: eta, steps, k=8, label_noise=0.5, mode=mode)
            for mode in ("discrete", "continuous")
        )
        gaps.append(abs(a.decay_rate()[0] - b.decay_rate()[0]))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.15) and gaps[1] / gaps[2] == pytest.approx(2, rel=0.15)


def test_stationary_mean_square_of_the_residual() -> None:
    """x is an autoregression: s2 eta lambda / (2 - eta lambda) on a worker, and 1/K of it at a synchronisation."""
    eta, s2, k, lam = 0.05, 1e-4, 8, 4.25  # so little noise that lambda stands still
    expected = s2 * eta * lam / (2 - eta * lam)
    for workers, h in ((1, 50), (k, 50)):
        path = simulate_hyperbola(
            ConstantH(h), lambda t: eta, 10_000, k=workers, label_noise=s2, replicas=100, seed=1
        )
        theory = predict_hyperbola(ConstantH(h), lambda t: eta, 10_000, k=workers, label_noise=s2)
        residual = path.residual[20:]
        # 180 x 100 squares of Gaussians, nearly independent after 50 steps: relative error sqrt(2 / 18,000) = 1 %.
        assert float(residual.mean()) == pytest.approx(expected / workers, rel=0.045)
        assert float(theory.residual[-1]) == pytest.approx(expected / workers, rel=0.01)


def test_more_workers_leave_the_drift_and_divide_the_variance() -> None:
    """Fixed noise of a worker, large eta H. Rates agree within 4 % (psi < 1); the variance falls as 1/K (F test, 5 sd)."""
    paths = {
        k: simulate_hyperbola(
            ConstantH(400), lambda t: 0.02, 4000, k=k, label_noise=0.5, replicas=400, seed=k
        )
        for k in (2, 8)
    }
    rates = {k: path.decay_rate()[0] for k, path in paths.items()}
    assert rates[2] == pytest.approx(rates[8], rel=0.04)
    ratio = float(paths[2].variance[-1] / paths[8].variance[-1])
    assert ratio == pytest.approx(4, rel=5 * math.sqrt(4 / 400))


def test_the_path_in_the_plane_stays_on_its_branch() -> None:
    for start in [(2.0, 0.5), (0.5, 2.0), (-0.5, -2.0)]:
        simulated = simulate_hyperbola(
            ConstantH(20), lambda t: 0.02, 1000, k=4, label_noise=0.3, start=start, replicas=50, seed=2
        )
        theory = predict_hyperbola(ConstantH(20), lambda t: 0.02, 1000, k=4, label_noise=0.3, start=start)
        for path in (simulated, theory):
            assert (float(path.u[0]), float(path.v[0])) == pytest.approx(start)
        torch.testing.assert_close(simulated.u, theory.u, atol=0.02, rtol=0)
        torch.testing.assert_close(simulated.v, theory.v, atol=0.02, rtol=0)
        torch.testing.assert_close(theory.u * theory.v, torch.ones_like(theory.u))
        torch.testing.assert_close(theory.u**2 + theory.v**2, theory.mean)
    flattest = predict_hyperbola(
        ConstantH(1), lambda t: 0.02, 10, k=4, label_noise=0.3, start=(1.0, 1.0), mode="continuous"
    )
    assert flattest.mean.tolist() == [2.0] * 11


def test_warm_up_and_no_noise() -> None:
    lr = cosine_lr(0.03, 500, warmup_steps=100)
    path = simulate_hyperbola(QSR(0.1, 4), lr, 500, k=2, label_noise=0.0, replicas=2, warmup_steps=100)
    assert path.steps[:26].tolist() == list(range(0, 104, 4))
    assert path.mean.tolist() == [4.25] * len(path.mean)


def test_seeds_and_one_replica() -> None:
    def run(seed: int, replicas: int = 5, h: int = 3) -> HyperbolaPath:
        return simulate_hyperbola(
            ConstantH(h), lambda t: 0.02, 100, k=1, label_noise=0.5, replicas=replicas, seed=seed
        )

    state = torch.random.get_rng_state()
    assert torch.equal(run(1).mean, run(1).mean) and not torch.equal(run(1).mean, run(2).mean)
    torch.testing.assert_close(
        run(1, h=1).mean[-1], run(1, h=100).mean[-1]
    )  # one worker: averages change nothing
    assert math.isnan(float(run(1, replicas=1).se[-1]))
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- warnings and errors -------------------------------------------------------------------------------------------


def test_an_unstable_learning_rate_warns() -> None:
    with pytest.warns(RuntimeWarning, match=r"eta \* sharpness is 2\.12 in the round that starts at step 0"):
        predict_hyperbola(ConstantH(2), lambda t: 0.5, 10, k=2, label_noise=0.1)
    with pytest.warns(RuntimeWarning, match="Lower the learning rate"):
        simulate_hyperbola(ConstantH(2), lambda t: 0.5, 10, k=2, label_noise=0.1, replicas=3)


def test_a_floor_that_was_reached_has_no_rate() -> None:
    path = predict_hyperbola(ConstantH(1), lambda t: 0.02, 10, k=2, label_noise=0.1, start=(1.0, 1.0))
    with pytest.raises(ValueError, match="above its floor of 2 .* it starts at 2.0, ends at 2.0"):
        path.decay_rate()


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"k": 0}, ValueError, "k = 0: expected a whole number >= 1"),
        ({"k": 2.5}, ValueError, "k = 2.5: expected a whole number"),
        ({"label_noise": -0.1}, ValueError, "label_noise is the variance .* got -0.1"),
        ({"start": (1.0,)}, ValueError, r"start must be two finite numbers \(u, v\), got \(1.0,\)"),
        ({"start": (1.0, math.inf)}, ValueError, "start must be two finite numbers"),
        ({"replicas": 0}, ValueError, "replicas = 0: expected a whole number >= 1"),
        ({"seed": -1}, ValueError, "seed = -1: expected a whole number >= 0"),
        ({"lr_fn": lambda t: -0.1 if t == 3 else 0.1}, ValueError, r"lr_fn\(3\) is -0.1: expected a finite"),
        ({"total_steps": 0}, ValueError, "total_steps = 0"),
        ({"schedule": 4}, TypeError, r"schedule must be a SyncSchedule such as ConstantH\(16\), got int"),
    ],
)
def test_errors(change: dict, kind: type[Exception], message: str) -> None:
    arguments = {
        "schedule": ConstantH(4),
        "lr_fn": lambda t: 0.1,
        "total_steps": 8,
        "k": 2,
        "label_noise": 0.1,
        "replicas": 3,
    } | change
    with pytest.raises(kind, match=message):
        simulate_hyperbola(**arguments)
    if not change.keys() & {"replicas", "seed"}:
        del arguments["replicas"]
        with pytest.raises(kind, match=message):
            predict_hyperbola(**arguments)


def test_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode must be 'discrete' or 'continuous', got 'exact'"):
        predict_hyperbola(ConstantH(4), lambda t: 0.1, 8, k=2, label_noise=0.1, mode="exact")
