"""The optimiser against brute force, through its public names only.

A ``Witness`` is a closure that keeps every point at which it was evaluated. From the two points of a pair follow
the direction z and the slope (L(theta + eps z) - L(theta - eps z)) / (2 eps) that the step must have used, so each
update can be checked against ``torch.optim`` fed with the materialised estimate, whatever the noise is.
"""

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import MeZO, spsa_grad

pytestmark = pytest.mark.filterwarnings("ignore:.*eps.*:UserWarning", "ignore:.*eps.*:RuntimeWarning")

BACKENDS = [
    "torch",
    pytest.param(
        "numba", marks=pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")
    ),
]
MODES = ["inplace", "exact"]
DISTS = ["gaussian", "rademacher"]
HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]

backends = pytest.mark.parametrize("backend", BACKENDS)
modes = pytest.mark.parametrize("mode", MODES)
dists = pytest.mark.parametrize("dist", DISTS)


def weights(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def flat(params: list[nn.Parameter]) -> Tensor:
    """All parameters end to end, float64 [d]: a copy."""
    return torch.cat([p.detach().double().reshape(-1) for p in params])


class Witness:
    """A closure around ``loss`` that keeps the points and values of its evaluations."""

    def __init__(self, params: list[nn.Parameter], loss: Callable[[Tensor], Tensor]) -> None:
        self.params, self.loss = params, loss
        self.points: list[Tensor] = []
        self.losses: list[float] = []

    def __call__(self) -> Tensor:
        point = flat(self.params)
        value = self.loss(point)
        self.points.append(point)
        self.losses.append(float(value))
        return value

    def pairs(self, eps: float) -> tuple[Tensor, Tensor]:
        """Directions [n, d] and slopes [n] of the evaluations since the last call."""
        points, losses = torch.stack(self.points), torch.tensor(self.losses, dtype=torch.float64)
        self.points, self.losses = [], []
        return (points[0::2] - points[1::2]) / (2 * eps), (losses[0::2] - losses[1::2]) / (2 * eps)


def quadratic(d: int) -> Callable[[Tensor], Tensor]:
    scale = torch.linspace(0.2, 1.5, d, dtype=torch.float64)
    return lambda theta: 0.5 * (scale * (theta - 0.3) ** 2).sum()


def bent(theta: Tensor) -> Tensor:
    """Neither even nor polynomial, so that no order of the error vanishes by accident."""
    return (theta.sin() + 0.3 * theta**3).sum() + (0.5 * theta.sum()).exp()


# ---- the estimator -------------------------------------------------------------------------------------------------


@backends
@modes
@dists
@pytest.mark.parametrize("eps", [1e-3, 0.1, 10.0])
def test_linear_loss_gives_the_projection_at_any_eps(backend: str, mode: str, dist: str, eps: float) -> None:
    params = weights((7,), (3, 5))
    v = flat(weights((22,), seed=1))
    witness = Witness(params, lambda theta: v @ theta)
    optimizer = MeZO(params, lr=0.0, eps=eps, dist=dist, mode=mode, backend=backend, seed=3)
    optimizer.step(witness)
    z = witness.pairs(eps)[0][0]
    assert optimizer.projected_grad == pytest.approx(float(v @ z), rel=1e-6)
    assert torch.unique(z.abs().round(decimals=6)).numel() == (1 if dist == "rademacher" else 22)


@backends
@modes
@dists
def test_quadratic_loss_has_no_eps_error(backend: str, mode: str, dist: str) -> None:
    loss = quadratic(22)
    slopes = []
    for eps in (1e-2, 3.0):
        params = weights((22,))
        start = flat(params).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(start), start)
        witness = Witness(params, loss)
        optimizer = MeZO(params, lr=0.0, eps=eps, dist=dist, mode=mode, backend=backend, seed=4)
        optimizer.step(witness)
        z = witness.pairs(eps)[0][0]
        assert optimizer.projected_grad == pytest.approx(float(gradient @ z), rel=1e-6)
        slopes.append(optimizer.projected_grad)
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-6)


@backends
@dists
def test_cubic_error_is_eps_squared_over_six_times_the_third_derivative(backend: str, dist: str) -> None:
    eps, params = 0.25, weights((9,))
    start = flat(params)
    witness = Witness(params, lambda theta: (theta**3).sum())
    optimizer = MeZO(params, lr=0.0, eps=eps, dist=dist, backend=backend, seed=5)
    optimizer.step(witness)
    z = witness.pairs(eps)[0][0]
    error = optimizer.projected_grad - float((3 * start**2) @ z)
    assert error == pytest.approx(eps**2 / 6 * float(6 * (z**3).sum()), rel=1e-4)


