"""Training by two real processes: resumed runs bit for bit, data parallel training, micro-batches, refusals; and the sampler."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from papercore.lab.noisy_digits import NoisyDigits, network
from papercore.lab.process_training import StepSampler
from papercore.lab.torchrun import launch
from papercore.local_sgd import QSR, cosine_lr

HERE = Path(__file__).parent
STEPS, BATCH = 14, 8


@pytest.fixture
def importable(monkeypatch):
    """The processes find the modules of this folder."""
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), known])))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        folder = str(tmp_path_factory.mktemp("runs"))
        return launch("ranks_process_training:everything", {"folder": folder}, processes=2, timeout=500)


def test_two_processes_train_as_two_models_in_a_loop(found):
    task, lr = NoisyDigits.make([0]), cosine_lr(0.1, STEPS)
    models = [network(seed=0) for _ in range(2)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    samplers = [StepSampler(400, BATCH, STEPS, seed=3, rank=rank, world=2) for rank in range(2)]
    rounds = QSR(0.15, 2).rounds(lr, STEPS)
    for start, length in rounds:
        for model, optimizer, sampler in zip(models, optimizers, samplers, strict=True):
            for step in range(start, start + length):
                optimizer.param_groups[0]["lr"] = lr(step)
                optimizer.zero_grad()
                places = sampler.slice(step)
                F.cross_entropy(model(task.train_x[0, places]), task.train_y[0, places]).backward()
                optimizer.step()
        mean = {
            n: (models[0].state_dict()[n] + models[1].state_dict()[n]) / 2 for n in models[0].state_dict()
        }
        for model in models:
            model.load_state_dict(mean)
    expected = parameters_to_vector(models[0].parameters()).detach().numpy()
    np.testing.assert_allclose(found["whole"], expected, atol=1e-6)
    assert found["same_on_all"] and found["rounds"] == len(rounds)
    # The first average at or after 5 steps is the third, and the next one after 10 is the last.
    assert [row["step"] for row in found["evaluations"]] == [7, STEPS]
    assert found["evaluations"][-1]["sum"] == pytest.approx(float(expected.sum()), rel=1e-3)


def test_a_run_stopped_inside_a_round_goes_on_bit_for_bit(found):
    ends = {start + length for start, length in QSR(0.15, 2).rounds(cosine_lr(0.1, STEPS), STEPS)}
    assert 9 not in ends, "the interruption must fall inside a round"
    assert np.array_equal(found["resumed"], found["whole"])
    assert np.array_equal(found["resumed_losses"], found["losses"])
    assert found["resumed_evaluations"] == found["evaluations"]
    assert found["files"] == [f"step-{s:09}-rank-{r}.pt" for s in (STEPS - 1, STEPS) for r in (0, 1)]


def test_a_run_in_slices_ends_where_a_whole_one_does(found):
    assert (found["slice_step"], found["slice_finished"]) == (2, False)
    assert np.array_equal(found["sliced"], found["whole"])


def test_a_rank_that_lost_its_newest_file_takes_all_back_to_a_common_step(found):
    assert np.array_equal(found["after_loss"], found["whole"])


def test_data_parallel_training_is_training_on_the_joined_batch(found):
    task, lr = NoisyDigits.make([0]), cosine_lr(0.1, STEPS)
    model, sampler = network(seed=0), StepSampler(400, BATCH, STEPS, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr(step)
        optimizer.zero_grad()
        places = sampler.slice(step)
        F.cross_entropy(model(task.train_x[0, places]), task.train_y[0, places]).backward()
        optimizer.step()
    expected = parameters_to_vector(model.parameters()).detach().numpy()
    np.testing.assert_allclose(found["parallel"], expected, atol=1e-6)
    assert found["parallel_rounds"] == STEPS and found["parallel_bytes"] == STEPS * 4 * 5962


def test_micro_batches_add_up_to_the_gradient_of_the_batch(found):
    np.testing.assert_allclose(found["micro"], found["whole"], atol=1e-5)


def test_every_process_hears_of_a_loss_that_is_not_finite(found):
    assert found["said"] == ["the loss of process 1 is not finite at step 4: lower the learning rate."] * 2


def test_a_damaged_file_is_refused_by_all_processes(found):
    assert found["refused"][0] == found["refused"][1]
    assert "rank-1.pt is damaged" in found["refused"][0] and "to start afresh" in found["refused"][0]


def test_the_slices_of_a_step_are_disjoint_and_an_epoch_repeats_nothing():
    samplers = [StepSampler(23, 6, 20, seed=1, rank=rank, world=3) for rank in range(3)]
    for epoch in range(3):
        drawn = [i for step in range(3) for s in samplers for i in s.slice(3 * epoch + step)]
        assert len(drawn) == len(set(drawn)) == 18
    first = [i for step in range(3) for i in samplers[0].slice(step)]
    assert first != [i for step in range(3, 6) for i in samplers[0].slice(step)]


def test_the_sampler_starts_anywhere_and_names_the_epoch():
    whole = list(StepSampler(10, 4, 9, seed=0, rank=1, world=2, with_epoch=True))
    assert list(StepSampler(10, 4, 9, seed=0, rank=1, world=2, start=5, with_epoch=True)) == whole[5:]
    assert [pairs[0][0] for pairs in whole] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert len(StepSampler(10, 4, 9, seed=0, start=5)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 3, 1), "a global batch of 3 does not divide over 2 processes: choose a multiple of 2."),
        ((10, 12, 1), "a global batch of 12 from 10 samples: no full batch fits into an epoch."),
    ],
)
def test_the_sampler_refuses_batches_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        StepSampler(*arguments, seed=0, world=2)


def test_launch_shows_what_a_failing_process_said(importable):
    with pytest.raises(RuntimeError) as error:
        launch("ranks_process_training:fails", {}, processes=2, timeout=300)
    assert "the second process has had enough" in str(error.value)
    assert str(error.value).startswith("2 processes of ranks_process_training:fails ended with status 1:")


def test_launch_refuses_what_it_cannot_start():
    with pytest.raises(ValueError, match="processes is 0: expected at least 1"):
        launch("a:b", {}, processes=0)
    with pytest.raises(ValueError, match="expected 'package.module:function'"):
        launch("a.b", {})
