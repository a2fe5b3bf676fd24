"""VirtualWorkers against a plain loop over workers, and against the identities that Local SGD obeys."""

import copy
import io
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from papercore.local_sgd import QSR, SWAP, ConstantH, PostLocal, SyncSchedule, VirtualWorkers, cosine_lr
from tests.local_sgd import public_api_reference as truth
from tests.local_sgd.public_api_reference import batch, loss, network

DOUBLE = torch.float64
TOTAL = 30
RATE = cosine_lr(0.1, TOTAL, warmup_steps=4)
SCHEDULE = QSR(0.2, 2)
SGD = lambda params: torch.optim.SGD(params, lr=1.0)  # noqa: E731
MOMENTUM = lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=0.01)  # noqa: E731
NESTEROV = lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.8, nesterov=True)  # noqa: E731
ADAMW = lambda params: torch.optim.AdamW(params, lr=1.0, weight_decay=0.05)  # noqa: E731
ADAM = lambda params: torch.optim.Adam(params, lr=1.0)  # noqa: E731
OPTIMIZERS = {"sgd": SGD, "momentum": MOMENTUM, "nesterov": NESTEROV, "adam": ADAM, "adamw": ADAMW}


def stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])


def scheduled(
    workers: VirtualWorkers, rate: Callable[[int], float] = RATE
) -> torch.optim.lr_scheduler.LRScheduler:
    """The base rate of every optimizer here is 1, so the factor is the rate itself."""
    return torch.optim.lr_scheduler.LambdaLR(workers.optimizer, rate)


def train(workers: VirtualWorkers, k: int, *, steps: int = TOTAL, rate: Callable = RATE) -> list[bool]:
    scheduler, synced = scheduled(workers, rate), []
    for t in range(steps):
        synced.append(workers.step(loss, [batch(t, w) for w in range(k)]))
        scheduler.step()
    return synced


def looped(
    k: int,
    make: Callable,
    schedule: SyncSchedule = SCHEDULE,
    *,
    batches: Callable[[int, int], tuple[Tensor, Tensor]] = batch,
    seed: int = 0,
    rate: Callable = RATE,
    warm: int = 4,
    dtype: torch.dtype = DOUBLE,
) -> nn.Module:
    layout = [(r.start, r.length) for r in schedule.rounds(rate, TOTAL, warmup_steps=warm)]
    models = [network(seed, dtype) for _ in range(k)]
    return truth.loop_over_workers(models, make, loss, batches, layout, rate)[0]


def virtual(k: int, make: Callable = SGD, schedule: SyncSchedule = SCHEDULE, **options) -> VirtualWorkers:
    options = {"total_steps": TOTAL, "warmup_steps": 4, **options}
    return VirtualWorkers(network(), k, make, schedule, **options)