@backends
@dists
def test_projected_gradient_tends_to_the_jvp_with_the_square_of_eps(backend: str, dist: str) -> None:
    errors = []
    for eps in (0.02, 0.01, 0.005):
        params = weights((6,), seed=2)
        start = flat(params)
        witness = Witness(params, bent)
        optimizer = MeZO(params, lr=0.0, eps=eps, dist=dist, backend=backend, seed=6)
        optimizer.step(witness)
        z = witness.pairs(eps)[0][0]
        _, jvp = torch.autograd.functional.jvp(bent, start, z)
        # the slope is taken from the witness: projected_grad itself may be kept in single precision
        slope = (bent(start + eps * z) - bent(start - eps * z)) / (2 * eps)
        assert optimizer.projected_grad == pytest.approx(float(slope), rel=1e-5)
        errors.append(float(slope - jvp))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


@dists
@pytest.mark.parametrize("n", [1, 3])
def test_spsa_grad_is_the_mean_of_slope_times_direction(dist: str, n: int) -> None:
    params = weights((4,), (2, 3))
    before = flat(params)
    witness = Witness(params, bent)
    estimate = spsa_grad(witness, params, 1e-2, n=n, dist=dist, seed=8)
    assert len(witness.losses) == 2 * n
    directions, slopes = witness.pairs(1e-2)
    assert [g.shape for g in estimate] == [p.shape for p in params]
    expected = (slopes[:, None] * directions).mean(0)
    torch.testing.assert_close(
        torch.cat([g.reshape(-1) for g in estimate]).double(), expected, rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(flat(params), before, rtol=0, atol=1e-14)
    assert torch.unique(directions, dim=0).shape[0] == n, "every draw has a direction of its own"


# ---- the step ------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(("mode", "pipelined"), [("inplace", False), ("exact", False), ("inplace", True)])
@pytest.mark.parametrize("n", [1, 4])
def test_step_returns_the_mean_of_2n_losses(backend: str, mode: str, pipelined: bool, n: int) -> None:
    params = weights((5,), (3,))
    witness = Witness(params, bent)
    optimizer = MeZO(params, 1e-3, n=n, mode=mode, pipelined=pipelined, backend=backend)
    for step in range(3):
        loss = optimizer.step(witness)
        assert isinstance(loss, float)
        assert len(witness.losses) == 2 * n
        assert loss == pytest.approx(sum(witness.losses) / (2 * n), rel=1e-6)
        slopes = witness.pairs(1e-3)[1]
        assert optimizer.projected_grad == pytest.approx(float(slopes.mean()), rel=1e-6)
        assert len(optimizer.log) == step + 1


SGD_RULES = [
    {"n": 3},
    {"n": 2, "weight_decay": 0.3},
    {"momentum": 0.9},
    {"momentum": 0.5, "weight_decay": 0.3, "n": 2},
]
ADAM_RULES = [{"betas": (0.9, 0.999)}, {"betas": (0.8, 0.95), "weight_decay": 0.3, "n": 2}]


@backends
@modes
@dists
@pytest.mark.parametrize("rule", SGD_RULES, ids=str)
def test_sgd_equals_torch_on_materialised_estimates(backend: str, mode: str, dist: str, rule: dict) -> None:
    params = weights((13,), (2, 4))
    kept = nn.Parameter(flat(params))
    optimizer = MeZO(params, lr=0.02, eps=1e-2, dist=dist, mode=mode, backend=backend, seed=11, **rule)
    other = torch.optim.SGD([kept], 0.02, momentum=rule.get("momentum", 0.0))
    follow_with_torch(optimizer, params, kept, other, rule, steps=15)


@backends
@modes
@dists
@pytest.mark.parametrize("rule", ADAM_RULES, ids=str)
def test_adam_equals_torch_on_materialised_estimates(backend: str, mode: str, dist: str, rule: dict) -> None:
    params = weights((13,), (2, 4))
    kept = nn.Parameter(flat(params))
    optimizer = MeZO(params, lr=0.02, eps=1e-2, dist=dist, mode=mode, backend=backend, seed=12, **rule)
    follow_with_torch(
        optimizer, params, kept, torch.optim.Adam([kept], 0.02, betas=rule["betas"]), rule, steps=15
    )


@pytest.mark.parametrize("rule", [{"momentum": 0.9}, {"betas": (0.9, 0.999)}], ids=str)
def test_a_longer_history_equals_stored_moments(rule: dict) -> None:
    """50 steps: long enough for the oldest draws to have faded from the momentum, not from Adam's second moment."""
    params = weights((21,))
    kept = nn.Parameter(flat(params))
    optimizer = MeZO(params, lr=0.02, eps=1e-2, dist="rademacher", seed=13, **rule)
    stored = (
        torch.optim.Adam([kept], 0.02, betas=rule["betas"])
        if "betas" in rule
        else torch.optim.SGD([kept], 0.02, 0.9)
    )
    follow_with_torch(optimizer, params, kept, stored, rule, steps=50)


def follow_with_torch(
    optimizer: MeZO,
    params: list[nn.Parameter],
    kept: nn.Parameter,
    other: torch.optim.Optimizer,
    rule: dict,
    *,
    steps: int,
) -> None:
    """Steps of both under a falling learning rate; the decay is decoupled: theta <- (1 - lr * decay) theta."""
    start = flat(params)
    witness = Witness(params, quadratic(start.numel()))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.97) for o in (optimizer, other)]
    for _ in range(steps):
        optimizer.step(witness)
        directions, slopes = witness.pairs(1e-2)
        with torch.no_grad():
            kept.mul_(1 - other.param_groups[0]["lr"] * rule.get("weight_decay", 0.0))
        kept.grad = (slopes[:, None] * directions).mean(0)
        other.step()
        for schedule in schedules:
            schedule.step()
    assert float((kept.detach() - start).abs().mean()) > 0.05, (
        "the run must move for the comparison to mean anything"
    )
    torch.testing.assert_close(flat(params), kept.detach(), rtol=1e-5, atol=1e-5)


