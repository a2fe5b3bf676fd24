"""What a step leaves alone, and what its directions may depend on: the seed and the index of a weight, nothing else.

``stepped`` takes one step and reads the directions out of the points at which the loss was evaluated.
"""

import importlib.util
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from papercore.mezo import MeZO, spsa_grad

pytestmark = pytest.mark.filterwarnings("ignore:.*eps.*:UserWarning", "ignore:.*eps.*:RuntimeWarning")

BACKENDS = [
    "torch",
    pytest.param(
        "numba", marks=pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")
    ),
]
backends = pytest.mark.parametrize("backend", BACKENDS)
modes = pytest.mark.parametrize("mode", ["inplace", "exact"])
dists = pytest.mark.parametrize("dist", ["gaussian", "rademacher"])


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def flat(params: list[nn.Parameter]) -> Tensor:
    """All parameters end to end, float64 [d]: a copy."""
    return torch.cat([p.detach().double().reshape(-1) for p in params])


def bent(theta: Tensor) -> Tensor:
    return (theta.sin() + 0.3 * theta**3).mean() + (0.1 * theta.sum()).tanh()


def stepped(
    optimizer: MeZO, params: list[nn.Parameter], eps: float, loss: Callable[[Tensor], Tensor] = bent
) -> tuple[Tensor, Tensor]:
    """One step; its directions [n, d] and slopes [n]."""
    points: list[Tensor] = []

    def closure() -> Tensor:
        points.append(flat(params))
        return loss(points[-1])

    optimizer.step(closure)
    values = torch.stack([loss(point) for point in points])
    stacked = torch.stack(points)
    return (stacked[0::2] - stacked[1::2]) / (2 * eps), (values[0::2] - values[1::2]) / (2 * eps)


# ---- what a step must leave alone ----------------------------------------------------------------------------------


