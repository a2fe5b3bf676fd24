"""VirtualWorkers against models trained one by one: optimizers, engines, chunks, tied weights, forms of batches."""

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papercore.local_sgd import ConstantH, VirtualWorkers
from tests.local_sgd.engine_ranks import loss_on, network, same_kernels
from tests.local_sgd.one_by_one import MAKERS, MOMENTUM, double, drawn, equal, one_by_one

# ---- against models trained one by one -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vmap", "loop"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_elementwise_optimizer_of_torch(name: str, engine: str) -> None:
    """In float32, to the last bit."""
    steps, k = 12, 3
    starts = [network(seed) for seed in range(2)]
    with same_kernels():
        workers = VirtualWorkers(starts, k, MAKERS[name], ConstantH(5), total_steps=steps, engine=engine)
        for step in range(steps):
            workers.step(loss_on, drawn(step, 2, k))
        expected = one_by_one(starts, k, MAKERS[name], 5, steps)
    equal(workers, expected)
    assert workers.rounds_done == 3


def test_chunks_change_nothing() -> None:
    found = []
    with same_kernels():
        for chunk in (None, 1, 4, 6, 100):
            workers = VirtualWorkers(
                [network(0), network(1)], 3, MOMENTUM, ConstantH(4), total_steps=8, chunk_size=chunk
            )
            for step in range(8):
                workers.step(loss_on, drawn(step, 2, 3))
            found.append(torch.cat([p.detach().flatten() for p in workers._parameters]))
            assert workers.losses.shape == (2, 3)
    assert all(torch.equal(found[0], other) for other in found[1:])


class Small(nn.Module):
    """Convolutions, group norm and a residual, as in the networks of the chapters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.last = nn.GroupNorm(2, 4), nn.Linear(4, 10)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "norm" not in name:
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.view(-1, 1, 8, 8))
        y = y + torch.relu(self.norm(self.second(y)))
        return self.last(y.mean((2, 3)))


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_convolutions_and_group_norm(engine: str) -> None:
    starts = [Small(0).double(), Small(1).double()]
    workers = VirtualWorkers(starts, 2, MOMENTUM, ConstantH(3), total_steps=6, engine=engine)
    for step in range(6):
        workers.step(double, drawn(step, 2, 2))
    equal(workers, one_by_one(starts, 2, MOMENTUM, 3, 6, double), 1e-13)


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.outer.weight = self.inner.weight
        self.register_buffer("shift", torch.full((64,), 0.1 * (1 + seed)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.outer(torch.tanh(self.inner(x + self.shift)))))


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_tied_weights_and_constants_that_differ_between_seeds(engine: str) -> None:
    """A shared weight stays one weight; a buffer and a frozen parameter are each seed's own, also in its mean model."""
    starts = [Tied(0).double(), Tied(1).double()]
    workers = VirtualWorkers(starts, 2, MOMENTUM, ConstantH(2), total_steps=4, engine=engine)
    for step in range(4):
        workers.step(double, drawn(step, 2, 2))
    expected = one_by_one(
        starts,
        2,
        lambda parameters: MOMENTUM([p for p in parameters if p.requires_grad]),
        2,
        4,
        double,
    )
    for seed in range(2):
        mean, twin = workers.mean_model(seed), expected[seed][0]
        assert mean.outer.weight is mean.inner.weight
        for (name, mine), (_, theirs) in zip(
            mean.state_dict().items(), twin.state_dict().items(), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13, msg=name)
        assert not mean.head.bias.requires_grad


def test_a_list_of_lists_mappings_and_things_that_are_no_tensors() -> None:
    """The forms that batches come in, for two seeds."""

    def on_mapping(model: nn.Module, given: dict[str, Any]) -> Tensor:
        assert given["scale"] == 2.0 and given["name"] == "digits"
        return given["scale"] * loss_on(model, (given["x"], given["y"]))

    found = []
    for form in ("stacked", "lists", "user mapping"):
        workers = VirtualWorkers([network(0), network(1)], 2, MAKERS["sgd"], ConstantH(2), total_steps=3)
        for step in range(3):
            x, y = drawn(step, 2, 2)
            extra = {"scale": 2.0, "name": "digits"}
            if form == "lists":
                given: Any = [[{"x": x[s, w], "y": y[s, w], **extra} for w in range(2)] for s in range(2)]
            else:
                given = {"x": x, "y": y, **extra}
            workers.step(on_mapping, UserDict(given) if form == "user mapping" else given)
        found.append(torch.cat([p.detach().flatten() for p in workers._parameters]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_another_loss_and_another_constant_are_not_served_from_the_cache() -> None:
    workers = VirtualWorkers(network(), 2, MAKERS["sgd"], ConstantH(10), total_steps=10)
    x, y = (t[0] for t in drawn(0, 1, 2))
    values = []
    for loss, scale in (
        (lambda m, b: b[2] * loss_on(m, b[:2]), 0.0),
        (lambda m, b: b[2] * loss_on(m, b[:2]) + 1.0, 0.0),
    ):
        workers.step(loss, (x, y, scale))
        values.append(workers.losses.tolist())
        workers.step(loss, (x, y, 3.0))
        values.append(workers.losses.tolist())
    assert (
        values[0] == [[0.0, 0.0]]
        and values[2] == [[1.0, 1.0]]
        and values[1] != values[0]
        and values[3] != values[2]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_on_cuda(engine: str) -> None:
    starts = [Small(0).double().cuda(), Small(1).double().cuda()]
    workers = VirtualWorkers(starts, 2, MOMENTUM, ConstantH(3), total_steps=6, engine=engine)
    for step in range(6):
        x, y = drawn(step, 2, 2)
        workers.step(double, (x.cuda(), y.cuda()))
    assert workers.losses.is_cuda and workers.spread().is_cuda
    on_cpu = one_by_one([Small(0).double(), Small(1).double()], 2, MOMENTUM, 3, 6, double)
    for seed in range(2):
        for a, b in zip(
            workers.mean_model(seed).cpu().parameters(), on_cpu[seed][0].parameters(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
