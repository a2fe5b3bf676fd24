"""VirtualWorkers against a plain loop over workers, and against the identities that Local SGD obeys."""

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
