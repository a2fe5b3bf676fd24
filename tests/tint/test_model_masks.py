"""Which token trains and which is evaluated; documents, padding and positions that do not get into each other's way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.tint.auxiliaries import EXACT, KINDS, TINY, auxiliary, build, documents, first, relative

SETTINGS = {"inner_lr": 1e-3, "n_steps": 2}


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[B, T], zero at token 0."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return F.pad(losses.view(len(ids), -1), (1, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_without_training_tokens_nothing_changes(kind: str) -> None:
    output = build(auxiliary(kind), **SETTINGS)(documents(2), first(0, 0))
    assert torch.equal(output.logits, output.initial_logits)
    assert float(output.loss) == float(output.initial_loss)
    assert output.updates and not any(bool(change.any()) for change in output.updates.values())
    assert output.n_train.tolist() == [0, 0] and bool(output.train_loss.isnan())


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_learning_rate_nothing_changes(kind: str) -> None:
    output = build(auxiliary(kind, dtype=torch.float32), inner_lr=0.0)(documents(2), first(5, 9))
    assert torch.equal(output.logits, output.initial_logits)
    assert not any(bool(change.any()) for change in output.updates.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_without_training_tokens_keeps_its_bits_among_others(kind: str) -> None:
    # Wide enough in float64 for a product with one weight and one with a weight a document to round differently.
    model = auxiliary(kind, n_embd=64) if kind in ("gpt2", *TINY) else auxiliary(kind)
    output = build(model, inner_lr=1e-5)(documents(3), first(5, 0, 9))
    same = [torch.equal(output.logits[row], output.initial_logits[row]) for row in range(3)]
    assert same == [False, True, False]
    assert not any(bool(change[1].any()) for change in output.updates.values())


def test_losses_are_means_over_the_tokens_that_are_predicted() -> None:
    ids, mask = documents(2), first(5, 9)
    mask[1] = False  # token 0 of document 1 is outside the training segment, and no target
    output = build(auxiliary("gpt2"), **SETTINGS)(ids, mask)
    after, before = token_losses(output.logits, ids), token_losses(output.initial_logits, ids)
    tests = [after[0, 5:], after[1, 1:]]
    torch.testing.assert_close(output.loss, torch.cat(tests).mean())
    torch.testing.assert_close(output.document_losses, torch.stack([t.mean() for t in tests]))
    torch.testing.assert_close(output.initial_loss, torch.cat([before[0, 5:], before[1, 1:]]).mean())
    torch.testing.assert_close(output.train_loss, after[0, 1:5].mean())
    torch.testing.assert_close(output.initial_train_loss, before[0, 1:5].mean())
    assert output.n_train.tolist() == [4, 0]


def test_token_t_is_a_target_where_the_mask_has_it() -> None:
    """A single True at t trains on token t, predicted at t - 1: the change is that loss's gradient."""
    model, ids = auxiliary("tiny_gpt"), documents(1)
    mask = torch.zeros(1, 14, dtype=torch.bool)
    mask[0, [4, 11]] = True
    output = build(model, **EXACT, attn_grad="full", inner_lr=1e-3)(ids, mask)
    losses = token_losses(model(ids).logits, ids)[0]
    name = "h.0.mlp.fc_in.weight"
    (gradient,) = torch.autograd.grad(losses[4] + losses[11], [model.get_parameter(name)])
    assert relative(output.updates[name][0], -1e-3 * gradient) < 1e-9
    # what is evaluated is everything else but token 0
    rest = [t for t in range(1, 14) if t not in (4, 11)]
    torch.testing.assert_close(output.loss, token_losses(output.logits, ids)[0, rest].mean())


def test_the_gradient_mask_narrows_what_is_trained_on_and_not_what_is_evaluated() -> None:
    model, ids, mask = auxiliary("gpt2"), documents(2), first(9, 9)
    only = torch.zeros(2, 14, dtype=torch.bool)
    only[:, [3, 8, 12]] = True  # 12 is outside the training segment
    tint = build(model, **SETTINGS)
    narrowed = tint(ids, mask, gradient_mask=only)
    expected = tint(ids, mask & only)
    for name, change in expected.updates.items():
        assert torch.equal(narrowed.updates[name], change)
    torch.testing.assert_close(narrowed.loss, token_losses(narrowed.logits, ids)[:, 9:].mean())
    assert narrowed.n_train.tolist() == [2, 2]


