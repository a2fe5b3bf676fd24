"""psi and its integral against multiple precision; the Slow SDE against finite differences of the flow and a simulation."""

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from scipy.special import exp1
from torch import Tensor

from papercore.local_sgd import (
    label_noise_regularizer,
    project_to_manifold,
    psi,
    psi_integral,
    slow_sde_drift,
)

# torch.func loads its decompositions with torch.jit.script on first use, which torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

GRID = [1e-300, 1e-12, 1e-6, 1e-3, 0.1, 0.4999, 0.5, 0.5001, 1.0, 2.0, 7.0, 39.9, 40.1, 300.0, 1e8]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- psi -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", GRID)
def test_psi_is_accurate_to_rounding(x: float) -> None:
    with mpmath.workdps(340):
        big = mpmath.mpf(x)
        expected = float((mpmath.exp(-big) - 1 + big) / big)
    assert psi(x) == pytest.approx(expected, rel=1e-15)
    assert float(psi(f64(x))) == pytest.approx(expected, rel=1e-15)


def test_psi_at_the_values_of_the_sheet_and_at_its_ends() -> None:
    assert [round(psi(x), 4) for x in (0.1, 1.0, 2.0, 10.0, 100.0)] == [0.0484, 0.3679, 0.5677, 0.9, 0.99]
    assert psi(0.0) == 0 and psi(0) == 0 and psi(math.inf) == 1
    assert psi(f64(0.0, math.inf)).tolist() == [0, 1]


def test_psi_rises_from_0_to_below_1() -> None:
    values = psi(torch.logspace(-8, 6, 2000, dtype=torch.float64))
    assert (values.diff() > 0).all() and (values > 0).all() and (values < 1).all()


@pytest.mark.parametrize("x", GRID)
def test_the_integral_is_x_minus_ein(x: float) -> None:
    if x < 0.5:  # x - Ein(x) cancels: the series of Ein, without its first term
        expected = sum((-1) ** n * x**n / (n * math.factorial(n)) for n in range(2, 25))
    else:
        expected = x - (math.log(x) + 0.5772156649015329 + exp1(x))
    assert psi_integral(x) == pytest.approx(expected, rel=1e-13)
    assert float(psi_integral(f64(x))) == pytest.approx(expected, rel=1e-13)


def test_the_integral_has_psi_for_derivative() -> None:
    x = f64(0.0, *GRID).requires_grad_()
    (slope,) = torch.autograd.grad(psi_integral(x).sum(), x)
    torch.testing.assert_close(slope, psi(x.detach()), rtol=1e-12, atol=1e-300)


def test_both_differentiate_twice_on_all_their_branches() -> None:
    x = f64(0.0, 0.1, 0.49, 0.51, 3.0, 39.0, 41.0).requires_grad_()
    for f in (psi, psi_integral):
        assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(psi(zero), zero)
    assert float(slope) == 0.5
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(psi_integral))(x.detach()), psi(x.detach()))


def test_dtypes_and_kinds() -> None:
    assert isinstance(psi(2), float) and isinstance(psi_integral(2), float)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        out = psi(torch.tensor([0.25, 3.0], dtype=dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), psi(f64(0.25, 3.0)), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert psi(torch.tensor([1, 2])).dtype == psi_integral(torch.tensor([1, 2])).dtype == torch.float32
    with pytest.raises(TypeError, match="x must be a number, got 'two'"):
        psi("two")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="expected real numbers, got torch.complex64"):
        psi_integral(torch.ones(2, dtype=torch.complex64))


# ---- problems with a manifold --------------------------------------------------------------------------------------


def hyperbola(p: Tensor) -> Tensor:
    return (p[0] * p[1] - 1) ** 2 / 2


def two_constraints(p: Tensor) -> Tensor:
    """Four coordinates, two curved constraints of unequal weight: a manifold of dimension 2."""
    a = p[0] * p[1] - 1 + 0.3 * p[2] ** 2
    b = torch.sin(p[2]) + p[3] - 0.5 * p[0]
    return a**2 / 2 + 1.5 * b**2


