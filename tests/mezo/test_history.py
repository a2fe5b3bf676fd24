"""Momentum and Adam from the log against torch's optimisers, which store their moments."""

import math

import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import MeZO, draw_seed, history, moves, noise
from papercore.mezo.history import updates_before, window_of
from tests.mezo.reference import curved, joined, run_unfused, split

SHAPES = [(20, 3), (7,), (33,)]
D = 100


def start() -> Tensor:
    return noise(5, 0, D, dtype=torch.float64)


def run(steps: int, *, dtype: torch.dtype = torch.float64, **options) -> tuple[Tensor, MeZO]:
    params = split(start(), SHAPES, dtype)
    optimizer = MeZO(params, **{"lr": 0.02, "eps": 0.01, "seed": 2, **options})
    for _ in range(steps):
        optimizer.step(lambda: curved(joined(params)))
    return joined(params), optimizer


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rule", [{"momentum": 0.9}, {"betas": (0.9, 0.999)}], ids=str)
def test_fifty_steps_equal_torch_with_stored_moments(rule: dict, dist: str, n: int) -> None:
    settings = {"lr": 0.02, "eps": 0.01, "seed": 2, "n": n, "dist": dist, **rule}
    expected, _ = run_unfused(start(), curved, 50, **settings)
    end, _ = run(50, **settings)
    assert float((expected - start()).abs().mean()) > 0.1
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [{"momentum": 0.9}, {"betas": (0.9, 0.99)}], ids=str)
def test_float32_weights_with_the_logs_scalars(rule: dict) -> None:
    end, optimizer = run(50, dtype=torch.float32, **rule)
    scalars = [list(entry.projected_grads) for entry in optimizer.log]
    settings = {"lr": 0.02, "eps": 0.01, "seed": 2, **rule}
    expected, _ = run_unfused(start().float(), curved, 50, scalars=scalars, **settings)
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-5)


def test_window_is_where_the_weights_of_the_past_fall_below_the_tolerance() -> None:
    for decay, tolerance in ((0.9, 1e-3), (0.5, 1e-6), (0.999, 1e-3), (0.0, 1e-3)):
        window = window_of(decay, tolerance)
        assert decay**window < tolerance <= decay ** (window - 1)


def test_a_short_window_forgets_what_lies_before_it() -> None:
    """Momentum with window K on a linear loss: the direction is the sum of the last K terms and no others."""
    params = split(torch.zeros(D), SHAPES)
    optimizer = MeZO(params, 1.0, 0.5, momentum=0.8, window=3, seed=4)
    v = noise(9, 0, D, dtype=torch.float64)
    z = [noise(draw_seed(4, t), 0, D, dtype=torch.float64) for t in range(6)]
    before = joined(params)
    for step in range(6):
        optimizer.step(lambda: 1e-3 * v @ joined(params))
        moved, before = joined(params) - before, joined(params)
        expected = -sum(
            0.8**age * 1e-3 * (v @ z[step - age]) * z[step - age] for age in range(min(3, step + 1))
        )
        torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


def test_default_window_keeps_single_precision_beyond_its_length() -> None:
    rule = {"momentum": 0.6, "lr": 0.005}
    steps = window_of(0.6) + 20
    expected, _ = run_unfused(start(), curved, steps, eps=0.01, seed=2, **rule)
    end, _ = run(steps, **rule)
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("n", [1, 3])
def test_adam_without_memory_gives_sign_updates(dist: str, n: int) -> None:
    """betas = (0, 0), epsilon 0: theta -= lr sign(g_hat); Rademacher noise, n = 1: normalised descent."""
    params = split(start(), SHAPES)
    optimizer = MeZO(params, 0.1, 0.01, n=n, dist=dist, betas=(0.0, 0.0), adam_eps=0.0, seed=3)
    for step in range(4):
        before = joined(params)
        optimizer.step(lambda: curved(joined(params)))
        estimate = sum(
            pg * noise(seed, 0, D, dist=dist, dtype=torch.float64)
            for seed, pg in zip(optimizer.log[step].seeds, optimizer.log[step].projected_grads, strict=True)
        )
        torch.testing.assert_close(joined(params), before - 0.1 * estimate.sign(), rtol=1e-6, atol=1e-6)