def test_labels_stand_for_the_targets() -> None:
    model, ids, mask = auxiliary("gpt2"), documents(2), first(9, 9)
    tint = build(model, **SETTINGS)
    labels = ids.clone()
    assert torch.equal(tint(ids, mask, labels).loss, tint(ids, mask).loss)
    labels[:, 4:7] = -100
    without = mask.clone()
    without[:, 4:7] = False
    left_out = tint(ids, mask, labels)
    gradient_mask = tint(ids, mask, gradient_mask=without)
    for name, change in gradient_mask.updates.items():
        assert torch.equal(left_out.updates[name], change)
    labels = ids.roll(1, dims=1)  # other words to predict
    output = tint(ids, mask, labels)
    torch.testing.assert_close(output.initial_loss, token_losses(output.initial_logits, labels)[:, 9:].mean())


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_after_does_not_reach_back(kind: str) -> None:
    """Tokens behind the training segment change neither the update nor the logits before them, bit by bit."""
    tint, ids, mask = build(auxiliary(kind), **SETTINGS), documents(2), first(6, 6)
    other = ids.clone()
    other[:, 10:] = (other[:, 10:] + 1) % 13
    one, two = tint(ids, mask), tint(other, mask)
    for name, change in one.updates.items():
        assert torch.equal(two.updates[name], change), name
    torch.testing.assert_close(two.logits[:, :10], one.logits[:, :10], rtol=0, atol=1e-12)
    assert not torch.allclose(two.logits[:, 10:], one.logits[:, 10:])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind: str) -> None:
    tint, ids, mask = build(auxiliary(kind), **SETTINGS), documents(3), first(6, 11, 3)
    together = tint(ids, mask)
    order = [2, 0, 1]
    shuffled = tint(ids[order], mask[order])
    torch.testing.assert_close(shuffled.logits, together.logits[order], rtol=0, atol=1e-11)
    for row in range(3):
        alone = tint(ids[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=0, atol=1e-11)
        for name, change in together.updates.items():
            assert relative(alone.updates[name][0], change[row]) < 1e-9, name
            assert relative(shuffled.updates[name][order.index(row)], change[row]) < 1e-9, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str, side: str) -> None:
    tint, ids, mask = build(auxiliary(kind), **SETTINGS), documents(2, length=9), first(5, 6, length=9)
    bare = tint(ids, mask)
    pad = (3, 0) if side == "left" else (0, 3)
    padded, real = F.pad(ids, pad, value=7), F.pad(torch.ones_like(mask), pad)
    keep = slice(3, None) if side == "left" else slice(0, 9)
    for filler in (False, True):  # training tokens in the padding count for nothing
        output = tint(
            padded,
            F.pad(mask, pad, value=filler),
            attention_mask=real,
            position_ids=(real.cumsum(1) - 1).clamp(min=0),
        )
        torch.testing.assert_close(output.logits[:, keep], bare.logits, rtol=0, atol=1e-11)
        torch.testing.assert_close(output.loss, bare.loss, rtol=0, atol=1e-11)
        for name, change in bare.updates.items():
            assert relative(output.updates[name], change) < 1e-9, name


def test_padding_of_one_document_leaves_the_other() -> None:
    tint, ids, mask = build(auxiliary("opt"), **SETTINGS), documents(2), first(8, 8)
    real = torch.ones(2, 14, dtype=torch.long)
    real[1, :4] = 0
    output = tint(ids, mask, attention_mask=real)  # OPT counts its positions along the mask by itself
    whole = tint(ids[:1], mask[:1])
    short = tint(ids[1:, 4:], mask[1:, 4:])
    torch.testing.assert_close(output.logits[0], whole.logits[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(output.logits[1, 4:], short.logits[0], rtol=0, atol=1e-11)


def test_demonstrations_that_read_themselves_alone() -> None:
    """A [B, T, T] mask and restarted positions: the update is the sum of the demonstrations' own updates."""
    model, ids = auxiliary("tiny_gpt"), documents(1)
    tint = build(model, **EXACT, inner_lr=1e-3)
    blocks = torch.block_diag(torch.ones(5, 5), torch.ones(5, 5), torch.ones(4, 4)).bool()[None]
    positions = torch.tensor([[*range(5), *range(5), *range(4)]])
    mask, own = first(10), torch.ones(1, 14, dtype=torch.bool)
    own[0, [0, 5]] = False  # the first token of a demonstration would be predicted from another one
    output = tint(ids, mask, attention_mask=blocks, position_ids=positions, gradient_mask=own)
    extra = torch.zeros(1, 1, dtype=torch.long)  # something to evaluate behind each
    parts = [
        tint(torch.cat([part, extra], 1), torch.arange(6)[None] < 5) for part in ids[:, :10].split(5, dim=1)
    ]
    for name, change in output.updates.items():
        assert relative(change, sum(part.updates[name] for part in parts)) < 1e-9, name


def test_positions_can_be_given() -> None:
    model, ids, mask = auxiliary("gpt2"), documents(1), first(6)
    positions = torch.arange(14).flip(0)[None]
    output = build(model, **SETTINGS)(ids, mask, position_ids=positions)
    torch.testing.assert_close(
        output.initial_logits, model(ids, position_ids=positions).logits, rtol=0, atol=1e-12
    )
