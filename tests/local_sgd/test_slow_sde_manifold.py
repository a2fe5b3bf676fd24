"""Phi against what gradient flow conserves and against another integrator."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from papercore.local_sgd import project_to_manifold
from papercore.local_sgd.manifold import derivatives


def hyperbola(p: Tensor) -> Tensor:
    return (p[0] * p[1] - 1) ** 2 / 2


@pytest.mark.parametrize("start", [(2.0, 1.0), (0.1, -0.3), (-2.0, -2.0), (0.5, 3.0), (-0.2, 1.4)])
@pytest.mark.parametrize("tol", [1e-6, 1e-11])
def test_the_end_on_the_hyperbola_is_known(start: tuple[float, float], tol: float) -> None:
    """u^2 - v^2 is conserved, and the larger coordinate keeps its sign."""
    u, v = start
    gap = u * u - v * v
    lam = math.sqrt(gap**2 + 4)
    side = math.copysign(1.0, u if abs(u) >= abs(v) else v)
    end = project_to_manifold(hyperbola, torch.tensor(start, dtype=torch.float64), tol)
    expected = [side * math.sqrt((lam + gap) / 2), side * math.sqrt((lam - gap) / 2)]
    # At the end the gradient, and so lambda times the distance that is left, is at most tol; a few dozen steps err by tol each.
    assert end.tolist() == pytest.approx(expected, abs=20 * tol)


def test_against_another_integrator_where_nothing_is_conserved() -> None:
    def loss(p: Tensor) -> Tensor:
        return (p[0] * p[1] - 1) ** 2 / 2 + 3 * (p[2] - p[0] ** 2) ** 2 + 0.3

    def velocity(_: float, p) -> list[float]:
        u, v, w = p
        r, s = u * v - 1, w - u * u
        return [-(r * v - 12 * s * u), -(r * u), -6 * s]

    start = [2.0, 1.0, 2.0]
    other = solve_ivp(velocity, (0, 60), start, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    end = project_to_manifold(loss, torch.tensor(start, dtype=torch.float64), 1e-10)
    assert end.tolist() == pytest.approx(other.tolist(), abs=3e-9)


def test_a_point_of_the_manifold_stays_and_shape_and_dtype_are_kept() -> None:
    point = torch.tensor([2.0, 0.5], requires_grad=True)
    end = project_to_manifold(hyperbola, point)
    assert end.tolist() == [2.0, 0.5] and end is not point and not end.requires_grad
    matrix = project_to_manifold(lambda m: (m @ m.T - torch.eye(2).to(m)).square().sum(), torch.eye(2) * 1.5)
    assert matrix.shape == (2, 2) and matrix.dtype == torch.float32
    torch.testing.assert_close(matrix, torch.eye(2))
    with torch.no_grad():
        assert project_to_manifold(hyperbola, torch.tensor([2.0, 0.5])).tolist() == [2.0, 0.5]


def test_a_trial_step_that_overflows_is_taken_back() -> None:
    end = project_to_manifold(
        lambda p: torch.where(p < 0, torch.nan, (p - 0.01) ** 2).sum(),
        torch.tensor([3.0, 1.0], dtype=torch.float64),
    )
    assert end.tolist() == pytest.approx([0.01, 0.01], abs=1e-8)


def test_derivatives_against_pen_and_paper() -> None:
    """Third derivatives of (uv - 1)^2 / 2: d3/du2dv = 2v, d3/dudv2 = 2u."""
    u, v = 2.0, 0.7
    gradient, hessian, contract = derivatives(hyperbola, torch.tensor([u, v], dtype=torch.float64))
    x = u * v - 1
    assert gradient.tolist() == pytest.approx([x * v, x * u])
    assert hessian.flatten().tolist() == pytest.approx([v * v, 2 * u * v - 1, 2 * u * v - 1, u * u])
    matrix = torch.tensor([[1.0, 3.0], [3.0, 5.0]], dtype=torch.float64)
    assert contract(matrix).tolist() == pytest.approx([3 * 2 * 2 * v + 5 * 2 * u, 1 * 2 * v + 2 * 3 * 2 * u])
    assert contract(matrix).tolist() == contract(matrix).tolist()  # it can be called again


def test_errors_say_what_to_do() -> None:
    point = torch.tensor([2.0, 1.0], dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"did not bring the gradient down to tol = 1e-09 in 3 steps.*raise max_steps"
    ):
        project_to_manifold(hyperbola, point, max_steps=3)
    with pytest.raises(ValueError, match="tol must lie between 1e-12"):
        project_to_manifold(hyperbola, point, 0.0)
    with pytest.raises(ValueError, match="the gradient of loss_fn is not finite"):
        project_to_manifold(lambda p: p.sum() * float("nan"), point)
    with pytest.raises(TypeError, match=r"loss_fn must return a scalar tensor, got \(2,\)"):
        project_to_manifold(lambda p: p**2, point)
    with pytest.raises(TypeError, match="loss_fn must return a scalar tensor, got float"):
        project_to_manifold(lambda p: p.sum().item(), point)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="does not depend on its argument"):
        project_to_manifold(lambda p: p.detach().sum(), point)
    with pytest.raises(TypeError, match="theta must be a floating-point tensor, got list"):
        project_to_manifold(hyperbola, [1.0, 2.0])  # type: ignore[arg-type]