def close(found: nn.Module, expected: nn.Module, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(truth.flat(found), truth.flat(expected), rtol=0, atol=tolerance)


def weights_of(workers: VirtualWorkers, worker: int, seed: int = 0) -> Tensor:
    named = workers.parameters_of(seed, worker)
    return torch.cat([named[name].detach().reshape(-1) for name, _ in network().named_parameters()])


# ---- against a loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("k", [1, 4])
def test_equals_a_loop_over_workers(name: str, k: int) -> None:
    workers = virtual(k, OPTIMIZERS[name])
    train(workers, k)
    # Adam divides by the root of the second moment, which is small where the gradient is: its rounding grows.
    close(workers.mean_model(), looped(k, OPTIMIZERS[name]), 1e-9 if name.startswith("adam") else 1e-12)


@pytest.mark.parametrize("schedule", [ConstantH(1), ConstantH(7), PostLocal(11, 5), SWAP(20), QSR(0.5, 1)])
def test_equals_a_loop_under_every_schedule(schedule: SyncSchedule) -> None:
    workers = virtual(3, MOMENTUM, schedule)
    synced = train(workers, 3)
    ends = {r.start + r.length for r in schedule.rounds(RATE, TOTAL, warmup_steps=4)}
    assert synced == [t + 1 in ends for t in range(TOTAL)]
    assert all(type(value) is bool for value in synced)
    close(workers.mean_model(), looped(3, MOMENTUM, schedule))


def test_single_precision() -> None:
    workers = VirtualWorkers(
        network(dtype=torch.float32), 4, MOMENTUM, SCHEDULE, total_steps=TOTAL, warmup_steps=4
    )
    scheduler = scheduled(workers)
    for t in range(TOTAL):
        workers.step(loss, [batch(t, w, dtype=torch.float32) for w in range(4)])
        scheduler.step()
    expected = looped(
        4,
        MOMENTUM,
        batches=lambda t, w: batch(t, w, dtype=torch.float32),
        dtype=torch.float32,
    )
    assert truth.flat(workers.mean_model()).dtype == torch.float32
    close(workers.mean_model(), expected, 2e-6)


def test_the_rate_is_read_when_the_round_begins() -> None:
    """With an LRScheduler stepped after the optimizer, nobody calls anything else: rate 0.5 gives H = 4, 0.1 gives 100."""
    rates = [1.0, 1.0, 0.5, 0.25, 0.25, 0.25, 0.1, 1.0, 1.0, 1.0, 1.0]
    workers = virtual(2, SGD, QSR(1.0, 1), total_steps=11, warmup_steps=0)
    synced = train(workers, 2, steps=11, rate=lambda t: rates[min(t, 10)])
    assert [t for t, yes in enumerate(synced) if yes] == [0, 1, 5, 10]


def test_setting_the_rate_by_hand() -> None:
    workers = virtual(2, SGD, QSR(1.0, 1), total_steps=20, warmup_steps=0)
    synced = []
    for t in range(9):
        for group in workers.optimizer.param_groups:
            group["lr"] = 1.0 if t < 2 else 0.5
        synced.append(workers.step(loss, [batch(t, w) for w in range(2)]))
    assert [t for t, yes in enumerate(synced) if yes] == [0, 1, 5]
    assert workers.h == 4 and workers.global_step == 9


def test_warm_up_keeps_the_base() -> None:
    workers = virtual(2, SGD, QSR(0.3, 2), total_steps=20, warmup_steps=6)
    synced = train(workers, 2, steps=20, rate=lambda t: 1e-6 if t < 6 else 0.1)
    assert [t + 1 for t, yes in enumerate(synced) if yes] == [2, 4, 6, 15, 20]


def test_a_long_first_round_is_warned_of() -> None:
    workers = virtual(2, SGD, QSR(0.2, 2), warmup_steps=0)
    with pytest.warns(UserWarning, match="first round") as caught:
        train(workers, 2, steps=1)
    assert "30" in str(caught[0].message) and "warmup_steps" in str(caught[0].message)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_stacked_batches_equal_a_list() -> None:
    first, second = virtual(3, MOMENTUM), virtual(3, MOMENTUM)
    for t in range(6):
        pairs = [batch(t, w) for w in range(3)]
        assert first.step(loss, pairs) == second.step(loss, stacked(pairs))
    assert torch.equal(truth.flat(first.mean_model()), truth.flat(second.mean_model()))


def test_batches_of_other_shapes() -> None:
    """A tensor alone, and a mapping: whatever the loss takes, stacked on a leading axis or in a list."""

    def on_tensor(model: Callable, x: Tensor) -> Tensor:
        return model(x).square().mean()

    def on_mapping(model: Callable, given: dict[str, Tensor]) -> Tensor:
        return model(given["x"]).square().mean()

    found = []
    for form in ("tensor", "tensors", "mapping", "mappings"):
        workers = virtual(2, SGD, ConstantH(2))
        for t in range(4):
            xs = [batch(t, w)[0] for w in range(2)]
            given = {
                "tensor": torch.stack(xs),
                "tensors": xs,
                "mapping": {"x": torch.stack(xs)},
                "mappings": [{"x": x} for x in xs],
            }[form]
            workers.step(on_mapping if form.startswith("mapping") else on_tensor, given)
        found.append(truth.flat(workers.mean_model()))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert not torch.equal(found[0], truth.flat(network()))


def test_losses_are_those_before_the_step() -> None:
    workers = virtual(3, SGD, ConstantH(50))
    models = [network() for _ in range(3)]
    optimizers = [SGD(model.parameters()) for model in models]
    for t in range(4):
        pairs = [batch(t, w) for w in range(3)]
        workers.step(loss, pairs)
        expected = []
        for model, optimizer, pair in zip(models, optimizers, pairs, strict=True):
            optimizer.zero_grad()
            value = loss(model, pair)
            value.backward()
            optimizer.step()
            expected.append(value.detach())
        assert workers.losses.shape == (1, 3)
        torch.testing.assert_close(workers.losses[0].detach(), torch.stack(expected), rtol=1e-12, atol=0)


# ---- identities ------------------------------------------------------------------------------------------------------


def joined(t: int, k: int) -> tuple[Tensor, Tensor]:
    pairs = [batch(t, w) for w in range(k)]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adamw"])
def test_h_of_one_is_data_parallel_for_sgd_alone(name: str) -> None:
    """V8, W10: with plain SGD and with momentum the average is the joined batch's path; with AdamW it is not."""
    k = 4
    workers = virtual(k, OPTIMIZERS[name], ConstantH(1))
    train(workers, k)
    alone = looped(1, OPTIMIZERS[name], ConstantH(1), batches=lambda t, w: joined(t, k))
    if name == "adamw":
        assert (truth.flat(workers.mean_model()) - truth.flat(alone)).abs().max() > 1e-4
    else:
        close(workers.mean_model(), alone)


@pytest.mark.parametrize("h", [1, 4, 30])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_identical_streams_are_one_worker(h: int, name: str) -> None:
    """W11: K workers on the same data are one worker, for any H."""
    workers = virtual(3, OPTIMIZERS[name], ConstantH(h))
    scheduler = scheduled(workers)
    for t in range(TOTAL):
        workers.step(loss, [batch(t, 0)] * 3)
        scheduler.step()
    close(workers.mean_model(), looped(1, OPTIMIZERS[name], ConstantH(1)), 1e-9 if name == "adamw" else 1e-12)
    assert float(workers.spread()) < 1e-20


def test_one_large_round_is_the_average_of_separate_runs() -> None:
    workers = virtual(3, MOMENTUM, ConstantH(TOTAL))
    assert train(workers, 3) == [False] * (TOTAL - 1) + [True]
    runs = [looped(1, MOMENTUM, ConstantH(1), batches=lambda t, _, w=w: batch(t, w)) for w in range(3)]
    mean = torch.stack([truth.flat(run) for run in runs]).mean(0)
    torch.testing.assert_close(truth.flat(workers.mean_model()), mean, rtol=0, atol=1e-13)


@settings(max_examples=8)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from(["sgd", "momentum"]))
def test_a_sync_keeps_the_mean_and_removes_the_spread(k: int, steps: int, name: str) -> None:
    """V10, V11: the mean of the parameters stays, their variance becomes 0, and a second sync changes nothing."""
    workers = virtual(k, OPTIMIZERS[name], ConstantH(1000), warmup_steps=0)
    for group in workers.optimizer.param_groups:
        group["lr"] = 0.1
    for t in range(steps):
        assert workers.step(loss, [batch(t, w) for w in range(k)]) is False
    before = torch.stack([weights_of(workers, w) for w in range(k)])
    mean = before.mean(0)
    expected = (before - mean).square().sum(1).mean()
    assert workers.spread().shape == (1,)
    per_worker = float(workers.spread())
    # "mean squared distance of workers to their mean": the square of a distance, averaged over workers.
    assert per_worker == pytest.approx(float(expected), rel=1e-9, abs=1e-30)
    assert (per_worker > 1e-6) == (k > 1)
    workers.sync()
    after = torch.stack([weights_of(workers, w) for w in range(k)])
    assert all(torch.equal(after[0], row) for row in after)
    torch.testing.assert_close(after[0], mean, rtol=0, atol=1e-15)
    assert float(workers.spread()) == pytest.approx(0, abs=1e-30)
    workers.sync()
    again = torch.stack([weights_of(workers, w) for w in range(k)])
    torch.testing.assert_close(again, after, rtol=0, atol=1e-16)