def test_adam_of_a_flat_loss_stays_where_it_is() -> None:
    """0 / 0 in the first steps, with epsilon 0: no step, not NaN."""
    for dist in ("gaussian", "rademacher"):
        params = split(start(), SHAPES)
        optimizer = MeZO(params, 0.1, 0.01, dist=dist, betas=(0.9, 0.99), adam_eps=0.0)
        for _ in range(3):
            optimizer.step(lambda: 0.25)
        torch.testing.assert_close(joined(params), start(), rtol=0, atol=1e-12)


def test_one_pass_adam_equals_the_chunked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rademacher, n = 1: v is one number a group. Groups with their own eps have their own."""

    def end() -> Tensor:
        params = split(start(), SHAPES)
        groups = [{"params": params[:1], "eps": 0.02}, {"params": params[1:], "lr": 0.005}]
        optimizer = MeZO(groups, 0.02, 0.01, dist="rademacher", betas=(0.8, 0.95), weight_decay=0.1, seed=1)
        for _ in range(20):
            optimizer.step(lambda: curved(joined(params)))
        return joined(params)

    fast = end()
    monkeypatch.setattr(moves, "adam_is_one_pass", lambda log, step: False)
    torch.testing.assert_close(fast, end(), rtol=1e-6, atol=1e-7)


def test_a_run_that_takes_more_draws_later_leaves_the_one_pass_adam() -> None:
    params = split(start(), SHAPES)
    optimizer = MeZO(params, 0.02, 0.01, dist="rademacher", betas=(0.8, 0.95), seed=1)
    inner_weight = nn.Parameter(start())
    inner = torch.optim.Adam([inner_weight], 0.02, betas=(0.8, 0.95))
    for step in range(8):
        optimizer.n = 1 if step < 4 else 3
        optimizer.step(lambda: curved(joined(params)))
        entry = optimizer.log[step]
        inner_weight.grad = sum(
            pg * noise(seed, 0, D, dist="rademacher", dtype=torch.float64)
            for seed, pg in zip(entry.seeds, entry.projected_grads, strict=True)
        ) / len(entry.seeds)
        inner.step()
    torch.testing.assert_close(joined(params), inner_weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule", [{"momentum": 0.9}, {"betas": (0.9, 0.99)}, {"betas": (0.9, 0.99), "dist": "rademacher"}], ids=str
)
def test_skipped_steps_are_no_updates(rule: dict) -> None:
    """As if torch's optimiser had not been called: neither ageing nor bias correction goes on."""
    params = split(start(), SHAPES)
    optimizer = MeZO(params, 0.02, 0.01, seed=2, on_nonfinite="skip", **rule)
    weight = nn.Parameter(start())
    inner: torch.optim.Optimizer = (
        torch.optim.SGD([weight], 0.02, momentum=0.9)
        if "momentum" in rule
        else torch.optim.Adam([weight], 0.02, betas=(0.9, 0.99))
    )
    for step in range(10):
        optimizer.step(lambda: math.inf if step in (0, 3, 4) else curved(joined(params)))  # noqa: B023
        entry = optimizer.log[step]
        assert entry.skipped == (step in (0, 3, 4))
        if not entry.skipped:
            z = noise(entry.seeds[0], 0, D, dist=rule.get("dist", "gaussian"), dtype=torch.float64)
            weight.grad = entry.projected_grad * z
            inner.step()
    assert optimizer.log.skipped == [0, 3, 4]
    assert list(updates_before(optimizer.log, 9, 4)) == [9, 8, 7, 6]
    assert list(updates_before(optimizer.log, 5, 4)) == [5, 2, 1]
    torch.testing.assert_close(joined(params), weight.detach(), rtol=1e-5, atol=1e-6)


def test_adam_in_chunks_does_not_depend_on_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from papercore.mezo import weights

    ends = [run(5, betas=(0.9, 0.99), n=2)[0]]
    for chunk in (16, 61):
        monkeypatch.setattr(weights, "CHUNK", chunk)
        ends.append(run(5, betas=(0.9, 0.99), n=2)[0])
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_no_moments_are_stored() -> None:
    """Between steps the optimiser holds no tensor of the size of the weights."""
    import gc

    _, optimizer = run(5, betas=(0.9, 0.99), n=2)
    assert optimizer.state == {}
    gc.collect()
    owned = {id(t) for g in optimizer.param_groups for t in g["params"]}
    held = [
        t
        for t in gc.get_referents(optimizer.__dict__, optimizer._moves.__dict__, optimizer.log.__dict__)
        if isinstance(t, Tensor) and id(t) not in owned
    ]
    assert held == []
    assert history.FIRST_MOMENT_TOLERANCE == 1e-6