@backends
@dists
@pytest.mark.parametrize(("n", "decay"), [(1, 0.0), (1, 0.3), (3, 0.3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pipelined_equals_plain_after_flush(
    backend: str, dist: str, n: int, decay: float, dtype: torch.dtype
) -> None:
    ends = []
    for pipelined in (False, True):
        params = weights((13,), (2, 4), dtype=dtype)
        witness = Witness(params, quadratic(21))
        optimizer = MeZO(
            params,
            0.02,
            1e-2,
            n=n,
            dist=dist,
            weight_decay=decay,
            pipelined=pipelined,
            backend=backend,
            seed=13,
        )
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        for step in range(7):
            optimizer.step(witness)
            schedule.step()
            if step == 3:
                optimizer.flush()
        optimizer.flush()
        ends.append(flat(params))
        optimizer.flush()
        assert torch.equal(flat(params), ends[-1]), "a second flush is a no-op"
    assert float((ends[0] - flat(weights((13,), (2, 4)))).abs().max()) > 0.05
    loose = 1e-6 if dtype is torch.float64 else 2e-4  # single precision: 1e-7 in a loss is 1e-5 in a slope
    torch.testing.assert_close(ends[1], ends[0], rtol=loose, atol=loose)


# ---- restoring -----------------------------------------------------------------------------------------------------


@backends
@dists
@pytest.mark.parametrize("pipelined", [False, True])
def test_parameters_return_to_within_rounding(backend: str, dist: str, pipelined: bool) -> None:
    params = weights((3000,), (50, 40), dtype=torch.float32)
    start = flat(params)
    witness = Witness(params, quadratic(5000))
    optimizer = MeZO(params, 0.0, 1e-2, dist=dist, pipelined=pipelined, backend=backend, seed=1)
    optimizer.step(witness)
    optimizer.flush()
    reach = start.abs() + 1e-2 * witness.pairs(1e-2)[0][0].abs()
    ulp = torch.from_numpy(np.spacing(reach.float().numpy())).double()
    assert bool(((flat(params) - start).abs() <= 3 * ulp).all())


@backends
@dists
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_exact_mode_returns_to_the_same_bits(backend: str, dist: str, dtype: torch.dtype) -> None:
    params = weights((300,), (5, 4), dtype=dtype)
    start = [p.detach().clone() for p in params]
    witness = Witness(params, quadratic(320))
    optimizer = MeZO(params, 0.0, 0.05, n=2, dist=dist, mode="exact", backend=backend, seed=1)
    for _ in range(3):
        optimizer.step(witness)
    assert all(torch.equal(p, s) for p, s in zip(params, start, strict=True))
    assert float((witness.points[0] - witness.points[1]).abs().max()) > 0.05, (
        "the closure saw perturbed weights"
    )


@backends
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_no_difference_of_losses_leaves_exact_weights_alone(backend: str, dtype: torch.dtype) -> None:
    params = weights((300,), dtype=dtype)
    start = params[0].detach().clone()
    optimizer = MeZO(params, 0.5, mode="exact", backend=backend)
    assert optimizer.step(lambda: 0.25) == 0.25  # a plain float is a loss too: accuracy, F1
    assert optimizer.projected_grad == 0.0
    assert torch.equal(params[0], start)
