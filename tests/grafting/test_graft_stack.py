"""Several grafts on one model, changes while one is on, interrupts, tied weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from papercore.grafting import (
    Graft,
    GraftMismatchError,
    GraftStackError,
    entries,
    magnitude_mask,
    random_mask,
    task_vector,
)
from papercore.grafting import (
    graft as graft_module,
)
from tests.grafting.reference import copies, finetuned, made, network, same


def test_grafts_form_a_stack() -> None:
    base, tuned, _, first = made(seed=0)
    before = copies(base)
    second = Graft.from_mask(tuned, random_mask(task_vector(base, tuned), k=90, generator=8))
    one = first.apply_(base)
    middle = copies(base)
    two = second.apply_(base)  # overlaps with the first
    assert len(first & second) > 0
    with pytest.raises(
        GraftStackError,
        match="cannot remove Graft.20 entries.*Graft.90 entries.* was applied later; remove that first",
    ):
        one.remove()
    with pytest.raises(GraftStackError, match="is already applied to this model: remove it first"):
        first.apply_(base)
    two.remove()
    assert same(base, middle)
    one.remove()
    assert same(base, before)
    with pytest.raises(GraftStackError, match="is not applied any more"):
        one.remove()
    assert issubclass(GraftStackError, ValueError)


def test_the_base_beneath_is_seen_through_grafts_that_somebody_wrote_around() -> None:
    base, tuned, _, first = made(seed=0)
    second = Graft.from_mask(tuned, random_mask(task_vector(base, tuned), k=30, generator=8))
    before = copies(base)
    handle = first.apply_(base)
    with torch.no_grad():  # the same values, but PyTorch's version counters move on
        for p in base.parameters():
            p.add_(0.0)
    inner = second.apply_(base)
    inner.remove()
    with torch.no_grad():
        base[4].bias.add_(1.0)
    with pytest.raises(GraftMismatchError, match="4.bias"):
        second.apply_(base)
    handle.remove(force=True)
    with torch.no_grad():
        base[4].bias.copy_(before["4.bias"])
    assert same(base, before)


def test_changes_while_applied_are_not_lost_silently() -> None:
    base, _, mask, graft = made()
    before = copies(base)
    handle = graft.apply_(base)
    name = next(n for n, c in mask.counts().items() if c)
    with torch.no_grad():
        base.get_parameter(name).add_(1.0)
    with pytest.raises(
        GraftStackError, match=r"was changed while the graft was applied: remove\(force=True\)"
    ):
        handle.remove()
    assert handle.active
    handle.remove(force=True)
    assert torch.equal(base.get_parameter(name)[mask[name]], before[name][mask[name]])
    with graft.applied(other := network()), pytest.raises(GraftMismatchError):
        graft.apply_(copy.deepcopy(other))  # a copy holds the grafted weights and no stack


def test_keeping_and_merging() -> None:
    base, tuned, mask, graft = made()
    handle = graft.apply_(base)
    handle.keep()
    assert not handle.active
    with pytest.raises(GraftMismatchError):
        graft.apply_(base)  # it is no longer the base
    merged = graft.merge_and_unload(network())
    assert same(merged, copies(base))
    with graft.apply_(network()) as handle:
        assert handle.active
    assert not handle.active


class Interrupted(BaseException):
    pass


def test_an_interrupted_apply_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, _, graft = made(k=60)
    before = copies(base)
    for stop_at in range(1, len(graft.index) + 1):
        calls = 0

        def fragile(tensor: Tensor, index: Tensor, values: Tensor, stop_at: int = stop_at) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Interrupted
            entries.put(tensor, index, values)

        monkeypatch.setattr(graft_module, "put", fragile)
        with pytest.raises(Interrupted):
            graft.apply_(base)
        monkeypatch.setattr(graft_module, "put", entries.put)
        assert same(base, before)
        graft.apply_(base).remove()  # nothing is left on the stack
    with pytest.raises(Interrupted), graft.applied(base):
        raise Interrupted
    assert same(base, before)


def test_tied_weights_are_written_once_and_seen_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    base = Tied()
    tuned = finetuned(base)
    graft = Graft.from_mask(tuned, magnitude_mask(task_vector(base, tuned), k=4))
    before = base.embed.weight.detach().clone()
    with graft.applied(base):
        assert base.head.weight is base.embed.weight
        assert int((base.head.weight != before).sum()) == 4
    assert torch.equal(base.head.weight, before)
