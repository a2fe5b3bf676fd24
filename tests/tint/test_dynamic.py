"""Dynamic evaluation against autograd on the library's own forward pass, and against plain SGD by torch.optim."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from papercore.tint import dynamic_eval
from tests.tint.auxiliaries import (
    EXACT,
    KINDS,
    TINY,
    assert_same_updates,
    auxiliary,
    build,
    documents,
    first,
    relative,
)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_without_detaching_it_is_the_librarys_own_gradient(kind: str, steps: int) -> None:
    model, ids, mask = auxiliary(kind), documents(2), first(5, 9)
    output = dynamic_eval(model, ids, mask, lr=1e-3, steps=steps, detach_scores=False, update_layernorm="all")
    # Llama of transformers takes its norms in float32.
    tolerance = 1e-4 if kind == "llama" else 1e-9
    for row, n in enumerate((5, 9)):
        tuned = copy.deepcopy(model)
        trained = [tuned.get_parameter(name) for name in output.updates]
        optimizer = torch.optim.SGD(trained, lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            logits = tuned(ids[row : row + 1]).logits[0, : n - 1]
            F.cross_entropy(logits, ids[row, 1:n], reduction="sum").backward()
            optimizer.step()
        for name, change in output.updates.items():
            moved = (tuned.get_parameter(name) - model.get_parameter(name)).detach()
            assert relative(change[row], moved) < tolerance, name
        with torch.no_grad():
            after = tuned(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(output.logits[row], after, rtol=0, atol=1e-4 if kind == "llama" else 1e-11)


@pytest.mark.parametrize("kind", TINY)
def test_detaching_is_the_small_gpts_own_detaching(kind: str) -> None:
    model, ids, mask = auxiliary(kind), documents(1), first(9)
    output = dynamic_eval(model, ids, mask, lr=1e-3, update_layernorm="all")
    leaves = {name: model.get_parameter(name) for name in output.updates}
    logits = functional_call(model, leaves, (ids,), {"detach_scores": True}).logits
    loss = F.cross_entropy(logits[0, :8], ids[0, 1:9], reduction="sum")
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert relative(output.updates[name][0], -1e-3 * gradient) < 1e-9, name


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_detaching_in_a_library_model(kind: str) -> None:
    """The model's own eager attention with its softmax detached from outside."""
    model, ids, mask = auxiliary(kind), documents(1), first(9)
    model.set_attn_implementation("eager")
    output = dynamic_eval(model, ids, mask, lr=1e-3)
    softmax = F.softmax

    def detached(scores: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        kwargs.pop("dtype", None)  # OPT takes it in float32
        return softmax(scores, *args, **kwargs).detach()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", detached)
        logits = model(ids).logits
    leaves = {name: model.get_parameter(name) for name in output.updates}
    loss = F.cross_entropy(logits[0, :8], ids[0, 1:9], reduction="sum")
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert relative(output.updates[name][0], -1e-3 * gradient) < 1e-9, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach_scores", [True, False])
def test_it_trains_what_tint_trains_and_to_the_same_end(kind: str, detach_scores: bool) -> None:
    model, ids = auxiliary(kind), documents(3)
    real = torch.ones(3, 14, dtype=torch.bool)
    real[1, :3] = False
    mask, positions = first(6, 9, 0), (real.cumsum(1) - 1).clamp(min=0)
    shared = {"n_layers": 2, "update_layernorm": "all", "reduction": "mean"}
    baseline = dynamic_eval(
        model,
        ids,
        mask,
        lr=1e-2,
        steps=2,
        detach_scores=detach_scores,
        attention_mask=real,
        position_ids=positions,
        **shared,
    )
    attention = "value_only" if detach_scores else "full"
    tint = build(model, **EXACT, inner_lr=1e-2, n_steps=2, attn_grad=attention, **shared)
    output = tint(ids, mask, attention_mask=real, position_ids=positions)
    assert_same_updates(output.updates, baseline.updates, 1e-9)
    for field in ("loss", "initial_loss", "train_loss", "document_losses", "initial_document_losses"):
        torch.testing.assert_close(getattr(output, field), getattr(baseline, field), rtol=0, atol=1e-11)
    torch.testing.assert_close(output.logits[real], baseline.logits[real], rtol=0, atol=1e-11)


def test_labels_and_gradient_mask() -> None:
    model, ids, mask = auxiliary("gpt2"), documents(2), first(9, 9)
    labels, only = ids.roll(2, dims=1), documents(2) % 2 == 0
    labels[:, 5] = -100
    how = {"labels": labels, "gradient_mask": only}
    baseline = dynamic_eval(model, ids, mask, lr=1e-3, **how)
    output = build(model, **EXACT, inner_lr=1e-3)(ids, mask, **how)
    assert_same_updates(output.updates, baseline.updates, 1e-9)
    torch.testing.assert_close(output.loss, baseline.loss)


def test_constant_scores_leave_the_last_layer_right_and_the_first_near() -> None:
    """What the stop-gradient does: nothing above the last scores, something below them."""
    model, ids, mask = auxiliary("gpt2"), documents(1), first(9)
    stopped, full = (
        dynamic_eval(model, ids, mask, lr=1e-3, detach_scores=flag).updates for flag in (True, False)
    )
    last, lowest = "transformer.h.2.mlp.c_fc.weight", "transformer.h.0.ln_1.bias"
    assert relative(stopped[last], full[last]) < 1e-12
    assert relative(stopped[lowest], full[lowest]) > 1e-3


def test_the_model_is_left_alone() -> None:
    model = auxiliary("opt")
    before = copy.deepcopy(model.state_dict())
    output = dynamic_eval(model, documents(2), first(5, 9), lr=1e-2, steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not output.logits.requires_grad and not any(u.requires_grad for u in output.updates.values())


def test_nothing_to_train_on() -> None:
    output = dynamic_eval(auxiliary("opt"), documents(2), first(0, 5), lr=1e-2)
    assert torch.equal(output.logits[0], output.initial_logits[0])
    assert not any(bool(change[0].any()) for change in output.updates.values())
    assert not torch.equal(output.logits[1], output.initial_logits[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, ["lr = -1.0"]),
        ({"lr": 1e-3, "steps": 0}, ["steps = 0"]),
        ({"lr": 1e-3, "n_layers": 4}, ["n_layers", "4", "3"]),
        ({"lr": 1e-3, "update_layernorm": "biases"}, ["biases", "bias"]),
    ],
)
def test_settings_are_refused_as_tints_are(settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        dynamic_eval(auxiliary("tiny_gpt"), documents(1), first(5), **settings)
    for word in words:
        assert word in str(refused.value)
