"""Which tokens teach: the training mask, the gradient mask, labels, padding, positions, and what must not matter."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.tint.test_contract_reference import (
    FAMILIES,
    LENGTH,
    VOCABULARY,
    assert_updates,
    auxiliary,
    documents,
    first,
    forward,
    relative,
    sgd,
    target_losses,
    updated_names,
    weights,
)

tint = pytest.importorskip("papercore.tint")

LR = 1e-2
EXACT = {"ln_grad": "exact", "act_grad": "exact", "attn_grad": "value_only", "inner_lr": LR}


def build(model: nn.Module, **settings):
    return tint.TinTModel.from_auxiliary(model, tint.TinTConfig(**(EXACT | settings)))


def chosen(*tokens: int) -> Tensor:
    mask = torch.zeros(1, LENGTH, dtype=torch.bool)
    mask[0, list(tokens)] = True
    return mask


def quietly(simulator, *args, **kwargs):
    """A call that may warn that there is next to nothing to learn from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return simulator(*args, **kwargs)


@pytest.mark.parametrize("tokens", [(3, 4), (1, 2, 3), (2, 7, 9), (5, 11), (1, 3, 5, 7, 9)])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_t_is_a_target_where_the_mask_says_so(family: str, tokens: tuple[int, ...]) -> None:
    model, ids, mask = auxiliary(family), documents(1), chosen(*tokens)
    out = build(model, n_steps=2)(ids, mask)
    changes, logits = sgd(model, ids[0], mask[0], updated_names(model), lr=LR, steps=2)
    assert_updates(out.updates, 0, changes)
    assert relative(out.logits[0], logits) < 1e-9
    left = [t for t in range(1, LENGTH) if t not in tokens]
    assert float(out.loss) == pytest.approx(float(target_losses(logits, ids[0])[left].mean()), rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_is_nobodys_target(family: str) -> None:
    model, ids = auxiliary(family), documents(1)
    with_it, without = build(model)(ids, first(6)), build(model)(ids, first(6) & ~chosen(0))
    for name, change in with_it.updates.items():
        assert torch.equal(change, without.updates[name]), name
    assert torch.equal(with_it.loss, without.loss)


@pytest.mark.parametrize("token", [1, 4, 11])
def test_one_target_is_enough(token: int) -> None:
    model, ids, mask = auxiliary("gpt2"), documents(1), chosen(token)
    out = quietly(build(model), ids, mask)
    changes, logits = sgd(model, ids[0], mask[0], updated_names(model), lr=LR)
    assert_updates(out.updates, 0, changes)
    assert relative(out.logits[0], logits) < 1e-9


@pytest.mark.parametrize("mask", [first(0), chosen(0)], ids=["nothing", "the first token"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_targets_nothing_changes(family: str, steps: int, mask: Tensor) -> None:
    model, ids = auxiliary(family), documents(1)
    out = quietly(build(model, n_steps=steps), ids, mask)
    assert not any(change.any() for change in out.updates.values())
    assert torch.equal(out.logits, out.initial_logits) and torch.equal(out.loss, out.initial_loss)
    before = forward(model, weights(model), ids[0], detach=True)
    assert relative(out.logits[0], before) < 1e-12
    assert float(out.loss) == pytest.approx(float(target_losses(before, ids[0])[1:].mean()), rel=1e-9)


def test_a_row_without_targets_stays_as_it_was_beside_one_that_learns() -> None:
    model, ids = auxiliary("gpt2"), documents(2)
    mask = torch.cat([first(0), first(7)])
    out = quietly(build(model), ids, mask)
    assert not any(change[0].any() for change in out.updates.values())
    assert relative(out.logits[0], out.initial_logits[0]) < 1e-13
    changes, _ = sgd(model, ids[1], mask[1], updated_names(model), lr=LR)
    assert_updates(out.updates, 1, changes)


@pytest.mark.parametrize("run", ["simulated", "dynamic"])
@pytest.mark.parametrize("rows", [1, 3])
def test_all_true_leaves_nothing_to_evaluate(run: str, rows: int) -> None:
    model, ids, mask = auxiliary("gpt2"), documents(rows), first(LENGTH, rows)
    with pytest.raises(ValueError, match=r"(?i)train_mask"):
        build(model)(ids, mask) if run == "simulated" else tint.dynamic_eval(model, ids, mask, lr=LR)


@pytest.mark.parametrize("family", FAMILIES)
def test_eta_zero_is_the_auxiliary(family: str) -> None:
    model, ids = auxiliary(family), documents(1)
    out = build(model, inner_lr=0.0, n_steps=2)(ids, first(7))
    assert torch.equal(out.logits, out.initial_logits) and torch.equal(out.loss, out.initial_loss)
    assert not any(change.any() for change in out.updates.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"ln_grad": "finite_difference", "act_grad": "finite_difference"}])
def test_tokens_after_the_training_segment_teach_nothing(family: str, settings: dict) -> None:
    model, ids = auxiliary(family), documents(1)
    other = ids.clone()
    other[0, 7:] = (other[0, 7:] + 5) % VOCABULARY
    a, b = (build(model, n_steps=2, **settings)(tokens, first(7)) for tokens in (ids, other))
    for name, change in a.updates.items():
        assert relative(b.updates[name][0], change[0]) < 1e-12, name
    assert relative(b.logits[0, :7], a.logits[0, :7]) < 1e-12
    assert relative(b.logits[0, 7:], a.logits[0, 7:]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_test_token_does_not_change_the_logits_before_it(family: str) -> None:
    model, ids = auxiliary(family), documents(1)
    for t in range(7, LENGTH):
        other = ids.clone()
        other[0, t] = (other[0, t] + 3) % VOCABULARY
        a, b = (build(model)(tokens, first(7)).logits[0] for tokens in (ids, other))
        assert relative(b[:t], a[:t]) < 1e-12
        assert relative(b[t], a[t]) > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_training_token_teaches_as_a_target_not_as_an_input(family: str) -> None:
    """Token 6 is the last target: its embedding is read by no training prediction, only its identity counts."""
    model, ids = auxiliary(family), documents(1)
    narrow, wide = build(model)(ids, first(6)), build(model)(ids, first(7))
    shortened = build(model)(ids[:, :7], first(6, length=7))  # token 6 is there to be evaluated
    for name, change in narrow.updates.items():
        assert relative(shortened.updates[name][0], change[0]) < 1e-12, name
    name = next(name for name in wide.updates if name.endswith(("c_fc.weight", "fc1.weight")))
    assert relative(wide.updates[name][0], narrow.updates[name][0]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_permuting_the_batch_permutes_everything(family: str) -> None:
    model, ids = auxiliary(family), documents(4)
    mask = torch.cat([first(n) for n in (3, 5, 7, 9)])
    order = torch.tensor([2, 0, 3, 1])
    a, b = build(model, n_steps=2)(ids, mask), build(model, n_steps=2)(ids[order], mask[order])
    for name, change in a.updates.items():
        for row, origin in enumerate(order):
            assert relative(b.updates[name][row], change[origin]) < 1e-12, name
    assert relative(b.logits, a.logits[order]) < 1e-12
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=0)
    for row in range(4):
        alone = build(model, n_steps=2)(ids[row : row + 1], mask[row : row + 1])
        for name, change in a.updates.items():
            assert relative(alone.updates[name][0], change[row]) < 1e-11, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_mean_over_the_targets_of_all_documents(family: str) -> None:
    model, ids = auxiliary(family), documents(2)
    mask = torch.cat([first(3), first(10)])  # 9 and 2 targets are left: not the mean of two means
    out = build(model)(ids, mask)
    losses = torch.cat([target_losses(out.logits[row], ids[row])[~mask[row]] for row in range(2)])
    assert len(losses) == 11
    assert float(out.loss) == pytest.approx(float(losses.mean()), rel=1e-9)


@pytest.mark.parametrize("backend", ["fused", "literal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_changes_nothing(family: str, backend: str) -> None:
    model, ids, lengths = auxiliary(family), documents(2), (9, 12)
    mask, keep = torch.cat([first(5), first(7)]), torch.cat([first(n) for n in lengths]).long()
    out = build(model, n_steps=2, backend=backend)(ids, mask, attention_mask=keep)
    alone = [
        build(model, n_steps=2, backend=backend)(ids[r : r + 1, :n], mask[r : r + 1, :n])
        for r, n in enumerate(lengths)
    ]
    for row, n in enumerate(lengths):
        for name, change in alone[row].updates.items():
            assert relative(out.updates[name][row], change[0]) < 1e-11, name
        assert relative(out.logits[row, :n], alone[row].logits[0]) < 1e-11
    counts = torch.tensor([9.0 - 5, 12.0 - 7], dtype=torch.float64)
    pooled = sum(float(a.loss) * float(c) for a, c in zip(alone, counts, strict=True)) / float(counts.sum())
    assert float(out.loss) == pytest.approx(pooled, rel=1e-9)  # padded tokens are no targets


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_tokens_are_no_targets_even_where_the_training_mask_is_true(family: str) -> None:
    model, ids = auxiliary(family), documents(2)
    keep = torch.cat([first(9), first(12)]).long()
    mask = torch.cat([first(5), first(7)])
    careless = mask | (keep == 0)
    a, b = (build(model)(ids, m, attention_mask=keep) for m in (mask, careless))
    for name, change in a.updates.items():
        for row in range(2):
            assert relative(b.updates[name][row], change[row]) < 1e-12, name
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_changes_nothing(family: str) -> None:
    model, ids = auxiliary(family), documents(1)
    n, pad = 9, 3
    keep = torch.arange(LENGTH)[None] >= pad
    mask = torch.zeros(1, LENGTH, dtype=torch.bool)
    mask[0, pad + 1 : pad + 6] = True
    positions = (torch.arange(LENGTH)[None] - pad).clamp(min=0)
    out = build(model)(ids, mask, attention_mask=keep.long(), position_ids=positions)
    alone = build(model)(ids[:, pad:], mask[:, pad:], position_ids=torch.arange(n)[None])
    for name, change in alone.updates.items():
        assert relative(out.updates[name][0], change[0]) < 1e-11, name
    assert relative(out.logits[0, pad:], alone.logits[0]) < 1e-11
    assert torch.isfinite(out.logits).all() and torch.isfinite(out.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_position_ids_are_those_of_the_auxiliary(family: str) -> None:
    model, ids, mask = auxiliary(family), documents(1), first(7)
    positions = torch.cat([torch.arange(4), torch.arange(8)])
    out = build(model)(ids, mask, position_ids=positions[None])
    changes, logits = sgd(model, ids[0], mask[0], updated_names(model), lr=LR, positions=positions)
    assert_updates(out.updates, 0, changes)
    assert relative(out.logits[0], logits) < 1e-9
    with torch.no_grad():
        assert relative(out.initial_logits, model(ids, position_ids=positions[None]).logits) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_mask_picks_among_the_training_tokens(family: str) -> None:
    """The targets are the tokens of the training segment whose label counts (label words only, say)."""
    model, ids, mask = auxiliary(family), documents(1), first(8)
    picked = chosen(2, 6, 10)  # token 10 is outside the training segment: it must not teach
    out = build(model, n_steps=2)(ids, mask, gradient_mask=picked)
    changes, logits = sgd(model, ids[0], (mask & picked)[0], updated_names(model), lr=LR, steps=2)
    assert_updates(out.updates, 0, changes)
    assert relative(out.logits[0], logits) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_name_the_targets_that_are_scored(family: str) -> None:
    model, ids, mask = auxiliary(family), documents(2), first(7, 2)
    plain = build(model)(ids, mask)
    same = build(model)(ids, mask, labels=ids)
    torch.testing.assert_close(plain.loss, same.loss, rtol=0, atol=0)
    some = ids.clone()
    some[:, 7:10] = -100
    some[1, 10] = -100
    out = build(model)(ids, mask, labels=some)
    left = torch.cat(
        [target_losses(out.logits[0], ids[0])[10:12], target_losses(out.logits[1], ids[1])[11:12]]
    )
    assert float(out.loss) == pytest.approx(float(left.mean()), rel=1e-9)
    before = torch.cat(
        [target_losses(out.initial_logits[0], ids[0])[10:], target_losses(out.initial_logits[1], ids[1])[11:]]
    )
    assert float(out.initial_loss) == pytest.approx(float(before.mean()), rel=1e-9)
    for name, change in plain.updates.items():
        assert torch.equal(change, out.updates[name]), name
