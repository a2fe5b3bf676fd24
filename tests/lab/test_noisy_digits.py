"""Noisy digits against brute force: the labels, the order of samples, the network, the evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from papercore.lab.noisy_digits import NoisyDigits, logits, mean_loss, network, other_label


def test_wrong_labels_are_as_many_as_asked_and_spread_over_the_others():
    task = NoisyDigits.make(range(30))
    wrong = task.train_y != task.clean_y
    assert wrong.sum(1).tolist() == [80] * 30
    shift = (task.train_y - task.clean_y)[wrong] % 10
    counts = torch.bincount(shift, minlength=10)[1:].double()
    expected = 30 * 80 / 9
    # chi-square with 8 degrees of freedom: above 26.1 once in a thousand
    assert float(((counts - expected).square() / expected).sum()) < 26.1


def test_images_and_true_labels_are_scikit_learns_and_the_parts_do_not_overlap():
    pixels, labels = load_digits(return_X_y=True)
    known = {
        tuple((row / 16).astype("float32").tolist()): int(y) for row, y in zip(pixels, labels, strict=True)
    }
    task = NoisyDigits.make([3])
    # The centre is the mean training image, unknown here: found back from the blank corner pixel's neighbour images.
    order = torch.randperm(len(labels), generator=_split(3))
    first, second = order[:400], order[400:1100]
    assert not set(first.tolist()) & set(second.tolist())
    raw = torch.from_numpy(pixels).float() / 16
    centre = raw[first].mean(0)
    assert torch.allclose(task.train_x[0] + centre, raw[first], atol=1e-6)
    assert torch.allclose(task.test_x[0] + centre, raw[second], atol=1e-6)
    for row, label in zip(raw[second][:50].tolist(), task.test_y[0][:50].tolist(), strict=True):
        assert known[tuple(row)] == label


def _split(seed: int) -> torch.Generator:
    from papercore.lab.noisy_digits import _SPLIT, generator

    return generator(seed, _SPLIT)


def test_a_seed_does_not_depend_on_its_neighbours():
    alone, together = NoisyDigits.make([5]), NoisyDigits.make([2, 5, 9])
    assert torch.equal(alone.train_x[0], together.train_x[1])
    assert torch.equal(alone.train_y[0], together.train_y[1])
    assert torch.equal(alone.order(0, 30, 32)[0][0], together.order(0, 30, 32)[0][1])
    assert torch.equal(alone.start()["0.weight"][0], together.start()["0.weight"][1])
    assert not torch.equal(together.train_y[0], together.train_y[1])


def test_an_epoch_has_no_image_twice_and_every_epoch_its_own_order():
    task = NoisyDigits.make([0])
    places, _ = task.order(0, 24, 32)
    first, second = places[0, :12].flatten(), places[0, 12:].flatten()
    assert len(set(first.tolist())) == len(first) == 384
    assert len(set(second.tolist())) == 384
    assert not torch.equal(first, second)


@pytest.mark.parametrize("fresh", [0.0, 0.3])
def test_the_order_does_not_depend_on_where_it_begins(fresh):
    task = NoisyDigits.make([0, 4], wrong=0.0, fresh=fresh)
    whole = task.order(0, 40, 32)
    for start, stop in ((0, 40), (5, 9), (12, 24), (23, 40), (7, 7)):
        part = task.order(start, stop, 32)
        assert torch.equal(part[0], whole[0][:, start:stop])
        assert torch.equal(part[1], whole[1][:, start:stop])


def test_fresh_noise_replaces_the_share_that_was_asked_for_and_fixed_labels_stay():
    task = NoisyDigits.make([1], wrong=0.0, fresh=0.2)
    places, labels = task.order(0, 1200, 32)
    share = float((labels[0] != task.train_y[0][places[0]]).double().mean())
    assert abs(share - 0.2) < 4 * math.sqrt(0.16 / labels.numel())
    fixed = NoisyDigits.make([1])
    places, labels = fixed.order(0, 30, 32)
    assert torch.equal(labels[0], fixed.train_y[0][places[0]])


def test_stacked_outputs_and_losses_are_those_of_each_network_alone():
    task = NoisyDigits.make([0, 1, 2])
    state = task.start()
    stacked = logits(state, task.test_x)
    measured = task.evaluate(state)
    for i, seed in enumerate(task.seeds):
        net = network(seed=seed)
        with torch.no_grad():
            alone = net(task.test_x[i])
            train = F.cross_entropy(net(task.train_x[i]), task.train_y[i])
        assert torch.allclose(stacked[i], alone, atol=1e-5)
        assert torch.allclose(mean_loss(stacked, task.test_y)[i], F.cross_entropy(alone, task.test_y[i]))
        right = float((alone.argmax(1) == task.test_y[i]).double().mean())
        assert measured["test_accuracy"][i] == pytest.approx(right)
        assert measured["train_loss"][i] == pytest.approx(float(train), rel=1e-5)


def test_weights_that_are_not_finite_are_reported_as_such():
    task = NoisyDigits.make([0, 1])
    state = task.start()
    state["2.weight"][1, 0, 0] = math.nan
    measured = task.evaluate(state)
    assert torch.isfinite(measured["test_accuracy"]).tolist() == [True, False]
    assert torch.isfinite(measured["train_loss"]).tolist() == [True, False]


def test_the_network_has_hes_initialisation_and_no_global_generator_is_touched():
    before = torch.random.get_rng_state()
    net = network((64, 512, 10), seed=3)
    NoisyDigits.make([0]).order(0, 5, 32)
    assert torch.equal(before, torch.random.get_rng_state())
    first = net[0]
    assert isinstance(first, nn.Linear)
    assert float(first.weight.detach().std()) == pytest.approx(math.sqrt(2 / 64), rel=0.02)
    assert not first.bias.any()


def test_another_label_is_never_the_same():
    labels = torch.arange(10).repeat(100)
    assert not bool((other_label(labels, torch.Generator().manual_seed(0)) == labels).any())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoisyDigits.make([]), "seeds is []: give at least one, and none twice."),
        (lambda: NoisyDigits.make([1, 1]), "seeds is [1, 1]: give at least one, and none twice."),
        (lambda: NoisyDigits.make([0], wrong=0.9), "wrong is 0.9: give a share in [0, 0.9)"),
        (lambda: NoisyDigits.make([0], fresh=-0.1), "fresh is -0.1: give a share in [0, 0.9)"),
        (
            lambda: NoisyDigits.make([0], train=1500),
            "1500 training and 700 test images: give at least one of each, 1797 in all at most.",
        ),
        (lambda: NoisyDigits.make([0]).order(0, 1, 401), "steps 0 to 1 of 401 samples"),
        (lambda: NoisyDigits.make([0]).order(3, 1, 32), "steps 3 to 1 of 32 samples"),
        (lambda: network((64,)), "sizes is [64]"),
    ],
)
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
