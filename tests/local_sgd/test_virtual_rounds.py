"""VirtualWorkers: identities of local SGD, what a sync changes, resuming inside a round, and what stays untouched."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from papercore.local_sgd import QSR, ConstantH, VirtualWorkers
from tests.local_sgd.engine_ranks import batch, loss_on, network, same_kernels
from tests.local_sgd.one_by_one import MAKERS, MOMENTUM, double, drawn, equal, one_by_one

# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_plain_sgd_with_h_of_one_is_the_pooled_batch(engine: str) -> None:
    """W10, in double precision to 1e-13 over 60 steps."""
    k, steps = 4, 60
    workers = VirtualWorkers(
        network().double(), k, MAKERS["sgd"], ConstantH(1), total_steps=steps, engine=engine
    )
    pooled = network().double()
    optimizer = MAKERS["sgd"](list(pooled.parameters()))
    for step in range(steps):
        pairs = [batch(step, w) for w in range(k)]
        assert workers.step(double, pairs) is True
        optimizer.zero_grad()
        double(pooled, (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))).backward()
        optimizer.step()
    for mine, theirs in zip(workers.mean_model().parameters(), pooled.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("h", [1, 3, 8])
def test_workers_that_see_the_same_batches_are_one_worker(h: int) -> None:
    """W11, to the last bit for a number of workers whose mean rounds nothing."""
    with same_kernels():
        workers = VirtualWorkers(network(), 4, MOMENTUM, ConstantH(h), total_steps=12)
        for step in range(12):
            workers.step(loss_on, [batch(step, 0)] * 4)
        alone = one_by_one([network()], 1, MOMENTUM, 1, 12)
    equal(workers, [alone[0] * 4])
    assert workers.spread().tolist() == [0.0]


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_one_worker_and_many_seeds_are_independent_runs(engine: str) -> None:
    starts = [network(s) for s in range(3)]
    with same_kernels():
        workers = VirtualWorkers(starts, 1, MOMENTUM, ConstantH(2), total_steps=6, engine=engine)
        for step in range(6):
            workers.step(loss_on, drawn(step, 3, 1))
        equal(workers, one_by_one(starts, 1, MOMENTUM, 1, 6))


def test_a_sync_keeps_the_mean_and_zeroes_the_spread() -> None:
    """V10 and V11 with three workers, where the sum of three equal numbers over 3 may round."""
    workers = VirtualWorkers(
        [network(0).double(), network(1).double()], 3, MOMENTUM, ConstantH(50), total_steps=50
    )
    for step in range(7):
        workers.step(double, drawn(step, 2, 3))
    stacked = [p.detach().view(2, 3, *p.shape[1:]).clone() for p in workers._parameters]
    distance = sum((t - t.mean(1, keepdim=True)).flatten(2).square().sum(2).mean(1) for t in stacked)
    torch.testing.assert_close(workers.spread(), distance, rtol=1e-12, atol=0)
    mean = copy.deepcopy(workers.mean_model(1))
    assert workers.position == 7 and workers.sync() is True and workers.position == 0
    for p, before in zip(workers._parameters, stacked, strict=True):
        after = p.detach().view(2, 3, *p.shape[1:])
        torch.testing.assert_close(after, before.mean(1, keepdim=True).expand_as(after), rtol=0, atol=1e-16)
    assert workers.spread().tolist() == [0.0, 0.0]
    once = [p.detach().clone() for p in workers._parameters]
    assert workers.sync() is False and workers.rounds_done == 1
    assert all(torch.equal(a, p) for a, p in zip(once, workers._parameters, strict=True))
    for a, b in zip(mean.parameters(), workers.mean_model(1).parameters(), strict=True):
        assert torch.equal(a, b), "the mean model before the sync is the model after it"


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_the_optimizer_state_is_local_or_averaged(name: str) -> None:
    """V14: untouched by a sync, or averaged, each seed for itself; Adam's step counter stays a counter."""
    for state in ("local", "mean"):
        workers = VirtualWorkers(
            [network(0), network(1)], 2, MAKERS[name], ConstantH(50), total_steps=50, state=state
        )
        for step in range(5):
            workers.step(loss_on, drawn(step, 2, 2))
        before = copy.deepcopy(workers.optimizer.state_dict()["state"])
        workers.sync()
        after = workers.optimizer.state_dict()["state"]
        for number, entries in before.items():
            for key, value in entries.items():
                if state == "mean" and value.dim():
                    pairs = value.view(2, 2, *value.shape[1:])
                    value = ((pairs[:, :1] + pairs[:, 1:]) / 2).expand_as(pairs).reshape(value.shape)
                assert torch.equal(after[number][key], value), (state, key)


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_resuming_inside_a_round_is_bitwise(engine: str) -> None:
    """V13 with seeds, through a file; the copy in memory does not follow the run that it was taken from."""

    def fresh(start: int) -> VirtualWorkers:
        return VirtualWorkers(
            [network(start), network(start + 1)],
            2,
            MAKERS["adamw"],
            ConstantH(7),
            total_steps=20,
            engine=engine,
        )

    straight = fresh(0)
    for step in range(10):
        straight.step(loss_on, drawn(step, 2, 2))
    kept = straight.state_dict()
    file = io.BytesIO()
    torch.save(kept, file)
    losses = straight.losses.clone()
    for step in range(10, 20):
        straight.step(loss_on, drawn(step, 2, 2))
    file.seek(0)
    for state in (kept, torch.load(file, weights_only=True)):
        again = fresh(5)
        again.load_state_dict(state)
        assert (again.global_step, again.position, again.h, again.rounds_done) == (10, 3, 7, 1)
        assert torch.equal(again.losses, losses)
        synced = [again.step(loss_on, drawn(step, 2, 2)) for step in range(10, 20)]
        assert [step for step, yes in enumerate(synced, 10) if yes] == [13, 19]
        for a, b in zip(again._parameters, straight._parameters, strict=True):
            assert torch.equal(a, b)


