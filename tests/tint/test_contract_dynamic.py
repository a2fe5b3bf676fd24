"""dynamic_eval, the same inner training by autograd, against SGD written out; and against the simulator."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from tests.tint.test_contract_reference import (
    FAMILIES,
    assert_updates,
    auxiliary,
    documents,
    first,
    forward,
    mean_of_targets,
    relative,
    sgd,
    updated_names,
    weights,
)

tint = pytest.importorskip("papercore.tint")

LR = 1e-2
EXACT = {"ln_grad": "exact", "act_grad": "exact", "attn_grad": "value_only", "inner_lr": LR}


def refusal(kind: type[Exception] | tuple[type[Exception], ...], call, *args, **kwargs) -> str:
    with pytest.raises(kind) as refused:
        call(*args, **kwargs)
    return str(refused.value)


def build(model: nn.Module, **settings):
    return tint.TinTModel.from_auxiliary(model, tint.TinTConfig(**settings))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_evaluation_is_explicit_sgd(family: str, steps: int) -> None:
    model, ids, mask = auxiliary(family), documents(2), first(7, 2)
    mask[1] = first(4)[0]
    out = tint.dynamic_eval(model, ids, mask, lr=LR, steps=steps)
    names = sorted(out.updates)
    assert {name for name in updated_names(model, layernorm="none") if name.endswith("weight")} <= set(names)
    assert not [name for name in names if any(part in name for part in ("wte", "wpe", "embed", "lm_head"))]
    for row in range(2):
        changes, logits = sgd(model, ids[row], mask[row], names, lr=LR, steps=steps)
        assert_updates(out.updates, row, changes)
        assert relative(out.logits[row], logits) < 1e-9
        before = forward(model, weights(model), ids[row], detach=True)
        assert relative(out.initial_logits[row], before) < 1e-12
    assert float(out.initial_loss) == pytest.approx(mean_of_targets(out.initial_logits, ids, ~mask), rel=1e-9)
    assert float(out.loss) == pytest.approx(mean_of_targets(out.logits, ids, ~mask), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2])
def test_dynamic_evaluation_through_the_scores(steps: int) -> None:
    model, ids, mask = auxiliary("opt"), documents(1), first(7)
    out = tint.dynamic_eval(model, ids, mask, lr=LR, steps=steps, detach_scores=False)
    changes, logits = sgd(model, ids[0], mask[0], sorted(out.updates), lr=LR, steps=steps, detach=False)
    for name, change in changes.items():
        if not name.endswith("k_proj.bias"):
            assert relative(out.updates[name][0], change) < 1e-9, name
    assert relative(out.logits[0], logits) < 1e-9
    detached = tint.dynamic_eval(model, ids, mask, lr=LR, steps=steps)
    lowest = (
        "model.decoder.layers.0.fc1.weight"  # below the second layer's scores: it must notice the difference
    )
    assert relative(detached.updates[lowest], out.updates[lowest]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_evaluation_and_the_simulator_make_the_same_step(family: str) -> None:
    model, ids, mask = auxiliary(family), documents(2), first(7, 2)
    simulated = build(model, **EXACT, update_layernorm="all")(ids, mask)
    differentiated = tint.dynamic_eval(model, ids, mask, lr=LR)
    shared = set(simulated.updates) & set(differentiated.updates)
    assert {name for name in updated_names(model, layernorm="bias") if name.endswith("weight")} <= shared
    for name in shared:
        for row in range(2):
            assert relative(simulated.updates[name][row], differentiated.updates[name][row]) < 1e-9, name
    torch.testing.assert_close(simulated.initial_loss, differentiated.initial_loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.enable_grad])
def test_dynamic_evaluation_differentiates_whatever_the_caller_has_switched_off(guard: type) -> None:
    model, ids, mask = auxiliary("gpt2"), documents(1), first(7)
    expected = tint.dynamic_eval(model, ids, mask, lr=LR)
    model.requires_grad_(False)
    with guard():
        out = tint.dynamic_eval(model, ids, mask, lr=LR)
    assert torch.equal(out.logits, expected.logits) and not out.logits.requires_grad
    for name, change in expected.updates.items():
        assert torch.equal(out.updates[name], change), name


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("lr", math.nan, "nan"),
        ("lr", math.inf, "inf"),
        ("lr", -1.0, "-1"),
        ("lr", "1e-3", "1e-3"),
        ("lr", None, "None"),
        ("steps", 0, "0"),
        ("steps", -2, "-2"),
        ("steps", 1.5, "1.5"),
    ],
)
def test_dynamic_evaluation_out_of_range(name: str, value: object, shown: str) -> None:
    settings = {"lr": 1e-3, "steps": 1} | {name: value}
    message = refusal(
        (ValueError, TypeError), tint.dynamic_eval, auxiliary("gpt2"), documents(1), first(7), **settings
    )
    assert re.search(rf"\b{name}\b", message), message  # under the name that this function gives it
    assert shown in message


def test_dynamic_evaluation_with_a_learning_rate_too_large() -> None:
    with pytest.warns(UserWarning, match=r"\blr\b") as caught:
        tint.dynamic_eval(auxiliary("gpt2"), documents(1), first(7), lr=30.0)
    assert "sum" in " ".join(str(w.message) for w in caught)


def test_dynamic_evaluation_reads_the_model_as_the_simulator_does() -> None:
    ids, mask = documents(1), first(7)
    dropping = auxiliary("gpt2", resid_pdrop=0.1).train()
    assert "eval" in refusal(ValueError, tint.dynamic_eval, dropping, ids, mask, lr=1e-3)
    post_norm = auxiliary("opt", do_layer_norm_before=False)
    assert "layer_norm" in refusal(NotImplementedError, tint.dynamic_eval, post_norm, ids, mask, lr=1e-3)
    assert "gpt2" in refusal(TypeError, tint.dynamic_eval, "gpt2", ids, mask, lr=1e-3)


def test_dynamic_evaluation_within_inference_mode() -> None:
    model, ids, mask = auxiliary("gpt2"), documents(1), first(7)
    expected = tint.dynamic_eval(model, ids, mask, lr=LR)
    with torch.inference_mode():
        out = tint.dynamic_eval(model, ids.clone(), mask.clone(), lr=LR)
    assert torch.equal(out.logits, expected.logits)
    for name, change in expected.updates.items():
        assert torch.equal(out.updates[name], change), name


def test_an_attention_mask_of_other_integers_is_refused() -> None:
    model, ids, mask = auxiliary("gpt2"), documents(1), first(7)
    message = refusal(
        ValueError, tint.dynamic_eval, model, ids, mask, lr=LR, attention_mask=torch.full_like(ids, 2)
    )
    assert "attention_mask" in message and "2" in message and "0 and 1" in message