def circle(p: Tensor) -> Tensor:
    return ((p**2).sum() - 1) ** 2 / 8


def covariance(d: int, seed: int) -> Tensor:
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / d


PROBLEMS: list[tuple[Callable[[Tensor], Tensor], Tensor, int]] = [
    (hyperbola, f64(2.0, 1.0), 1),
    (two_constraints, f64(1.5, 0.8, 0.3, 0.4), 2),
]


@pytest.fixture(scope="module", params=PROBLEMS, ids=["hyperbola", "two constraints"])
def on_manifold(request: pytest.FixtureRequest) -> tuple[Callable[[Tensor], Tensor], Tensor, int]:
    loss, start, rank = request.param
    return loss, project_to_manifold(loss, start, 1e-12), rank


def test_the_projection_is_what_gradient_flow_does(on_manifold) -> None:
    """Derivatives of Phi, twice, from finite differences of the flow alone."""
    loss, zeta, rank = on_manifold
    d, sigma = len(zeta), covariance(len(zeta), 0)
    drift = slow_sde_drift(loss, zeta, sigma, k=1, batch=5)
    assert drift.rank == rank

    step = 1e-3
    values, vectors = torch.linalg.eigh(sigma)
    second = torch.zeros(d, dtype=torch.float64)
    for value, vector in zip(values, vectors.T, strict=True):
        ahead, behind = (project_to_manifold(loss, zeta + s * step * vector, 1e-12) for s in (1, -1))
        torch.testing.assert_close((ahead - behind) / (2 * step), drift.projector @ vector, atol=1e-5, rtol=0)
        second += value * (ahead + behind - 2 * zeta) / step**2
    # Ito: E[Phi(zeta + noise)] - zeta = 1/2 d^2 Phi[Sigma / B]; drift1 is its tangent part, curvature the normal one.
    torch.testing.assert_close(second / (2 * 5), drift.drift1 + drift.curvature, atol=2e-5, rtol=0)
    torch.testing.assert_close(drift.projector @ drift.drift1, drift.drift1)
    torch.testing.assert_close(drift.projector @ drift.curvature, torch.zeros_like(zeta), atol=1e-12, rtol=0)
    assert (
        drift.drift1.norm() > 0.01 and drift.curvature.norm() > 0.01
    )  # the comparison above is not of zeros


