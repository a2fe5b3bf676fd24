"""Training of virtual workers on digits against a plain loop over models, one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from papercore.lab.noisy_digits import NoisyDigits, network
from papercore.lab.worker_training import data_parallel, train_workers
from papercore.local_sgd import QSR, ConstantH, constant_lr, cosine_lr


def _by_loop(task, schedule, lr_fn, steps, k, local_batch, momentum=0.0):
    """Weights after the last average, one dict a seed: every worker a model and an optimizer of its own."""
    ends = []
    places, labels = task.order(0, steps, k * local_batch)
    for row, seed in enumerate(task.seeds):
        models = [network(seed=seed) for _ in range(k)]
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=momentum) for m in models]
        for start, length in schedule.rounds(lr_fn, steps):
            for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                own = slice(worker * local_batch, (worker + 1) * local_batch)
                for step in range(start, start + length):
                    optimizer.param_groups[0]["lr"] = lr_fn(step)
                    optimizer.zero_grad()
                    x = task.train_x[row, places[row, step, own]]
                    F.cross_entropy(model(x), labels[row, step, own]).backward()
                    optimizer.step()
            mean = {n: sum(m.state_dict()[n] for m in models) / k for n in models[0].state_dict()}
            for model in models:
                model.load_state_dict(mean)
        ends.append(mean)
    return ends


@pytest.mark.parametrize(("schedule", "momentum"), [(ConstantH(3), 0.0), (QSR(0.15, 2), 0.9)])
def test_agrees_with_a_loop_over_models(schedule, momentum):
    task, lr = NoisyDigits.make([0, 7]), cosine_lr(0.1, 20)
    run = train_workers(task, schedule, lr, 20, k=3, local_batch=4, momentum=momentum)
    expected = _by_loop(task, schedule, lr, 20, 3, 4, momentum)
    for row, end in enumerate(expected):
        for name, value in end.items():
            assert torch.allclose(run.state[name][row], value, atol=1e-5), name
    assert run.report.rounds == len(schedule.rounds(lr, 20))


def test_data_parallel_is_an_average_every_step():
    task, lr = NoisyDigits.make([1, 2]), constant_lr(0.2, 12)
    joined = data_parallel(task, lr, 12, k=4, local_batch=8)
    averaged = train_workers(task, ConstantH(1), lr, 12, k=4, local_batch=8)
    for name, value in joined.state.items():
        assert torch.allclose(value, averaged.state[name], atol=1e-5)
    assert joined.report.fraction == 1.0


def test_a_second_phase_goes_on_where_the_first_one_ended():
    task, lr = NoisyDigits.make([0, 3]), constant_lr(0.2, 24)
    whole = train_workers(task, ConstantH(4), lr, 24, k=2, local_batch=8)
    first = train_workers(task, ConstantH(4), lr, 12, k=2, local_batch=8)
    second = train_workers(task, ConstantH(4), lr, 12, k=2, local_batch=8, start=first.state, first_step=12)
    for name, value in whole.state.items():
        assert torch.equal(value, second.state[name])
    assert np.array_equal(second.test_loss[:, -1], whole.test_loss[:, -1])


def test_curves_are_of_the_mean_and_the_spread_is_zero_after_an_average():
    task, lr = NoisyDigits.make([0]), constant_lr(0.3, 10)
    run = train_workers(task, ConstantH(4), lr, 10, k=2, local_batch=4, evaluate_at=[0, 3, 4, 9])
    assert run.steps.tolist() == [0, 3, 4, 9, 10]
    assert run.spread[0, 0] == 0 and run.spread[0, 2] < 1e-12 and run.spread[0, 4] < 1e-12
    assert run.spread[0, 1] > 1e-6 and run.spread[0, 3] > 1e-6
    assert run.train_loss[0, -1] < run.train_loss[0, 0]
    final = task.evaluate(run.state)
    assert run.test_loss[0, -1] == final["test_loss"][0]


def test_measurements_of_ones_own_see_every_step():
    seen = []
    task = NoisyDigits.make([0, 1])
    train_workers(
        task,
        ConstantH(3),
        constant_lr(0.1, 7),
        7,
        k=2,
        after_step=lambda step, averaged, workers: seen.append((step, averaged, tuple(workers.losses.shape))),
    )
    assert [step for step, averaged, _ in seen if averaged] == [3, 6, 7]
    assert {shape for _, _, shape in seen} == {(2, 2)}


def test_a_seed_that_diverges_stops_the_run_or_is_counted():
    task = NoisyDigits.make([0, 1])
    lr = constant_lr(1e6, 12)
    with pytest.raises(FloatingPointError, match="the loss of seed"):
        train_workers(task, ConstantH(2), lr, 12, k=2)
    kept = train_workers(task, ConstantH(2), lr, 12, k=2, keep_diverged=True)
    assert kept.lost.any()
    assert np.isnan(kept.test_accuracy[kept.lost, -1]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"evaluate_at": [11]}, "evaluate_at [11]: expected steps from 0 to 10."),
        ({"start": {}}, "start holds '0.weight' with shape None: expected [1, 48, 64], one row a seed."),
        (
            {"start": {"0.weight": torch.zeros(2, 48, 64)}},
            "start holds '0.weight' with shape [2, 48, 64]: expected [1, 48, 64], one row a seed.",
        ),
    ],
)
def test_bad_input_is_refused_in_words(arguments, message):
    with pytest.raises(ValueError) as error:
        train_workers(NoisyDigits.make([0]), ConstantH(2), constant_lr(0.1, 10), 10, **arguments)
    assert message in str(error.value)
