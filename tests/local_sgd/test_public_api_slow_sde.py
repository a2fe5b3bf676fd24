"""The Slow SDE through public names: psi, and the drift by brute force and in closed form."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch import Tensor

from papercore.local_sgd import (
    label_noise_regularizer,
    project_to_manifold,
    psi,
    psi_integral,
    slow_sde_drift,
)

DOUBLE = torch.float64
GRID = torch.cat([torch.zeros(1, dtype=DOUBLE), torch.logspace(-12, 4, 65, dtype=DOUBLE)])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


# ---- psi (W5) ----------------------------------------------------------------------------------------------------------


def exact_psi(x: float) -> float:
    """1 - (1 - e^-x)/x; below 0.01 by its series, which loses nothing there."""
    if x < 0.01:
        return math.fsum((-1) ** (n + 1) * x**n / math.factorial(n + 1) for n in range(1, 9))
    return 1 + math.expm1(-x) / x


def test_psi_everywhere() -> None:
    found = psi(GRID)
    for x, value in zip(GRID.tolist(), found.tolist(), strict=True):
        assert value == pytest.approx(exact_psi(x), rel=1e-13, abs=0)
    assert found.shape == GRID.shape and found.dtype == DOUBLE


@pytest.mark.parametrize(("x", "value"), [(0.1, 0.0484), (1, 0.3679), (2, 0.5677), (10, 0.9000), (100, 0.99)])
def test_psi_values_of_the_sheet(x: float, value: float) -> None:
    assert round(float(psi(tensor(x))), 4) == value


def test_psi_in_single_precision() -> None:
    found = psi(GRID.float())
    assert found.dtype == torch.float32
    expected = torch.tensor([exact_psi(x) for x in GRID.float().tolist()], dtype=DOUBLE)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_psi_is_zero_at_zero_monotone_and_below_one() -> None:
    found = psi(GRID)
    assert found[0] == 0
    assert bool((found[1:] > found[:-1]).all()) and bool((found < 1).all())
    assert float(psi(tensor(1e12))) == pytest.approx(1, abs=1e-11)


def test_psi_near_zero_is_its_series() -> None:
    x = torch.logspace(-10, -2, 30, dtype=DOUBLE)
    torch.testing.assert_close(psi(x), x / 2 - x**2 / 6 + x**3 / 24, rtol=1e-7, atol=0)


def test_psi_has_derivatives_also_at_zero() -> None:
    x = tensor(0.0, 1e-9, 1e-4, 0.3, 2.0, 50.0).requires_grad_()
    (slope,) = torch.autograd.grad(psi(x).sum(), x, create_graph=True)
    for at, found in zip(x.tolist(), slope.tolist(), strict=True):
        # d/dx [1 - (1 - e^-x)/x] = (1 - e^-x (1 + x)) / x^2; 1/2 - x/3 near zero
        expected = 0.5 - at / 3 + at**2 / 8 if at < 1e-3 else (-math.expm1(-at) - at * math.exp(-at)) / at**2
        assert found == pytest.approx(expected, rel=1e-9)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert curvature[0] == pytest.approx(-1 / 3, rel=1e-9)
    assert torch.isfinite(curvature).all()


# ---- the integral of psi (W6) ------------------------------------------------------------------------------------------


def test_psi_integral_in_closed_form() -> None:
    """F(x) = x - Ein(x), Ein(x) = ln x + gamma + E1(x)."""
    for x in (0.5, 1.0, 3.0, 10.0, 40.0, 1e4):
        expected = x - (math.log(x) + np.euler_gamma + special.exp1(x))
        assert float(psi_integral(tensor(x))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("x", [1e-8, 1e-3, 0.07, 0.9, 2.5, 30.0])
def test_psi_integral_by_quadrature(x: float) -> None:
    expected = integrate.quad(lambda t: x * exact_psi(t * x), 0, 1, epsabs=0, epsrel=1e-12)[0]
    assert float(psi_integral(tensor(x))) == pytest.approx(expected, rel=1e-10)


def test_the_derivative_of_the_integral_is_psi() -> None:
    x = tensor(0.0, 1e-7, 1e-3, 0.2, 1.0, 4.0, 25.0, 300.0).requires_grad_()
    (slope,) = torch.autograd.grad(psi_integral(x).sum(), x)
    torch.testing.assert_close(slope, psi(x.detach()), rtol=1e-10, atol=1e-15)
    assert float(psi_integral(tensor(0.0))) == 0


# ---- the drift on the hyperbola (W7) -----------------------------------------------------------------------------------


def hyperbola(theta: Tensor) -> Tensor:
    return 0.5 * (theta[0] * theta[1] - 1) ** 2


def label_noise_covariance(theta: Tensor, variance: float) -> Tensor:
    """Of a single sample: the gradient is (uv - 1 - delta) (v, u)."""
    normal = theta.flip(0)
    return variance * torch.outer(normal, normal)


POINTS = [(2.0, 0.5), (1.25, 0.8), (0.4, 2.5), (-2.0, -0.5), (1.0, 1.0)]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("k", "batch", "eta_h"), [(8, 8, 0.3), (4, 32, 2.0), (1, 2, 0.7), (8, 64, 0.01)])
def test_drift_on_the_hyperbola(point: tuple[float, float], k: int, batch: int, eta_h: float) -> None:
    """dD/dt = -(sigma^2 / B) [1 + (K - 1) psi(2 eta H lambda)] D along u v = 1, D = u^2 - v^2."""
    (u, v), variance = point, 0.6
    theta = tensor(u, v)
    sharp, d = u * u + v * v, u * u - v * v
    drift = slow_sde_drift(
        hyperbola, theta, label_noise_covariance(theta, variance), k=k, batch=batch, eta_h=eta_h
    )
    one = -variance * d / (2 * batch * sharp) * tensor(u, -v)
    two = (k - 1) * exact_psi(2 * eta_h * sharp) * one
    torch.testing.assert_close(drift.drift1, one, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(drift.drift2, two, rtol=1e-9, atol=1e-12)
    assert float(drift.diffusion.abs().max()) < 1e-7, "label noise has no component along the manifold"
    total = drift.drift1 + drift.drift2
    d_dot = 2 * u * float(total[0]) - 2 * v * float(total[1])
    assert d_dot == pytest.approx(
        -variance / batch * (1 + (k - 1) * exact_psi(2 * eta_h * sharp)) * d, rel=1e-9, abs=1e-12
    )
    assert float(total[0] * v + total[1] * u) == pytest.approx(0, abs=1e-12), "along the manifold"


def test_the_two_limits_of_eta_h() -> None:
    """W9: nothing is added at eta H -> 0; the drift is K-fold at eta H -> infinity."""
    theta = tensor(2.0, 0.5)
    sigma = label_noise_covariance(theta, 1.0)
    small = slow_sde_drift(hyperbola, theta, sigma, k=8, batch=8, eta_h=1e-9)
    assert float(small.drift2.norm() / small.drift1.norm()) < 1e-6
    large = slow_sde_drift(hyperbola, theta, sigma, k=8, batch=8, eta_h=1e9)
    torch.testing.assert_close(large.drift2, 7 * large.drift1, rtol=1e-6, atol=0)
    quadratic = slow_sde_drift(hyperbola, theta, sigma, k=8, batch=8)
    torch.testing.assert_close(quadratic.drift2, 7 * quadratic.drift1, rtol=1e-12, atol=0)


# ---- the drift in general (W8) -----------------------------------------------------------------------------------------


def constraints(theta: Tensor) -> Tensor:
    a, b, c, d = theta
    return torch.stack([a * b - 1 + 0.3 * c**2 + 0.2 * d, c + d**2 - 0.5 + 0.2 * a * d])


def two_constraints(theta: Tensor) -> Tensor:
    """Its minimisers are a surface in four dimensions."""
    g = constraints(theta)
    return 0.5 * (g[0] ** 2 + 2.0 * g[1] ** 2 + g[0] * g[1])


def on_the_surface() -> Tensor:
    theta = tensor(1.3, 0.7, 0.2, 0.5)
    for _ in range(50):
        jacobian = torch.autograd.functional.jacobian(constraints, theta)
        theta = theta - torch.linalg.pinv(jacobian) @ constraints(theta)
    assert float(constraints(theta).abs().max()) < 1e-14
    return theta


def hessian(loss: Callable[[Tensor], Tensor], theta: Tensor) -> np.ndarray:
    return torch.autograd.functional.hessian(loss, theta).numpy()


def third(loss: Callable[[Tensor], Tensor], theta: Tensor, m: np.ndarray) -> np.ndarray:
    """Gradient of <Hessian, M> with M frozen: central differences of the Hessian, Richardson's step included."""

    def difference(h: float) -> np.ndarray:
        steps = h * torch.eye(theta.numel(), dtype=DOUBLE)
        return np.array(
            [((hessian(loss, theta + s) - hessian(loss, theta - s)) * m).sum() / (2 * h) for s in steps]
        )

    return (4 * difference(5e-4) - difference(1e-3)) / 3


