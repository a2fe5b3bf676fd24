"""SCRUB and the others on a linear head: what the losses say, what stays, what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from papercore.unlearning import (
    Flops,
    distillation,
    fine_tune,
    neggrad_plus,
    retrain,
    scrub,
    tune,
)
from tests.unlearning.bottlenecks import blobs, bottleneck


def head(classes: int = 4) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, 12, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def trained() -> tuple[nn.Linear, tuple, tuple]:
    z, labels = blobs()
    model = head()
    fine_tune(model, (z, labels), epochs=5, lr=0.02)
    gone = labels == 0
    return model, (z[gone], labels[gone]), (z[~gone], labels[~gone])


def right(model: nn.Module, data: tuple) -> float:
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).double().mean())


def test_distillation_by_its_definition() -> None:
    g = torch.Generator().manual_seed(0)
    t, s = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation(t, s, 3.0), expected)
    assert float(expected) > 0 and float(distillation(t, t, 3.0)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_scrub_without_weights_or_min_steps_changes_nothing(optimizer: str) -> None:
    model, forget, retain = trained()
    before = copy.deepcopy(model.state_dict())
    scrub(
        model,
        forget,
        retain,
        epochs=2,
        msteps=0,
        alpha=0.0,
        gamma=0.0,
        temperature=2.0,
        lr=0.1,
        optimizer=optimizer,
    )
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_small_push_raises_the_divergence_on_the_forget_set() -> None:
    model, forget, retain = trained()
    teacher = copy.deepcopy(model)
    # Off the teacher, where the divergence has a gradient; there, at its minimum, it has none.
    model.weight.data += 0.1 * torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    z = forget[0]
    kl = distillation(teacher(z).detach(), model(z), 2.0)
    (grad,) = torch.autograd.grad(-kl, [model.weight])
    model.weight.data -= 1e-3 * grad
    assert float(distillation(teacher(z), model(z), 2.0).detach()) > float(kl.detach())


def test_scrub_equals_its_steps_written_out() -> None:
    model, forget, retain = trained()
    model.weight.data.mul_(0.7)
    twin, teacher = copy.deepcopy(model), copy.deepcopy(model)
    scrub(
        model, forget, retain, epochs=2, msteps=1, alpha=0.3, gamma=0.9, temperature=2.0, lr=0.05,
        optimizer="sgd", batch_size=1000, forget_batch_size=1000,
    )  # fmt: skip
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)

    def step(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step(-distillation(teacher(forget[0]).detach(), twin(forget[0]), 2.0))
    for _ in range(2):
        logits = twin(retain[0])
        kept = distillation(teacher(retain[0]).detach(), logits, 2.0)
        step(0.9 * functional.cross_entropy(logits, retain[1]) + 0.3 * kept)
    torch.testing.assert_close(model.weight, twin.weight)


def test_neggrad_plus_equals_its_loss_written_out() -> None:
    model, forget, retain = trained()
    twin = copy.deepcopy(model)
    neggrad_plus(
        model,
        forget,
        retain,
        epochs=1,
        alpha=0.8,
        lr=0.1,
        optimizer="sgd",
        batch_size=1000,
        forget_batch_size=1000,
    )
    loss = 0.8 * functional.cross_entropy(twin(retain[0]), retain[1])
    loss = loss - (1 - 0.8) * functional.cross_entropy(twin(forget[0]), forget[1])
    loss.backward()
    torch.testing.assert_close(model.weight, twin.weight - 0.1 * twin.weight.grad)


def test_a_tuned_scrub_forgets_and_keeps_the_rest() -> None:
    model, forget, retain = trained()
    before = copy.deepcopy(model.state_dict())
    settings = {"epochs": 4, "alpha": 0.001, "gamma": 1.0, "temperature": 2.0}
    result = tune(model, forget, retain, grid={"lr": (1e-4, 0.02), "msteps": (1, 3)}, **settings)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert (
        result.reached
        and right(result.best.model, forget) <= 0.01
        and right(result.best.model, retain) > 0.95
    )
    assert len(result.table) == 4 and result.seconds >= result.best.seconds
    assert result.flops.total == sum(
        result.best.flops.total * (r["msteps"] * 100 + 1200) for r in result.table
    ) / (result.settings["msteps"] * 100 + 1200)
    hopeless = [r["forget_accuracy"] for r in result.table if r["lr"] == 1e-4]
    assert min(hopeless) > 0.5  # untuned, the baseline would look bad


def test_retraining_and_fine_tuning() -> None:
    model, forget, retain = trained()
    fresh = retrain(head, retain, epochs=5, lr=0.02)
    assert (
        right(fresh.model, forget) == 0.0 and right(fresh.model, retain) > 0.97 and fresh.method == "retrain"
    )
    tuned = fine_tune(model, retain, epochs=3, lr=1e-3)
    assert tuned.model is model and [row["epoch"] for row in tuned.history] == [1, 2, 3]
    assert tuned.history[-1]["retain_loss"] < tuned.history[0]["retain_loss"]


def test_operations_are_counted_with_and_without_the_backbone() -> None:
    model, forget, retain = trained()
    one = 2 * 12 * 4
    report = scrub(
        model,
        forget,
        retain,
        epochs=3,
        msteps=2,
        alpha=0.1,
        gamma=1.0,
        temperature=2.0,
        lr=1e-3,
        backbone_flops=1000,
    )
    seen = 3 * 300 + 2 * 100
    assert report.flops == Flops(forward=2 * seen * one, backward=seen * one, backbone=1000 * seen)
    assert report.flops.total == report.flops.head + 1000 * seen
    plain = fine_tune(model, retain, epochs=2)
    assert plain.flops == Flops(forward=600 * one, backward=600 * one)


def test_loaders_and_pairs_train_alike_and_the_global_state_stays() -> None:
    model, forget, retain = trained()
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    settings = {"epochs": 1, "msteps": 1, "alpha": 0.1, "gamma": 1.0, "temperature": 2.0, "lr": 1e-2}
    scrub(model, forget, retain, batch_size=64, forget_batch_size=32, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    loaders = (
        DataLoader(TensorDataset(*forget), batch_size=32),
        DataLoader(TensorDataset(*retain), batch_size=64),
    )
    scrub(twin, *loaders, **settings)
    assert torch.equal(model.weight, twin.weight)


def test_adam_on_a_bottleneck_is_warned_about_and_sgd_is_not() -> None:
    model, (z, labels) = bottleneck(), blobs(40)
    gone = labels == 0
    forget, retain = (z[gone], labels[gone]), (z[~gone], labels[~gone])
    with pytest.warns(UserWarning, match="Adam will move values that the batch did not fetch"):
        neggrad_plus(copy.deepcopy(model), forget, retain, epochs=1)
    before = model.values.detach().clone()
    scrub(
        model,
        forget,
        retain,
        epochs=1,
        msteps=1,
        alpha=0.1,
        gamma=1.0,
        temperature=2.0,
        lr=1.0,
        optimizer="sgd",
    )
    moved = (model.values != before).any(-1)
    assert bool(moved.any()) and not bool((moved & (model.usage(z) == 0)).any())


def test_requests_that_do_not_fit() -> None:
    model, forget, retain = trained()
    both = (torch.cat([forget[0], retain[0]]), torch.cat([forget[1], retain[1]]))
    before = copy.deepcopy(model.state_dict())
    ok = {"epochs": 1, "msteps": 1, "alpha": 0.1, "gamma": 1.0, "temperature": 2.0, "lr": 0.1}
    for call, message in [
        (
            lambda: scrub(model, forget, both, **ok),
            r"retain holds the classes \[0\] of the forget set: take them out, or give one_class=False",
        ),
        (lambda: neggrad_plus(model, forget, both), r"retain holds the classes \[0\]"),
        (lambda: scrub(model, (forget[0][:0], forget[1][:0]), retain, **ok), "forget is empty"),
        (lambda: scrub(model, forget[0], retain, **ok), "forget needs labels"),
        (
            lambda: scrub(model, forget, retain, **{**ok, "temperature": 0.0}),
            "temperature=0 must be finite > 0",
        ),
        (lambda: scrub(model, forget, retain, **{**ok, "alpha": -1.0}), "alpha=-1 must be finite >= 0"),
        (
            lambda: scrub(model, forget, retain, optimizer="lion", **ok),
            "optimizer='lion' is not one of 'adam', 'sgd'",
        ),
        (lambda: neggrad_plus(model, forget, retain, alpha=1.5), "alpha=1.5 must be finite >= 0 and <= 1"),
        (lambda: fine_tune(nn.Identity(), retain), "student has no parameter that requires a gradient"),
        (lambda: tune(model, forget, retain, grid={}), "has nothing to try"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(TypeError, match="student must be an nn.Module, got function"):
        fine_tune(right, retain)
    scrub(model, forget, both, one_class=False, **ok)
