"""A graft goes onto its own base only, and a changed base is noticed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from papercore.grafting import (
    GraftMismatchError,
)
from tests.grafting.reference import DTYPES, copies, made, network, same, seeded


def test_one_changed_entry_anywhere_is_another_base() -> None:
    base, _, mask, graft = made(k=1)
    touched = [n for n, c in mask.counts().items() if c]
    assert len(touched) == 1
    for name, p in base.named_parameters():
        other = copy.deepcopy(base)
        with torch.no_grad():
            other.get_parameter(name).view(-1)[-1] += 1e-6
        before = copies(other)
        with pytest.raises(
            GraftMismatchError,
            match=f"was made for another base, 1 of 6 tensors differ: {name}: other values",
        ):
            graft.apply_(other)
        assert same(other, before)
        assert p.shape == other.get_parameter(name).shape


def test_a_base_that_was_checked_is_checked_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from papercore.grafting import fingerprint

    base, _, _, graft = made()
    passes = []
    real = fingerprint.checksum
    monkeypatch.setattr(fingerprint, "checksum", lambda t: passes.append(1) or real(t))
    for _ in range(3):
        graft.apply_(base).remove()
    assert len(passes) == 6  # once for each tensor, then never again
    with torch.no_grad():
        base[4].bias.add_(1.0)
    with pytest.raises(GraftMismatchError, match="1 of 6 tensors differ: 4.bias"):
        graft.apply_(base)
    assert len(passes) == 7


def test_writes_through_data_are_seen_at_the_grafts_own_entries() -> None:
    base, _, _, graft = made()
    graft.apply_(base).remove()
    for p in base.parameters():
        p.data.add_(1.0)  # no version counter moves
    with pytest.raises(GraftMismatchError, match="6 of 6 tensors differ"):
        graft.apply_(base)


def test_wrong_models_are_refused_and_force_overrides_values() -> None:
    base, tuned, mask, graft = made()
    with pytest.raises(GraftMismatchError, match="the model lacks parameters that the graft changes"):
        graft.apply_(nn.Linear(4, 16))
    with pytest.raises(GraftMismatchError, match=r"has shape \(8, 4\), the graft was made for \(16, 4\)"):
        graft.apply_(network(width=8), force=True)
    with pytest.raises(
        GraftMismatchError, match="has dtype torch.float64, the graft torch.float32: .*force=True"
    ):
        graft.apply_(network(dtype=torch.float64))
    other = network(3)
    before = copies(other)
    with pytest.raises(GraftMismatchError, match="4 of 6 tensors differ"):  # LayerNorms begin alike
        graft.apply_(other)
    with graft.applied(other, force=True):
        for name, p in other.named_parameters():
            assert torch.equal(p[mask[name]], tuned.get_parameter(name)[mask[name]])
    assert same(other, before)
    wide = network(dtype=torch.float64)
    with graft.applied(wide, force=True):
        name = next(n for n, c in mask.counts().items() if c)
        assert torch.equal(
            wide.get_parameter(name)[mask[name]], tuned.get_parameter(name)[mask[name]].double()
        )
    with pytest.raises(TypeError, match="model must be an nn.Module, got dict"):
        graft.apply_({})  # type: ignore[arg-type]


def test_checksums_see_every_entry_and_its_place() -> None:
    from papercore.grafting.fingerprint import checksum

    for dtype in DTYPES:
        t = torch.randn(300, 7, generator=seeded()).to(dtype)
        seen = {
            checksum(t),
            checksum(t.reshape(-1).flip(0)),
            checksum(-t),
            checksum(t[:-1]),
            checksum(torch.zeros_like(t)),
        }
        for i in range(0, t.numel(), 97):
            changed = t.clone()
            changed.view(-1)[i] = -changed.view(-1)[i]
            seen.add(checksum(changed))
            changed.view(-1)[(i + 1) % t.numel()] *= -1  # two signs
            seen.add(checksum(changed))
        assert len(seen) == 5 + 2 * len(range(0, t.numel(), 97))
        assert checksum(t.t().contiguous().t()) == checksum(t)
    long = torch.zeros((1 << 18) + 5)
    assert checksum(long) != checksum(long[:-1])
    swapped = long.clone()
    swapped[0], other = 1.0, long.clone()
    other[1 << 18] = 1.0  # the first entry of the second chunk
    assert checksum(swapped) != checksum(other)