# ---- what else may change --------------------------------------------------------------------------------------------


def test_the_given_module_and_the_global_generator_stay_as_they_were() -> None:
    model = network()
    kept, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    workers = VirtualWorkers(model, 2, MOMENTUM, ConstantH(2), total_steps=4)
    for step in range(4):
        workers.step(loss_on, [batch(step, w) for w in range(2)])
    with torch.no_grad():
        model[0].weight.zero_()
    assert workers.mean_model()[0].weight.abs().max() > 0.1
    model.load_state_dict(kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_dropout_draws_for_every_worker_and_repeats_with_the_seed() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 10))
    for engine in ("vmap", "loop"):
        runs = []
        for _ in range(2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                workers = VirtualWorkers(model, 4, MOMENTUM, ConstantH(4), total_steps=4, engine=engine)
                workers.step(loss_on, [batch(0, 0)] * 4)
                runs.append(workers.losses[0].tolist())
        assert runs[0] == runs[1] and len(set(runs[0])) == 4
        quiet = VirtualWorkers(
            copy.deepcopy(model).eval(), 4, MOMENTUM, ConstantH(4), total_steps=4, engine=engine
        )
        quiet.step(loss_on, [batch(0, 0)] * 4)
        assert len(set(quiet.losses[0].tolist())) == 1, "eval mode is kept"


def test_fixed_batch_norm_is_accepted() -> None:
    """In eval mode its statistics are constants; without running statistics each worker uses its own batch."""
    frozen = nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 10)).eval()
    local = nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 10))
    for model in (frozen.double(), local.double()):
        workers = VirtualWorkers(model, 2, MAKERS["sgd"], ConstantH(2), total_steps=4)
        for step in range(4):
            workers.step(double, [batch(step, w) for w in range(2)])
        equal(workers, one_by_one([model], 2, MAKERS["sgd"], 2, 4, double), 1e-13)


def test_a_round_reads_the_rate_of_the_reference_group() -> None:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        weights, biases = parameters[::2], parameters[1::2]
        return torch.optim.SGD([{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.05}])

    for group, h in ((0, 4), (1, 16)):
        workers = VirtualWorkers(network(), 2, make, QSR(0.2, 1), total_steps=400, reference_group=group)
        assert workers.h == 0
        workers.step(loss_on, [batch(0, w) for w in range(2)])
        assert workers.h == h


def test_a_long_first_round_of_qsr_is_warned_of() -> None:
    make = lambda parameters: torch.optim.SGD(parameters, lr=1e-6)  # noqa: E731
    pairs = [batch(0, w) for w in range(2)]
    workers = VirtualWorkers(network(), 2, make, QSR(0.2, 4), total_steps=100)
    with pytest.warns(UserWarning, match="the first round lasts 100 of 100 steps.*warmup_steps"):
        workers.step(loss_on, pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VirtualWorkers(network(), 2, make, QSR(0.2, 4), total_steps=100, warmup_steps=10).step(loss_on, pairs)
        VirtualWorkers(network(), 2, make, ConstantH(90), total_steps=100).step(loss_on, pairs)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_without_the_loss_a_parameter_has_a_gradient_of_zeros(engine: str) -> None:
    """Documented: weight decay acts on it, in both engines."""
    model = nn.ModuleDict({"used": nn.Linear(64, 10), "idle": nn.Linear(2, 2, bias=False)})
    make = lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.5)  # noqa: E731
    workers = VirtualWorkers(model, 2, make, ConstantH(2), total_steps=2, engine=engine)
    workers.step(lambda m, pair: loss_on(m["used"], pair), [batch(0, w) for w in range(2)])
    torch.testing.assert_close(
        workers.parameters_of(0, 1)["idle.weight"], 0.95 * model["idle"].weight.detach()
    )