@backends
@modes
def test_random_states_are_untouched(backend: str, mode: str) -> None:
    params = weights((300,))
    # the legacy global state of numpy is what a careless kernel would disturb
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    optimizer = MeZO(params, 1e-3, n=2, mode=mode, backend=backend)
    for _ in range(2):
        optimizer.step(lambda: bent(flat(params)))
    spsa_grad(lambda: bent(flat(params)), params, 1e-3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


@backends
@pytest.mark.parametrize(("mode", "pipelined"), [("inplace", False), ("exact", False), ("inplace", True)])
def test_frozen_parameters_keep_their_bits(backend: str, mode: str, pipelined: bool) -> None:
    params = weights((30,), (31,), (32,), dtype=torch.float32)
    params[1].requires_grad_(False)
    start = [p.detach().clone() for p in params]
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(params[1].detach().clone())
        return bent(flat(params))

    optimizer = MeZO(params, 0.01, weight_decay=0.1, mode=mode, pipelined=pipelined, backend=backend)
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(params[1], start[1])
    assert all(torch.equal(value, start[1]) for value in seen), "not even while evaluating"
    optimizer.flush()
    assert not torch.equal(params[0], start[0]) and not torch.equal(params[2], start[2])


@backends
@modes
def test_tied_weights_are_perturbed_and_updated_once(backend: str, mode: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    start, eps = model[0].weight.detach().clone(), 0.1
    optimizer = MeZO(model.parameters(), 0.5, eps, dist="rademacher", mode=mode, backend=backend)
    directions, slopes = stepped(optimizer, list(model.parameters()), eps, torch.sum)
    assert directions.shape == (1, 16)
    torch.testing.assert_close(directions.abs(), torch.ones(1, 16, dtype=torch.float64))
    expected = start - 0.5 * float(slopes) * directions.reshape(4, 4)
    torch.testing.assert_close(model[2].weight.detach(), expected, rtol=1e-6, atol=1e-6)
    assert model[2].weight is model[0].weight


@backends
@modes
def test_closure_runs_without_gradients_and_autograd_works_afterwards(backend: str, mode: str) -> None:
    params = weights((6,))
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        return (params[0] ** 2).sum()

    MeZO(params, 1e-3, mode=mode, backend=backend).step(closure)
    assert seen == [False, False]
    assert torch.is_grad_enabled()
    (params[0] ** 2).sum().backward()
    torch.testing.assert_close(params[0].grad, 2 * params[0].detach())


class Communication(TorchDispatchMode):
    """Notes every collective operation, by whatever function it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith(("c10d", "_c10d")):
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_process_group_means_no_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with Communication() as talk:
            torch.distributed.all_reduce(torch.zeros(1))
        assert talk.calls, "the instrument must see a collective when there is one"
        with Communication() as talk:
            params = weights((30,))
            optimizer = MeZO(params, 1e-3, n=2, backend="torch")
            for _ in range(3):
                optimizer.step(lambda: (params[0] ** 2).sum())
            optimizer.flush()
        assert talk.calls == []
    finally:
        torch.distributed.destroy_process_group()


@backends
@dists
def test_state_dict_flushes_a_pipelined_run(backend: str, dist: str) -> None:
    (param,) = weights((40,))
    start = param.detach().clone()
    optimizer = MeZO([param], 0.0, 0.1, dist=dist, pipelined=True, backend=backend)
    stepped(optimizer, [param], 0.1)
    optimizer.state_dict()
    torch.testing.assert_close(param.detach(), start, rtol=0, atol=1e-12)


# ---- seeds, splitting, groups, layouts -----------------------------------------------------------------------------


def run(
    shapes: list[tuple[int, ...]], backend: str = "torch", dtype=torch.float64, **options
) -> tuple[Tensor, Tensor]:
    """End point [d] and all directions [3 n, d] of three steps."""
    params = weights((sum(math.prod(s) for s in shapes),), dtype=dtype)
    pieces = torch.split(params[0].detach().clone(), [math.prod(s) for s in shapes])
    params = [nn.Parameter(piece.reshape(shape).clone()) for piece, shape in zip(pieces, shapes, strict=True)]
    optimizer = MeZO(params, 1e-4, 0.05, backend=backend, **options)
    directions = torch.cat([stepped(optimizer, params, 0.05)[0] for _ in range(3)])
    return flat(params), directions


@backends
@dists
def test_seed_decides_everything(backend: str, dist: str) -> None:
    end, directions = run([(10_000,)], backend, dist=dist, n=2, seed=7)
    again, _ = run([(10_000,)], backend, dist=dist, n=2, seed=7)
    other, elsewhere = run([(10_000,)], backend, dist=dist, n=2, seed=8)
    assert torch.equal(end, again)
    assert not torch.equal(end, other)
    # no two directions have to do with each other, within a step, between steps or between neighbouring seeds
    correlation = torch.corrcoef(torch.cat([directions, elsewhere])) - torch.eye(12)
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(10_000)


SPLITS = [
    [(7,), (3, 5), (1,), (127,)],
    [(1,), (131_073,), (77, 1000), (5,)],
]  # the second is longer than a chunk


@backends
@dists
@pytest.mark.parametrize("shapes", SPLITS, ids=["short", "long"])
def test_directions_do_not_depend_on_how_weights_are_split(backend: str, dist: str, shapes: list) -> None:
    whole = run([(sum(math.prod(shape) for shape in shapes),)], backend, dist=dist)[1]
    torch.testing.assert_close(run(shapes, backend, dist=dist)[1], whole, rtol=0, atol=1e-9)


@backends
@modes
@dists
def test_a_step_does_not_depend_on_the_number_of_threads(backend: str, mode: str, dist: str) -> None:
    threads = torch.get_num_threads()
    ends = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            (param,) = weights((200_000,), dtype=torch.float32)
            start = param.detach().clone()
            optimizer = MeZO([param], 1e-3, mode=mode, dist=dist, backend=backend)
            for _ in range(2):
                optimizer.step(
                    lambda param=param: (param[:5] ** 2).sum()
                )  # a loss without a parallel reduction
            ends.append(param.detach().clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], start)


@backends
@dists
def test_directions_do_not_depend_on_dtype(backend: str, dist: str) -> None:
    double, single = run([(150,)], backend, dist=dist)[1], run([(150,)], backend, torch.float32, dist=dist)[1]
    torch.testing.assert_close(single, double, rtol=0, atol=2e-5)


@dists
def test_backends_agree(dist: str) -> None:
    pytest.importorskip("numba")
    plain, fast = (
        run([(151,), (40, 3)], backend, dist=dist, n=2, weight_decay=0.1) for backend in ("torch", "numba")
    )
    torch.testing.assert_close(fast[1], plain[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-5, atol=1e-5)


@backends
@modes
def test_groups_have_their_own_learning_rate_and_decay(backend: str, mode: str) -> None:
    params = weights((20,), (21,), (22,))
    starts = [p.detach().clone() for p in params]
    groups = [
        {"params": [params[0]]},
        {"params": [params[1]], "lr": 0.05, "weight_decay": 0.0},
        {"params": [params[2]], "lr": 0.0},
    ]
    optimizer = MeZO(groups, 0.01, 0.1, weight_decay=0.5, mode=mode, backend=backend)
    directions, slopes = stepped(optimizer, params, 0.1, torch.sum)
    z = directions[0].split([20, 21, 22])
    slope = float(slopes)
    torch.testing.assert_close(
        params[0].detach(), starts[0] * (1 - 0.01 * 0.5) - 0.01 * slope * z[0], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(params[1].detach(), starts[1] - 0.05 * slope * z[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(params[2].detach(), starts[2], rtol=0, atol=1e-12)


@backends
@modes
def test_strided_weights_leave_their_neighbours_alone(backend: str, mode: str) -> None:
    storage = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = storage.clone()
    param = nn.Parameter(storage[:, ::2])
    assert not param.is_contiguous()
    optimizer = MeZO([param], 0.1, 0.1, dist="rademacher", mode=mode, backend=backend)
    directions, slopes = stepped(optimizer, [param], 0.1, torch.sum)
    torch.testing.assert_close(directions.abs(), torch.ones(1, 24, dtype=torch.float64))
    expected = before[:, ::2] - 0.1 * float(slopes) * directions.reshape(6, 4)
    torch.testing.assert_close(param.detach(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(storage[:, 1::2], before[:, 1::2])
    assert param.data_ptr() == storage.data_ptr(), "the weights stay where they stand"