def test_diffusion_is_the_tangent_noise_of_the_global_batch(on_manifold) -> None:
    loss, zeta, _ = on_manifold
    sigma = covariance(len(zeta), 1)
    drift = slow_sde_drift(loss, zeta, sigma, k=4, batch=12, eta_h=0.3)
    expected = drift.projector @ sigma @ drift.projector / 12
    torch.testing.assert_close(drift.diffusion @ drift.diffusion, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(drift.diffusion, drift.diffusion.T, atol=1e-14, rtol=0)


def test_sigma_hat_solves_the_lyapunov_equation(on_manifold) -> None:
    loss, zeta, _ = on_manifold
    sigma = covariance(len(zeta), 2)
    drift = slow_sde_drift(loss, zeta, sigma, k=4, batch=4, eta_h=0.7)
    hessian = torch.autograd.functional.hessian(loss, zeta)
    rest = sigma - drift.projector @ sigma @ drift.projector
    hat = drift.sigma_hat
    torch.testing.assert_close(hessian @ hat + hat @ hessian, rest, atol=1e-9, rtol=0)


def test_psi_hat_by_an_integral_over_the_round(on_manifold) -> None:
    """psi_hat = (1/x) int_0^x (Sigma_hat - e^-sH Sigma_hat e^-sH) ds: the mean gap to equilibrium, no eigenvectors needed."""
    loss, zeta, _ = on_manifold
    drift = slow_sde_drift(loss, zeta, covariance(len(zeta), 3), k=4, batch=4, eta_h=0.7)
    hessian = torch.autograd.functional.hessian(loss, zeta)
    n, total = 2000, torch.zeros_like(hessian)
    for i in range(n):
        decay = torch.linalg.matrix_exp(-0.7 * (i + 0.5) / n * hessian)
        total += (drift.sigma_hat - decay @ drift.sigma_hat @ decay) / n
    torch.testing.assert_close(drift.psi_hat, total, atol=1e-6, rtol=0)


def test_limits_in_eta_h(on_manifold) -> None:
    loss, zeta, _ = on_manifold
    sigma = covariance(len(zeta), 4)

    def at(eta_h: float | None, k: int = 4):
        return slow_sde_drift(loss, zeta, sigma, k=k, batch=8, eta_h=eta_h)

    torch.testing.assert_close(at(1e9).psi_hat, at(None).sigma_hat, atol=1e-7, rtol=0)
    torch.testing.assert_close(at(math.inf).drift2, at(None).drift2)
    torch.testing.assert_close(at(None).drift2, 3 * at(None).drift1)
    assert float(at(0.0).psi_hat.abs().max()) == 0 and float(at(0.0).drift2.abs().max()) == 0
    assert float(at(0.5, k=1).drift2.abs().max()) == 0
    between = at(0.2).drift2 @ at(0.2).drift1 / at(0.2).drift1.square().sum()
    assert 0 < float(between) < 3
    torch.testing.assert_close(at(0.2).total, at(0.2).drift1 + at(0.2).drift2 + at(0.2).curvature)
    for name in ("drift1", "diffusion", "curvature"):  # Local SGD changes neither of them
        torch.testing.assert_close(getattr(at(0.2), name), getattr(at(0.0), name))


# ---- label noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta_h", [0.0, 0.05, 1.3, None])
def test_the_hyperbola_drifts_as_its_closed_form_says(eta_h: float | None) -> None:
    """d log D / dt = -(sigma^2/B) (1 + (K-1) psi(2 eta H lambda)), so du/dt = -(...) D u / (2 lambda) and dv/dt = +... v."""
    zeta, c, k, batch = f64(2.0, 0.5), 0.7, 8, 16
    normal = f64(0.5, 2.0)
    drift = slow_sde_drift(hyperbola, zeta, c * torch.outer(normal, normal), k=k, batch=batch, eta_h=eta_h)
    gap, lam = 4 - 0.25, 4.25
    share = 1.0 if eta_h is None else psi(2 * eta_h * lam)
    speed = c / batch * gap / (2 * lam)
    tangent = f64(-2.0, 0.5)
    torch.testing.assert_close(drift.drift1, speed * tangent)
    torch.testing.assert_close(drift.drift2, (k - 1) * share * speed * tangent, atol=1e-15, rtol=1e-9)
    torch.testing.assert_close(drift.eigenvalues, f64(0.0, lam), atol=1e-14, rtol=1e-14)
    assert float(drift.diffusion.abs().max()) < 1e-8 and float(drift.curvature.abs().max()) < 1e-14


@pytest.mark.parametrize("eta, h", [(0.1, 1), (0.1, 7), (0.02, 400), (0.1, math.inf)])
def test_label_noise_descends_the_regularizer(on_manifold, eta: float, h: float) -> None:
    """Sigma = c Hessian: the drift is -(c/4B) P grad of the regulariser, differentiated through the eigenvalues."""
    loss, zeta, _ = on_manifold
    c, k, batch = 0.6, 4, 8
    point = zeta.clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(loss, point, create_graph=True)
    value = label_noise_regularizer(torch.linalg.eigvalsh(hessian), eta, h, k)
    (slope,) = torch.autograd.grad(value, point)
    drift = slow_sde_drift(loss, zeta, c * hessian.detach(), k=k, batch=batch, eta_h=eta * h)
    expected = -c / (4 * batch) * drift.projector @ slope
    torch.testing.assert_close(drift.drift1 + drift.drift2, expected, atol=1e-9, rtol=1e-7)


def test_the_regularizer_runs_from_the_trace_to_k_times_the_trace() -> None:
    eigs = f64(0.0, 1.0, 3.0).expand(2, 3)
    assert label_noise_regularizer(eigs, 1e-12, 1, 8).tolist() == pytest.approx([4.0, 4.0])
    assert label_noise_regularizer(eigs, 0.1, 10**8, 8).tolist() == pytest.approx([32.0, 32.0], rel=1e-5)
    assert label_noise_regularizer(eigs, 0.1, math.inf, 8).tolist() == [32.0, 32.0]
    assert label_noise_regularizer(eigs, 0.1, 5, 1).tolist() == [4.0, 4.0]


# ---- the theorem, by simulation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [1, 100])
def test_moments_of_the_projected_iterate_on_a_circle(h: int) -> None:
    """Local SGD with constant anisotropic noise, against the Slow SDE: all its terms act here. Phi(theta) = theta / |theta|.

    Bounds: 4 standard errors and 3 % for the corrections of order eta lambda (1 %) and of the finite number of rounds.
    """
    k, eta, replicas, steps = 8, 0.01, 1200, 3000
    generator = torch.Generator().manual_seed(5)
    sigma_local = torch.tensor([[0.7, 0.15], [0.15, 0.1]], dtype=torch.float64)  # Sigma / B_loc
    root = torch.linalg.cholesky(sigma_local)

    def run(theta: Tensor, steps: int) -> Tensor:
        """[2, K, R], the workers equal at the start and the end."""
        noise = torch.empty_like(theta)
        for step in range(1, steps + 1):
            noise.normal_(generator=generator)
            kick = torch.tensordot(root, noise, dims=1)
            pull = theta * (theta.square().sum(0, keepdim=True) - 1) / 2
            theta = theta - eta * (pull + kick)
            if step % h == 0:
                theta = theta.mean(1, keepdim=True).expand_as(theta).clone()
        return theta

    theta = torch.zeros(2, k, replicas, dtype=torch.float64)
    theta[0] = 1.0
    theta = run(theta, 500)  # five relaxation times, to the stationary spread
    first = torch.atan2(theta[1, 0], theta[0, 0])
    theta = run(theta, steps)
    moved = torch.atan2(theta[1, 0], theta[0, 0]) - first
    moved = torch.atan2(moved.sin(), moved.cos())

    # Coefficients as functions of the angle: harmonics of 2 phi, from slow_sde_drift at 8 angles.
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 8
    rows = []
    for angle in angles.tolist():
        zeta, tangent = f64(math.cos(angle), math.sin(angle)), f64(-math.sin(angle), math.cos(angle))
        drift = slow_sde_drift(
            circle, zeta, sigma_local * 4, k=k, batch=4 * k, eta_h=eta * h if h > 1 else 0.0
        )
        torch.testing.assert_close(drift.curvature @ zeta, -(drift.diffusion @ tangent).square().sum() / 2)
        rows.append([float(drift.total @ tangent), float((drift.diffusion @ tangent).square().sum())])

    def harmonics(phi: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(phi), (2 * phi).cos(), (2 * phi).sin()], -1)

    fit = torch.linalg.lstsq(harmonics(angles), torch.tensor(rows, dtype=torch.float64)).solution
    torch.testing.assert_close(
        harmonics(angles) @ fit, torch.tensor(rows, dtype=torch.float64), atol=1e-9, rtol=0
    )
    phi = first.repeat(20)
    origin, dt = phi.clone(), eta**2 * steps / 200
    for _ in range(200):
        speed, variance = (harmonics(phi) @ fit).unbind(-1)
        noise = torch.randn(phi.shape, generator=generator, dtype=torch.float64)
        phi = phi + speed * dt + (variance.clamp_min(0) * dt).sqrt() * noise
    expected = phi - origin

    se = float(moved.std()) / math.sqrt(replicas)
    assert abs(float(expected.mean())) > (2 if h == 1 else 8) * se  # there is a drift to see
    assert float(moved.mean()) == pytest.approx(float(expected.mean()), rel=0.03, abs=4 * se)
    relative = math.sqrt(2 / replicas)
    assert float(moved.var()) == pytest.approx(float(expected.var()), rel=0.03 + 4 * relative)


