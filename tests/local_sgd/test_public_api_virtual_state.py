"""VirtualWorkers: optimizer state, the mean model, seeds, resuming and refusals, through public names."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from papercore.local_sgd import QSR, ConstantH, VirtualWorkers
from tests.local_sgd import public_api_reference as truth
from tests.local_sgd.public_api_reference import batch, loss, network
from tests.local_sgd.test_public_api_virtual import (
    ADAMW,
    DOUBLE,
    MOMENTUM,
    OPTIMIZERS,
    RATE,
    SCHEDULE,
    SGD,
    TOTAL,
    close,
    looped,
    scheduled,
    stacked,
    train,
    virtual,
    weights_of,
)

# ---- optimizer state -------------------------------------------------------------------------------------------------


def momenta(workers: VirtualWorkers) -> Tensor:
    """[k, d]: the buffers are stacked as the parameters are."""
    buffers = [
        workers.optimizer.state[p]["momentum_buffer"]
        for group in workers.optimizer.param_groups
        for p in group["params"]
    ]
    return torch.cat([b.detach().flatten(1) for b in buffers], dim=1).clone()


def test_a_sync_leaves_the_optimizer_state_alone() -> None:
    """V14: each worker keeps its own momentum."""
    workers = virtual(3, MOMENTUM, ConstantH(1000), warmup_steps=0)
    train(workers, 3, steps=5, rate=lambda t: 0.1)
    before = momenta(workers)
    assert before.shape[0] == 3 and not torch.equal(before[0], before[1])
    workers.sync()
    assert torch.equal(momenta(workers), before)


def test_state_mean_averages_the_optimizer_state() -> None:
    workers = virtual(3, MOMENTUM, ConstantH(1000), warmup_steps=0, state="mean")
    train(workers, 3, steps=5, rate=lambda t: 0.1)
    before = momenta(workers)
    workers.sync()
    after = momenta(workers)
    torch.testing.assert_close(after, before.mean(0).expand(3, -1), rtol=0, atol=1e-15)


def test_state_mean_changes_the_path_of_adam_and_not_the_mean_path_of_sgd() -> None:
    local, mean = virtual(3, MOMENTUM, ConstantH(1)), virtual(3, MOMENTUM, ConstantH(1), state="mean")
    train(local, 3), train(mean, 3)
    close(local.mean_model(), mean.mean_model())
    local, mean = virtual(3, ADAMW, ConstantH(3)), virtual(3, ADAMW, ConstantH(3), state="mean")
    train(local, 3), train(mean, 3)
    assert (truth.flat(local.mean_model()) - truth.flat(mean.mean_model())).abs().max() > 1e-5


# ---- the mean model --------------------------------------------------------------------------------------------------


def test_the_mean_model_is_a_module_of_its_own() -> None:
    workers = virtual(2, SGD, ConstantH(1000), warmup_steps=0)
    train(workers, 2, steps=4, rate=lambda t: 0.1)
    rows = torch.stack([weights_of(workers, w) for w in range(2)])
    model = workers.mean_model()
    assert isinstance(model, nn.Sequential)
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in network().named_parameters()]
    torch.testing.assert_close(truth.flat(model), rows.mean(0), rtol=0, atol=1e-15)
    assert model(batch(0, 0)[0]).shape == (4, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(torch.stack([weights_of(workers, w) for w in range(2)]), rows), "a copy, not a view"


def test_all_workers_start_from_the_model() -> None:
    model = network()
    workers = VirtualWorkers(model, 3, SGD, SCHEDULE, total_steps=TOTAL)
    for w in range(3):
        assert torch.equal(weights_of(workers, w), truth.flat(network()))
    # a sum of three equal numbers, divided by three, may be off in the last bit
    close(workers.mean_model(), network(), 2.5e-16)


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    workers = VirtualWorkers(model, 2, MOMENTUM, ConstantH(3), total_steps=6)
    for t in range(6):
        for group in workers.optimizer.param_groups:
            group["lr"] = 0.1
        workers.step(loss, [batch(t, w) for w in range(2)])
    found = workers.mean_model()
    assert torch.equal(found[0].weight, network()[0].weight)
    assert not torch.equal(found[0].bias, network()[0].bias)


def test_group_norm_is_accepted() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.GroupNorm(2, 6), nn.Linear(6, 3)).to(DOUBLE)
    workers = VirtualWorkers(model, 2, SGD, ConstantH(2), total_steps=4)
    assert [workers.step(loss, [batch(t, w) for w in range(2)]) for t in range(4)] == [
        False,
        True,
        False,
        True,
    ]


def test_the_global_generator_is_left_alone() -> None:
    model = network()
    state = torch.get_rng_state()
    workers = VirtualWorkers(model, 2, SGD, SCHEDULE, total_steps=TOTAL, warmup_steps=4)
    train(workers, 2, steps=5)
    workers.sync()
    workers.mean_model()
    assert torch.equal(torch.get_rng_state(), state)


# ---- seeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_seeds_are_independent_runs(name: str) -> None:
    k, seeds = 2, 3
    workers = VirtualWorkers(
        [network(s) for s in range(seeds)],
        k,
        OPTIMIZERS[name],
        SCHEDULE,
        total_steps=TOTAL,
        warmup_steps=4,
    )
    scheduler = scheduled(workers)
    for t in range(TOTAL):
        rows = [stacked([batch(t, w, s) for w in range(k)]) for s in range(seeds)]
        workers.step(loss, stacked(rows))  # [seeds, k, 4, 5] and [seeds, k, 4]
        assert workers.losses.shape == (seeds, k)
        scheduler.step()
    assert workers.spread().shape == (seeds,)
    for s in range(seeds):
        alone = looped(k, OPTIMIZERS[name], batches=lambda t, w, s=s: batch(t, w, s), seed=s)
        close(workers.mean_model(s), alone, 1e-9 if name == "adamw" else 1e-12)


# ---- resume (V13) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "name"), [(0, "momentum"), (5, "adamw"), (11, "momentum"), (12, "adamw"), (29, "momentum")]
)
def test_resume_anywhere_is_bitwise(stop: int, name: str) -> None:
    straight = virtual(2, OPTIMIZERS[name], QSR(0.25, 3))
    train(straight, 2)

    first = virtual(2, OPTIMIZERS[name], QSR(0.25, 3))
    scheduler = scheduled(first)
    for t in range(stop):
        first.step(loss, [batch(t, w) for w in range(2)])
        scheduler.step()
    file = io.BytesIO()
    torch.save({"workers": first.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)

    second = VirtualWorkers(
        network(seed=9), 2, OPTIMIZERS[name], QSR(0.25, 3), total_steps=TOTAL, warmup_steps=4
    )
    scheduler = scheduled(second)
    second.load_state_dict(kept["workers"])
    scheduler.load_state_dict(kept["scheduler"])
    assert second.global_step == stop
    synced = []
    for t in range(stop, TOTAL):
        synced.append(second.step(loss, [batch(t, w) for w in range(2)]))
        scheduler.step()
    assert torch.equal(truth.flat(second.mean_model()), truth.flat(straight.mean_model()))
    ends = {r.start + r.length for r in QSR(0.25, 3).rounds(RATE, TOTAL, warmup_steps=4)}
    assert synced == [t + 1 in ends for t in range(stop, TOTAL)]


def test_a_saved_state_does_not_follow_the_training() -> None:
    workers = virtual(2, MOMENTUM)
    train(workers, 2, steps=5)
    kept = copy.deepcopy(workers.state_dict())
    live = workers.state_dict()
    train(workers, 2, steps=3)
    other = virtual(2, MOMENTUM)
    other.load_state_dict(kept)
    assert other.global_step == 5
    assert live["global_step"] == 5 if "global_step" in live else True


# ---- refused input ---------------------------------------------------------------------------------------------------


def says(error: pytest.ExceptionInfo, *words: str) -> None:
    for word in words:
        assert word in str(error.value), f"{word!r} is missing in: {error.value}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, ("k", "0")),
        ({"k": -2}, ("k", "-2")),
        ({"total_steps": 0}, ("total_steps", "0")),
        ({"total_steps": -5}, ("total_steps", "-5")),
        ({"warmup_steps": -1}, ("warmup_steps", "-1")),
        ({"state": "global"}, ("state", "global", "local", "mean")),
    ],
)
def test_wrong_values_are_named(change: dict, words: tuple[str, ...]) -> None:
    options = {"k": 2, "total_steps": 10, **change}
    with pytest.raises(ValueError) as error:
        VirtualWorkers(network(), options.pop("k"), SGD, ConstantH(2), **options)
    says(error, *words)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((network(), 2, SGD, 4), "schedule"),
        ((network(), 2, "sgd", ConstantH(2)), "optimizer"),
        ((network(), 2, torch.optim.SGD(network().parameters(), lr=0.1), ConstantH(2)), "optimizer"),
        (("model", 2, SGD, ConstantH(2)), "model"),
        ((network(), "two", SGD, ConstantH(2)), "k"),
    ],
)
def test_wrong_kinds_are_named(arguments: tuple, name: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        VirtualWorkers(*arguments, total_steps=10)
    says(error, name)


def test_batch_norm_is_refused_with_advice() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="GroupNorm"):
        VirtualWorkers(model, 2, SGD, ConstantH(2), total_steps=10)


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.Adafactor])
def test_optimizers_that_mix_workers_are_refused(make: type) -> None:
    """Whatever looks at a whole tensor would look at all workers at once."""
    with pytest.raises(ValueError, match=make.__name__):
        VirtualWorkers(network(), 2, lambda params: make(params, lr=0.1), ConstantH(2), total_steps=10)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_the_number_of_batches_is_the_number_of_workers(count: int) -> None:
    workers = virtual(3)
    before = weights_of(workers, 0)
    with pytest.raises(ValueError) as error:
        workers.step(loss, [batch(0, w) for w in range(count)])
    says(error, "3", str(count))
    if count:
        with pytest.raises(ValueError) as error:
            workers.step(loss, stacked([batch(0, w) for w in range(count)]))
        says(error, "3", str(count))
    assert torch.equal(weights_of(workers, 0), before) and workers.global_step == 0, "nothing half-done"


def test_the_loss_is_a_scalar() -> None:
    with pytest.raises(ValueError, match="scalar"):
        virtual(2).step(lambda model, pair: model(pair[0]).sum(1), [batch(0, w) for w in range(2)])


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        VirtualWorkers(network(), 2, SGD, ConstantH(2), 10)
    with pytest.raises(TypeError):
        VirtualWorkers(network(), 2, SGD, ConstantH(2))
