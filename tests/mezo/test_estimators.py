"""Explicit estimates against gradients, closed-form moments, and each other.

Statistical bounds are k standard errors of the theory or of the sample; each test states its chance of a
false alarm. The seeds are fixed, so a pass stays a pass.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import MeZO, draw_seed, effective_rank, gradient_norms, noise, one_point_grad, spsa_grad

# torch.func loads its decompositions with torch.jit.script on first use, which torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

DISTS = ["gaussian", "rademacher", "sphere"]


def bent(theta: Tensor) -> Tensor:
    return (theta.sin() + 0.3 * theta**3).sum() + (0.5 * theta.sum()).exp()


def point(d: int, seed: int = 1) -> Tensor:
    return noise(seed, 0, d, dtype=torch.float64)


# ---- SPSA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
def test_slope_tends_to_the_jvp_as_eps_squared(dist: str) -> None:
    theta = point(9)
    z = noise(draw_seed(3, 0), 0, 9, dist=dist, dtype=torch.float64)
    _, slope = torch.func.jvp(bent, (theta,), (z,))
    errors = []
    for eps in (0.04, 0.02, 0.01):
        (estimate,) = spsa_grad(lambda: bent(theta), [theta], eps, dist=dist, seed=3)
        torch.testing.assert_close(estimate / z, torch.full_like(z, float((estimate / z)[0])))
        errors.append(float((estimate / z)[0] - slope))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("eps", [1e-3, 1.0, 30.0])
def test_no_eps_error_on_a_quadratic_and_the_third_derivative_on_a_cubic(eps: float) -> None:
    theta = point(6)
    z = noise(draw_seed(5, 0), 0, 6, dtype=torch.float64)
    (quadratic,) = spsa_grad(lambda: (theta**2).sum(), [theta], eps, seed=5)
    torch.testing.assert_close(quadratic, 2 * (theta @ z) * z, rtol=1e-8, atol=1e-9)
    if eps > 0.1:
        (cubic,) = spsa_grad(lambda: (theta**3).sum(), [theta], eps, seed=5)
        expected = 3 * (theta**2) @ z + eps**2 / 6 * 6 * (z**3).sum()
        torch.testing.assert_close(cubic, expected * z, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("n", [1, 4])
def test_moments_of_the_estimate(dist: str, n: int) -> None:
    """Mean = gradient and E|g_hat|^2 = factor |g|^2: (d+n+1)/n Gaussian, (d+n-1)/n sphere and Rademacher
    (lemmas 2, 5).

    20,000 draws; 4 standard errors of the sample for the norm, 4.5 for each of 20 coordinates: false alarm <
    3e-4. The directions come straight from noise(); a few estimates are compared with spsa_grad itself.
    """
    d, draws = 20, 20_000 // n
    g = point(d, 2)
    total, square, coordinates = 0.0, 0.0, torch.zeros(d, dtype=torch.float64)
    squares = torch.zeros(d, dtype=torch.float64)
    flat = noise(77, 0, draws * n * d, dist="rademacher" if dist == "rademacher" else "gaussian").double()
    z = flat.reshape(draws, n, d)
    if dist == "sphere":
        z = z * math.sqrt(d) / z.norm(dim=-1, keepdim=True)
    estimates = torch.einsum("snd,sn->sd", z, z @ g) / n
    norms = (estimates**2).sum(-1)
    total, square = float(norms.mean()), float(norms.std())
    coordinates, squares = estimates.mean(0), estimates.std(0)
    factor = (d + n + 1) / n if dist == "gaussian" else (d + n - 1) / n
    assert abs(total / float(g @ g) - factor) < 4 * square / math.sqrt(draws) / float(g @ g)
    assert bool(((coordinates - g).abs() < 4.5 * squares / math.sqrt(draws)).all())
    theta = torch.zeros(d, dtype=torch.float64)
    (one,) = spsa_grad(lambda: g @ theta, [theta], 0.1, n=n, dist=dist, seed=9)
    z = torch.stack(
        [
            noise(
                draw_seed(9, 0, j), 0, d, dist="rademacher" if dist == "rademacher" else "gaussian"
            ).double()
            for j in range(n)
        ]
    )
    if dist == "sphere":
        z = z * math.sqrt(d) / z.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(one, (z * (z @ g)[:, None]).mean(0), rtol=1e-6, atol=1e-7)


def test_second_moment_matrix_of_sphere_and_gaussian() -> None:
    """The closed forms at d = 4, n = 1, a million draws; 4.5 standard errors in 16 entries twice: < 3e-4."""
    d, draws = 4, 1_000_000
    g = point(d, 3)
    outer, norm = torch.outer(g, g), float(g @ g)
    z = noise(78, 0, draws * d).double().reshape(draws, d)
    closed = {
        "gaussian": 2 * outer + norm * torch.eye(d),
        "sphere": (1 + (d - 2) / (d + 2)) * outer + d / (d + 2) * norm * torch.eye(d),
    }
    for dist, expected in closed.items():
        if dist == "sphere":
            z = z * math.sqrt(d) / z.norm(dim=-1, keepdim=True)
        estimates = z * (z @ g)[:, None]
        products = (estimates[:, :, None] * estimates[:, None, :]).reshape(draws, -1)
        error = (products.mean(0) - expected.reshape(-1)).abs()
        assert bool((error < 4.5 * products.std(0) / math.sqrt(draws)).all())


@pytest.mark.parametrize("n", [1, 3])
def test_the_estimate_is_what_the_optimiser_steps_along(n: int) -> None:
    params = [nn.Parameter(point(8)), nn.Parameter(point(5, 2).reshape(5, 1))]
    before = [p.detach().clone() for p in params]

    def loss() -> Tensor:
        return bent(torch.cat([p.detach().reshape(-1) for p in params]))

    estimate = spsa_grad(loss, params, 0.01, n=n, seed=11)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)), "restored to the same bits"
    MeZO(params, 0.5, 0.01, n=n, seed=11, mode="exact").step(loss)
    for p, b, g in zip(params, before, estimate, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.5 * g, rtol=1e-6, atol=1e-6)


def test_tensors_keep_their_dtype_and_place() -> None:
    theta = [torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(4, dtype=torch.float64)]
    estimate = spsa_grad(lambda: sum(t.double().sum() for t in theta), theta, 0.5)
    assert [(g.dtype, g.shape) for g in estimate] == [(t.dtype, t.shape) for t in theta]


def test_scaled_blocks_keep_or_divide_the_expectation() -> None:
    """Definitions 6 and 7 on a linear loss with Rademacher z, one draw by hand and the mean over all signs."""
    g = [torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5]).double()]
    theta = [torch.zeros(2).double(), torch.zeros(1).double()]
    scales = [4.0, 0.25]

    def loss() -> Tensor:
        return g[0] @ theta[0] + g[1] @ theta[1]

    z = noise(draw_seed(6, 0), 0, 3, dist="rademacher", dtype=torch.float64)
    slope = float(g[0] @ z[:2]) / 4 + float(g[1] @ z[2:]) / 0.25
    variance = spsa_grad(loss, theta, 0.1, dist="rademacher", seed=6, scales=scales)
    torch.testing.assert_close(
        torch.cat(variance), slope * z * torch.tensor([4, 4, 0.25]).double(), rtol=1e-6, atol=0
    )
    expectation = spsa_grad(
        loss, theta, 0.1, dist="rademacher", seed=6, scales=scales, modified="expectation"
    )
    torch.testing.assert_close(torch.cat(expectation), slope * z, rtol=1e-6, atol=0)
    # The mean over all 8 sign patterns is exact: the gradient, and the gradient over the scales.
    patterns = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
    slopes = patterns[:, :2] @ g[0] / 4 + patterns[:, 2:] @ g[1] / 0.25
    mean = (slopes[:, None] * patterns).mean(0)
    torch.testing.assert_close(mean * torch.tensor([4, 4, 0.25]).double(), torch.cat(g))
    with pytest.raises(ValueError, match="scales has 1"):
        spsa_grad(loss, theta, 0.1, scales=[1.0])


# ---- other estimates -----------------------------------------------------------------------------------------------


def test_one_point_feedback_by_hand() -> None:
    theta = point(7)
    value, points = None, []

    def loss() -> Tensor:
        points.append(theta.clone())
        return bent(theta)

    for step in range(3):
        centre, previous = theta.clone(), value
        (estimate,), value = one_point_grad(loss, [theta], 0.05, previous, seed=4, step=step)
        z = noise(draw_seed(4, step), 0, 7, dtype=torch.float64)
        torch.testing.assert_close(points[-1], centre + 0.05 * z)
        assert value == float(bent(points[-1]))
        slope = 0.0 if previous is None else (value - previous) / 0.05
        torch.testing.assert_close(estimate, slope * z, rtol=1e-6, atol=1e-9)
        theta -= 0.01 * estimate
    assert len(points) == 3, "one evaluation a step"


def test_gradient_norms_of_blocks() -> None:
    """Gaussian z: slope^2 / |v|^2 is chi-squared with one degree; n = 4,000, 4.5 standard errors: 7e-6 each."""
    v = [point(6), point(11, 2) * 3]
    theta = [torch.zeros(6).double(), torch.zeros(11).double()]
    n = 4000
    norms = gradient_norms(lambda: v[0] @ theta[0] + v[1] @ theta[1], theta, 0.1, n=n)
    for norm, block in zip(norms, v, strict=True):
        assert abs(norm**2 / float(block @ block) - 1) < 4.5 * math.sqrt(2 / n)


# ---- effective rank ------------------------------------------------------------------------------------------------


def test_effective_rank_against_all_eigenvalues() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(point(p.numel(), i + 1).reshape(p.shape))
    x, y = point(40, 9).reshape(10, 4), point(20, 8).reshape(10, 2)
    params = dict(model.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def flat_loss(flat: Tensor) -> Tensor:
        parts = dict(zip(params, flat.split(sizes), strict=True))
        shaped = {k: v.reshape(params[k].shape) for k, v in parts.items()}
        return (torch.func.functional_call(model, shaped, (x,)) - y).square().mean()

    start = torch.cat([p.detach().reshape(-1) for p in params.values()])
    eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(flat_loss)(start))
    result = effective_rank(
        lambda: (model(x) - y).square().mean(), model.parameters(), probes=200, iterations=40
    )
    assert result.top == pytest.approx(float(eigenvalues.abs().max()), rel=1e-6)
    # 4 standard errors: false alarm 6e-5
    assert abs(result.trace - float(eigenvalues.sum())) < 4 * result.trace_se
    assert 0 < result.trace_se < 0.2 * abs(result.trace)
    assert result.rank == pytest.approx(result.trace / result.top)


@pytest.mark.parametrize("r", [1, 5, 30])
def test_effective_rank_of_a_projector_is_its_rank(r: int) -> None:
    weight = nn.Parameter(point(30))
    result = effective_rank(lambda: 1.5 * (weight[:r] ** 2).sum(), [weight], probes=3)
    assert (result.rank, result.top, result.trace) == pytest.approx((r, 3.0, 3.0 * r))


def test_effective_rank_refuses_what_has_none() -> None:
    weight = nn.Parameter(point(3))
    with pytest.raises(ValueError, match="linear|zero"):
        effective_rank(lambda: weight.sum(), [weight])
    with pytest.raises(ValueError, match="requires a gradient"):
        effective_rank(lambda: weight.sum(), [weight.detach()])


def steps_to_target(d: int, r: int, seed: int, limit: int = 4000) -> int:
    """MeZO steps until 0.1 % of the first loss on a quadratic with r unit eigenvalues, lr = 1 / (r + 2)."""
    weight = nn.Parameter(torch.zeros(d))
    with torch.no_grad():
        weight[:r] = 1
    optimizer = MeZO([weight], 1 / (r + 2), 1e-2, seed=seed, dist="gaussian", backend="auto")

    def loss() -> Tensor:
        return 0.5 * weight.detach()[:r].double().square().sum()

    first = float(loss())
    for step in range(1, limit):
        optimizer.step(loss)
        if float(loss()) < 1e-3 * first:
            return step
    return limit


@pytest.mark.filterwarnings("ignore:the loss rose")
def test_steps_depend_on_the_effective_rank_and_not_on_the_dimension() -> None:
    """Lemma 3: at r = 8 the steps stay within a factor of 2 from d = 100 to 10,000; isotropic, they grow with d."""

    def mean(d: int, r: int) -> float:
        return sum(steps_to_target(d, r, seed) for seed in range(3)) / 3

    fixed = [mean(d, 8) for d in (100, 10_000)]
    assert max(fixed) < 2 * min(fixed)
    isotropic = [mean(d, d) for d in (4, 16, 64)]
    assert 2.5 < isotropic[1] / isotropic[0] < 8 and 2.5 < isotropic[2] / isotropic[1] < 8


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
def test_descent_bound_on_a_quadratic(dist: str) -> None:
    """E L(theta') <= L - eta |g|^2 + eta^2 l/2 gamma |g|^2 for a Hessian H <= l P with P a projector of rank
    r, equality at H = l P.

    gamma = (r + n + 1) / n bounds both distributions (Rademacher's own is (r + n - 1) / n on a coordinate
    projector). 4,000 draws; 4 standard errors: 6e-5 each.
    """
    r, d, n, eta, draws = 5, 40, 2, 0.08, 4000
    for eigenvalues in (torch.ones(r), torch.linspace(0.1, 1, r)):
        h = torch.cat([eigenvalues, torch.zeros(d - r)]).double()
        theta = torch.cat([point(r), torch.zeros(d - r).double()])
        g = h * theta
        z = noise(5, 0, draws * n * d, dist=dist).double().reshape(draws, n, d)
        after = theta - eta * torch.einsum("snd,sn->sd", z, z @ g) / n
        losses = 0.5 * (h * after**2).sum(-1)
        gamma = (r + n + 1) / n if dist == "gaussian" else (r + n - 1) / n
        bound = 0.5 * float((h * theta**2).sum()) - eta * float(g @ g) + eta**2 / 2 * gamma * float(g @ g)
        margin = 4 * float(losses.std()) / math.sqrt(draws)
        assert float(losses.mean()) < bound + margin
        if bool((eigenvalues == 1).all()):
            assert abs(float(losses.mean()) - bound) < margin
