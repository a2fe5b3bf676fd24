"""LocalOptimizer in a group of one process: what it shares with the optimizer it wraps, and what it refuses."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from papercore.local_sgd import QSR, ConstantH, LocalOptimizer
from tests.local_sgd.public_api_ranks import OPTIMIZERS, gradient
from tests.local_sgd.public_api_reference import batch, flat, network


def sgd(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, **options})


def test_without_torch_distributed() -> None:
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="init_process_group"):
        LocalOptimizer(sgd(network()), ConstantH(2), total_steps=4)


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process, without a network."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_worker_is_the_wrapped_optimizer(name: str) -> None:
    model, other = network(), network()
    optimizer = LocalOptimizer(OPTIMIZERS[name](model.parameters()), ConstantH(3), total_steps=8)
    plain = OPTIMIZERS[name](other.parameters())
    synced = []
    for t in range(8):
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = 0.05
        optimizer.zero_grad(), plain.zero_grad()
        gradient(model, batch(t, 0)), gradient(other, batch(t, 0))
        synced.append(optimizer.step())
        plain.step()
        assert torch.equal(flat(model), flat(other))
    assert synced == [False, False, True, False, False, True, False, True]


@pytest.mark.usefixtures("alone")
def test_groups_state_and_hooks_are_the_wrapped_ones() -> None:
    model = network()
    inner = sgd(model, momentum=0.9)
    optimizer = LocalOptimizer(inner, ConstantH(3), total_steps=8)
    calls: list[str] = []
    inner.register_step_pre_hook(lambda *_: calls.append("pre"))
    inner.register_step_post_hook(lambda *_: calls.append("post"))
    assert optimizer.param_groups is inner.param_groups
    assert all(a is b for a, b in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True))
    gradient(model, batch(0, 0))
    optimizer.step()
    assert calls == ["pre", "post"]
    for p in model.parameters():
        assert optimizer.state[p]["momentum_buffer"] is inner.state[p]["momentum_buffer"]
    optimizer.finish()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("alone")
def test_the_global_generator_is_left_alone() -> None:
    model = network()
    state = torch.get_rng_state()
    optimizer = LocalOptimizer(sgd(model), ConstantH(2), total_steps=4)
    for t in range(4):
        gradient(model, batch(t, 0))
        optimizer.step()
    optimizer.finish()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("alone")
def test_a_long_first_round_is_warned_of() -> None:
    model = network()
    optimizer = LocalOptimizer(sgd(model, lr=1e-6), QSR(0.2, 2), total_steps=400)
    gradient(model, batch(0, 0))
    with pytest.warns(UserWarning, match="first round") as caught:
        optimizer.step()
    assert "400" in str(caught[0].message)
    optimizer.finish()


@pytest.mark.usefixtures("alone")
def test_a_rate_of_zero_takes_the_remaining_steps() -> None:
    model = network()
    optimizer = LocalOptimizer(sgd(model), QSR(0.1, 2), total_steps=60)
    synced = []
    for t in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 if t < 4 else 0.0
        gradient(model, batch(t, 0))
        synced.append(optimizer.step())
    assert [t + 1 for t, yes in enumerate(synced) if yes] == [4, 60]


@pytest.mark.usefixtures("alone")
def test_no_rate_at_the_start_of_a_round() -> None:
    model = network()
    optimizer = LocalOptimizer(sgd(model), QSR(0.1, 2), total_steps=12)
    before = flat(model)
    for group in optimizer.param_groups:
        group["lr"] = float("nan")
    gradient(model, batch(0, 0))
    with pytest.raises(ValueError, match="nan"):
        optimizer.step()
    assert torch.equal(flat(model), before), "nothing half-done"


def says(error: pytest.ExceptionInfo, *words: str) -> None:
    for word in words:
        assert word in str(error.value), f"{word!r} is missing in: {error.value}"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"total_steps": 0}, ("total_steps", "0")),
        ({"total_steps": -5}, ("total_steps", "-5")),
        ({"warmup_steps": -1}, ("warmup_steps", "-1")),
        ({"state": "global"}, ("state", "global", "local", "mean")),
        ({"buffers": "median"}, ("buffers", "median", "none", "mean", "reestimate")),
        ({"reduction": "tree"}, ("reduction", "tree", "all_reduce", "ordered")),
        ({"reference_group": 3}, ("reference_group", "3")),
        ({"buffers": "mean"}, ("model",)),
    ],
)
def test_wrong_values_are_named(change: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        LocalOptimizer(sgd(network()), ConstantH(2), **{"total_steps": 10, **change})
    says(error, *words)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LocalOptimizer(sgd(network()), 4, total_steps=10), "schedule"),
        (lambda: LocalOptimizer(network(), ConstantH(2), total_steps=10), "optimizer"),
        (lambda: LocalOptimizer(sgd(network()), ConstantH(2), total_steps="ten"), "total_steps"),
    ],
)
def test_wrong_kinds_are_named(make: Callable, name: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    says(error, name)


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_averaged_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.SyncBatchNorm(6))
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        LocalOptimizer(sgd(model), ConstantH(2), total_steps=10, model=model, buffers="mean")
    wrapped = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(ValueError, match="DistributedDataParallel|DDP"):
        LocalOptimizer(sgd(wrapped), ConstantH(2), total_steps=10, model=wrapped, buffers="mean")


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        LocalOptimizer(sgd(network()), ConstantH(2), 10)
    with pytest.raises(TypeError, match="total_steps"):
        LocalOptimizer(sgd(network()), ConstantH(2))