def test_sync_ends_the_round() -> None:
    workers = virtual(2, SGD, ConstantH(4), warmup_steps=0)
    steps = itertools.count()

    def go() -> bool:
        t = next(steps)
        return workers.step(loss, [batch(t, w) for w in range(2)])

    assert [go() for _ in range(2)] == [False, False]
    workers.sync()
    assert [go() for _ in range(4)] == [False, False, False, True]


def test_the_tail_is_averaged() -> None:
    """The last round is cut so that the final model is an averaged one, whatever H is."""
    for schedule in (ConstantH(7), ConstantH(1000), QSR(5.0, 7)):
        workers = virtual(2, SGD, schedule, warmup_steps=4)
        assert train(workers, 2)[-1] is True
        assert float(workers.spread()) == 0.0


def test_finish_averages_an_early_end() -> None:
    workers = virtual(3, MOMENTUM, ConstantH(8), warmup_steps=0)
    train(workers, 3, steps=13)
    rows = torch.stack([weights_of(workers, w) for w in range(3)])
    assert not torch.equal(rows[0], rows[1])
    workers.finish()
    torch.testing.assert_close(weights_of(workers, 1), rows.mean(0), rtol=0, atol=1e-15)
    assert float(workers.spread()) == 0.0
    once = weights_of(workers, 0)
    workers.finish()
    assert torch.equal(weights_of(workers, 0), once)


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