def covariance() -> Tensor:
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    return root @ root.T / 4


@pytest.mark.parametrize(("k", "batch", "eta_h"), [(4, 8, 0.4), (16, 16, 0.05), (2, 6, 5.0)])
def test_drift_by_brute_force(k: int, batch: int, eta_h: float) -> None:
    theta, sigma = on_the_surface(), covariance()
    values, vectors = np.linalg.eigh(hessian(two_constraints, theta))
    assert (values > 0.1).sum() == 2 and np.abs(values[:2]).max() < 1e-12
    tangent = vectors[:, :2] @ vectors[:, :2].T
    along = tangent @ sigma.numpy() @ tangent
    rest = sigma.numpy() - along
    hat, scaled = np.zeros((4, 4)), np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            total = values[i] + values[j]
            if total > 1e-8:
                term = vectors[:, i] @ rest @ vectors[:, j] / total * np.outer(vectors[:, i], vectors[:, j])
                hat += term
                scaled += exact_psi(eta_h * total) * term
    h = hessian(two_constraints, theta)
    np.testing.assert_allclose(h @ hat + hat @ h, rest, atol=1e-12)  # the Lyapunov equation
    one = -tangent @ third(two_constraints, theta, hat) / (2 * batch)
    two = -(k - 1) * tangent @ third(two_constraints, theta, scaled) / (2 * batch)

    drift = slow_sde_drift(two_constraints, theta, sigma, k=k, batch=batch, eta_h=eta_h)
    np.testing.assert_allclose(tangent @ drift.drift1.numpy(), one, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(tangent @ drift.drift2.numpy(), two, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(drift.drift2.numpy(), two, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(drift.diffusion @ drift.diffusion.T, along / batch, atol=1e-10)


def test_noise_along_the_hessian_descends_the_regularizer() -> None:
    """With Sigma = c H: drift1 + drift2 = -(c / 4B) times the gradient, along the surface, of the regularizer."""
    theta, c, k, batch, eta, h = on_the_surface(), 0.7, 6, 12, 0.05, 9
    matrix = torch.tensor(hessian(two_constraints, theta))
    drift = slow_sde_drift(two_constraints, theta, c * matrix, k=k, batch=batch, eta_h=eta * h)
    _, vectors = torch.linalg.eigh(matrix)

    def value(at: Tensor) -> float:
        eigs = torch.linalg.eigvalsh(torch.tensor(hessian(two_constraints, at)))[2:]
        return float(label_noise_regularizer(eigs, eta=eta, h=h, k=k))

    step = 1e-4
    expected = torch.zeros(4, dtype=DOUBLE)
    for direction in vectors[:, :2].T:
        slope = (value(theta + step * direction) - value(theta - step * direction)) / (2 * step)
        expected -= c / (4 * batch) * slope * direction
    found = vectors[:, :2] @ vectors[:, :2].T @ (drift.drift1 + drift.drift2)
    # Off the surface, by step^2, the two zero eigenvalues move too: the tolerance is that of the differences.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert float(expected.norm()) > 1e-3


def test_a_single_worker_has_no_second_drift() -> None:
    drift = slow_sde_drift(two_constraints, on_the_surface(), covariance(), k=1, batch=3, eta_h=0.5)
    assert float(drift.drift2.abs().max()) == 0


# ---- refused input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, ("k", "0")),
        ({"k": -3}, ("k", "-3")),
        ({"batch": 0}, ("batch", "0")),
        ({"k": 3, "batch": 8}, ("batch", "8", "3")),
        ({"eta_h": -0.5}, ("eta_h", "-0.5")),
        ({"eta_h": math.nan}, ("eta_h", "nan")),
        ({"rank_tol": -1.0}, ("rank_tol", "-1")),
        ({"sigma": torch.eye(3, dtype=DOUBLE)}, ("sigma", "3", "2")),
        ({"sigma": tensor(1.0, 2.0)}, ("sigma",)),
    ],
)
def test_wrong_values_are_named(change: dict, words: tuple[str, ...]) -> None:
    theta = tensor(2.0, 0.5)
    options = {"sigma": label_noise_covariance(theta, 1.0), "k": 4, "batch": 8, "eta_h": 0.5, **change}
    with pytest.raises(ValueError) as error:
        slow_sde_drift(hyperbola, theta, options.pop("sigma"), **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_off_the_manifold_the_way_back_is_named() -> None:
    theta = tensor(2.0, 0.7)
    with pytest.raises(ValueError, match="project_to_manifold"):
        slow_sde_drift(hyperbola, theta, torch.eye(2, dtype=DOUBLE), k=2, batch=2, eta_h=1.0)


def test_counts_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        slow_sde_drift(hyperbola, tensor(2.0, 0.5), torch.eye(2, dtype=DOUBLE), 2, 2)


# ---- the projection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [(2.0, 0.7), (1.1, 0.4), (-1.5, -0.9), (0.8, 0.8), (3.0, 0.1)])
def test_projection_on_the_hyperbola_keeps_d(point: tuple[float, float]) -> None:
    """Gradient flow keeps u^2 - v^2: its limit is known."""
    u, v = point
    d = u * u - v * v
    limit = math.copysign(math.sqrt((d + math.hypot(d, 2)) / 2), u)
    found = project_to_manifold(hyperbola, tensor(u, v))
    torch.testing.assert_close(found.detach(), tensor(limit, 1 / limit), rtol=0, atol=1e-6)


def test_projection_leaves_the_manifold_alone() -> None:
    theta = on_the_surface()
    torch.testing.assert_close(project_to_manifold(two_constraints, theta).detach(), theta, rtol=0, atol=1e-9)


def test_the_derivative_of_the_projection_is_the_tangent_projector() -> None:
    theta = on_the_surface()
    _, vectors = np.linalg.eigh(hessian(two_constraints, theta))
    tangent = torch.tensor(vectors[:, :2] @ vectors[:, :2].T)
    step = 1e-3
    columns = [
        (project_to_manifold(two_constraints, theta + s) - project_to_manifold(two_constraints, theta - s))
        / (2 * step)
        for s in step * torch.eye(4, dtype=DOUBLE)
    ]
    torch.testing.assert_close(torch.stack(columns, 1).detach(), tangent, rtol=0, atol=1e-4)


def test_the_curvature_is_the_second_derivative_of_the_projection() -> None:
    """P(A dW) is A dW + (1/2) d2Phi[A A^T] dt for tangent A; the second term is normal to the surface."""
    theta = on_the_surface()
    drift = slow_sde_drift(two_constraints, theta, covariance(), k=4, batch=8, eta_h=0.4)
    h, expected = 0.02, torch.zeros(4, dtype=DOUBLE)
    for column in drift.diffusion.T:
        for step, weight in ((h, -1 / 3), (h / 2, 4 / 3)):
            both = sum(project_to_manifold(two_constraints, theta + s * column) for s in (step, -step))
            expected += weight * 0.5 * (both - 2 * theta) / step**2
    torch.testing.assert_close(drift.curvature, expected, rtol=1e-3, atol=1e-5)
    assert float(expected.norm()) > 1e-3


# ---- the regularizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "h", "k"), [(0.1, 4, 8), (0.01, 1, 3), (0.32, 600, 32), (0.1, 4, 1)])
def test_regularizer_in_closed_form(eta: float, h: int, k: int) -> None:
    """tr(H) + (K - 1)/(2 eta H) tr F(2 eta H Hess); its slope is 1 + (K - 1) psi(2 eta H lambda)."""
    eigs = tensor(4.25, 0.3, 1e-4, 0.0).requires_grad_()
    value = label_noise_regularizer(eigs, eta=eta, h=h, k=k)
    x = 2 * eta * h
    f = [
        0 if e == 0 else integrate.quad(lambda t, e=e: x * e * exact_psi(t * x * e), 0, 1, epsrel=1e-11)[0]
        for e in eigs.tolist()
    ]
    assert float(value.detach()) == pytest.approx(sum(eigs.tolist()) + (k - 1) / x * sum(f), rel=1e-9)
    (slope,) = torch.autograd.grad(value, eigs)
    expected = [1 + (k - 1) * exact_psi(x * e) for e in eigs.tolist()]
    torch.testing.assert_close(slope, tensor(*expected), rtol=1e-9, atol=0)


def test_regularizer_is_between_one_and_k_traces() -> None:
    eigs = tensor(3.0, 1.0)
    values = [float(label_noise_regularizer(eigs, eta=0.01, h=h, k=8)) for h in (1, 10, 100, 10_000, 10**8)]
    assert values == sorted(values)
    assert 4 < values[0] < 4.5 and values[-1] == pytest.approx(32, rel=1e-4) and values[-1] < 32
