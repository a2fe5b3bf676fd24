"""Local SGD on images: one worker against a plain loop, H = 1 against the joined batch, resuming, measurements at averages."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from papercore.lab.image_set import ImageSet
from papercore.lab.resnet import SmallResNet
from papercore.lab.worker_images import Plan, Watch, evaluate, hessian, train_images, with_weights
from papercore.local_sgd import ConstantH, PostLocal


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sets = [(rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8), rng.integers(0, 3, n)) for n in (40, 24)]
    return ImageSet.of(*sets)


@pytest.fixture
def net():
    return SmallResNet(8, width=4, classes=3, groups=2, generator=torch.Generator().manual_seed(0))


def weights_of(result):
    return {name: value for name, value in result.items() if name.startswith("weights:")}


def worst(one, other):
    return max(float(np.abs(one[name] - other[name]).max()) for name in weights_of(one))


def test_one_worker_is_a_plain_loop(images, net):
    plan = Plan(1, 8, 5, ConstantH(1), lambda step: 0.1 / (1 + step), weight_decay=0.1, flips=0.2)
    result = train_images(net, images, plan, seed=3)
    plain = copy.deepcopy(net)
    for step in range(5):
        x, y = images.batch(step, 8, seed=3, flips=0.2)
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        with torch.no_grad():
            for p in plain.parameters():
                decay = 0.1 if p.ndim > 1 else 0.0  # norms and biases are left out
                p -= 0.1 / (1 + step) * (p.grad + decay * p)
    for name, p in plain.named_parameters():
        np.testing.assert_allclose(result[f"weights:{name}"], p.detach().numpy(), atol=2e-6)


def test_an_average_every_step_is_the_joined_batch(images, net):
    joined = train_images(net, images, Plan(1, 12, 4, ConstantH(1), 0.1), seed=0)
    workers = train_images(net, images, Plan(4, 3, 4, ConstantH(1), 0.1), seed=0)
    local = train_images(net, images, Plan(4, 3, 4, ConstantH(4), 0.1), seed=0)
    assert worst(joined, workers) < 2e-6 < 1e-5 < worst(joined, local)
    np.testing.assert_allclose(joined["losses"], workers["losses"], atol=1e-5)


def test_a_second_phase_goes_on_with_the_samples(images, net):
    whole = train_images(net, images, Plan(2, 4, 6, PostLocal(3, 3), 0.1), seed=0)
    first = train_images(net, images, Plan(2, 4, 3, ConstantH(1), 0.1), seed=0)
    start = with_weights(copy.deepcopy(net), first)
    second = train_images(start, images, Plan(2, 4, 3, ConstantH(3), 0.1, first_step=3), seed=0)
    assert worst(whole, second) == 0.0


def test_measurements_are_made_at_averages(images, net):
    plan = Plan(
        2,
        4,
        12,
        ConstantH(5),
        0.05,
        measure_every=4,
        sharpness_every=8,
        sharpness_images=8,
        sharpness_probes=1,
    )
    result = train_images(net, images, plan, seed=0)
    assert result["step"].tolist() == [0, 5, 10, 12]  # rounds of 5, 5 and 2
    assert result["sharpness_step"].tolist() == [0, 10, 12]
    assert result["spread_step"].tolist() == [4, 9, 11] and (result["spread"] > 0).all()
    final = with_weights(copy.deepcopy(net), result)
    assert evaluate(final, images)[0] == pytest.approx(result["test_accuracy"][-1])
    assert hessian(final, images, plan, 0) == pytest.approx(
        (result["top"][-1], result["trace"][-1]), rel=1e-4
    )


def test_evaluate_is_the_mean_over_all_images(images, net):
    x = images.test_pictures(0, 24)
    logits = net(x).detach()
    accuracy, loss = evaluate(net, images, batch=7)
    assert accuracy == pytest.approx(float((logits.argmax(1) == images.test_y).double().mean()))
    assert loss == pytest.approx(float(F.cross_entropy(logits, images.test_y)), rel=1e-5)
    train_accuracy, _ = evaluate(net, images, train=10)
    seen = net(images.pictures(torch.arange(10))).argmax(1) == images.train_y[:10]
    assert train_accuracy == pytest.approx(float(seen.double().mean()))


def test_trace_agrees_with_the_full_hessian(images):
    tiny = SmallResNet(8, width=1, classes=3, groups=1, generator=torch.Generator().manual_seed(0))
    plan = Plan(1, 4, 1, ConstantH(1), 0.1, sharpness_images=6, sharpness_probes=600)
    top, trace = hessian(tiny, images, plan, 0)
    names = [name for name, _ in tiny.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in tiny.parameters()])
    x, y = images.pictures(torch.arange(6)), images.train_y[:6]

    def loss(vector):
        parts, at = {}, 0
        for name, p in zip(names, tiny.parameters(), strict=True):
            parts[name] = vector[at : at + p.numel()].view_as(p)
            at += p.numel()
        return F.cross_entropy(torch.func.functional_call(tiny, parts, (x,)), y)

    full = torch.autograd.functional.hessian(loss, flat)
    assert top == pytest.approx(float(torch.linalg.eigvalsh(full)[-1]), rel=1e-2)
    off = full - torch.diag(torch.diag(full))
    se = float((2 * off.square().sum() / 600).sqrt())  # Hutchinson's variance with random signs
    assert abs(trace - float(torch.trace(full))) < 4 * se


def test_an_interrupted_run_resumes_bit_for_bit(images, net, tmp_path, monkeypatch):
    plan = Plan(2, 4, 10, ConstantH(4), 0.1, measure_every=4, flips=0.1)
    whole = train_images(net, images, plan, seed=0)
    calls, batch = 0, ImageSet.batch

    def failing(self, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls > 7:
            raise KeyboardInterrupt
        return batch(self, *arguments, **options)

    monkeypatch.setattr(ImageSet, "batch", failing)
    with pytest.raises(KeyboardInterrupt):
        train_images(
            net, images, plan, seed=0, folder=tmp_path, checkpoint_every=3
        )  # inside the second round
    monkeypatch.setattr(ImageSet, "batch", batch)
    resumed = train_images(net, images, plan, seed=0, folder=tmp_path, checkpoint_every=3)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)


def test_watch_measures_at_the_first_average_after_each_multiple(images):
    plan = Plan(2, 4, 100, ConstantH(30), 0.1, measure_every=20)
    assert sorted(Watch(images, plan, 0).at) == [30, 60, 90, 100]
    assert sorted(Watch(images, Plan(2, 4, 100, ConstantH(1), 0.1, measure_every=40), 0).at) == [40, 80, 100]


def test_a_loss_that_is_not_finite_stops_the_run(images, net):
    with pytest.raises(FloatingPointError, match="at step"):
        train_images(net, images, Plan(2, 4, 50, ConstantH(5), 1e20), seed=0)


def test_errors():
    with pytest.raises(ValueError, match="k is 0: expected at least 1"):
        Plan(0, 4, 10, ConstantH(1), 0.1)
    with pytest.raises(ValueError, match="unknown precision 'half': expected one of auto, float32, bfloat16"):
        Plan(1, 4, 10, ConstantH(1), 0.1, precision="half")