# ---- kinds and errors ----------------------------------------------------------------------------------------------


def test_dtype_of_theta_and_a_loss_without_third_derivative() -> None:
    drift = slow_sde_drift(
        lambda p: p[0] ** 2, torch.tensor([0.0, 1.0]), torch.eye(2), k=2, batch=2, eta_h=1.0
    )
    assert drift.drift1.dtype == drift.diffusion.dtype == torch.float32 and drift.rank == 1
    assert drift.total.tolist() == [0, 0]
    torch.testing.assert_close(drift.diffusion, torch.tensor([[0.0, 0.0], [0.0, 0.5**0.5]]))


def test_near_zero_eigenvalues_are_counted_by_rank_tol() -> None:
    def loss(p: Tensor) -> Tensor:
        return p[0] ** 2 / 2 + 1e-6 * p[1] ** 2 / 2 + p[2] * p[0] ** 2

    zero, noise = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert slow_sde_drift(loss, zero, noise, k=1, batch=1).rank == 2
    assert slow_sde_drift(loss, zero, noise, k=1, batch=1, rank_tol=1e-5).rank == 1


def test_errors_say_what_to_do() -> None:
    point, noise = f64(2.0, 0.5), torch.eye(2, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"not on the manifold.*gradient is 0\.418.*project_to_manifold\(loss_fn, theta\)"
    ):
        slow_sde_drift(hyperbola, f64(2.0, 0.6), noise, k=1, batch=1)
    with pytest.raises(ValueError, match="not a local minimiser: the Hessian has the eigenvalue -1"):
        slow_sde_drift(lambda p: p[0] ** 2 - p[1] ** 2 / 2, f64(0.0, 0.0), noise, k=1, batch=1)
    with pytest.raises(ValueError, match="batch = 9 is not a multiple of k = 2: batch is the global batch"):
        slow_sde_drift(hyperbola, point, noise, k=2, batch=9)
    with pytest.raises(ValueError, match="k = 0: expected a whole number >= 1"):
        slow_sde_drift(hyperbola, point, noise, k=0, batch=1)
    with pytest.raises(ValueError, match="eta_h must be >= 0"):
        slow_sde_drift(hyperbola, point, noise, k=1, batch=1, eta_h=-1.0)
    with pytest.raises(ValueError, match="rank_tol must lie in"):
        slow_sde_drift(hyperbola, point, noise, k=1, batch=1, rank_tol=1.0)
    with pytest.raises(ValueError, match=r"theta must be a vector \[d\], got shape \(2, 1\)"):
        slow_sde_drift(hyperbola, point[:, None], noise, k=1, batch=1)
    with pytest.raises(ValueError, match=r"sigma must have shape \(2, 2\).*got \(3, 3\)"):
        slow_sde_drift(hyperbola, point, torch.eye(3), k=1, batch=1)
    with pytest.raises(ValueError, match="finite symmetric"):
        slow_sde_drift(hyperbola, point, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), k=1, batch=1)
    with pytest.raises(ValueError, match="positive semi-definite: it has the eigenvalue -1"):
        slow_sde_drift(hyperbola, point, -noise, k=1, batch=1)
    with pytest.raises(TypeError, match=r"sigma must be a floating-point tensor \[d, d\], got list"):
        slow_sde_drift(hyperbola, point, [[1.0]], k=1, batch=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="theta must be a floating-point tensor, got torch.int64"):
        slow_sde_drift(hyperbola, torch.tensor([1, 1]), noise, k=1, batch=1)
    eigs = f64(1.0)
    for arguments, message in [
        ((eigs, 0.0, 1, 2), "eta must be a positive learning rate, got 0.0"),
        ((eigs, 0.1, 0, 2), "h must be at least 1 local step, got 0"),
        ((eigs, 0.1, 1, 0), "k = 0"),
        ((eigs[0], 0.1, 1, 2), r"eigs must have a last axis .* eigs.reshape\(1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            label_noise_regularizer(*arguments)
    with pytest.raises(TypeError, match="eigs must be a tensor of eigenvalues, got float"):
        label_noise_regularizer(1.0, 0.1, 1, 2)  # type: ignore[arg-type]
