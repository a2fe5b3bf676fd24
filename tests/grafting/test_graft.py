"""Grafts: bit-exact on both sides of the mask, in and out any number of times."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from papercore.grafting import (
    Graft,
    GraftMismatchError,
    Mask,
)
from tests.grafting.reference import DTYPES, batches, copies, made, same


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_inside_the_mask_fine_tuned_outside_pretrained_to_the_bit(dtype: torch.dtype, strided: bool) -> None:
    base, tuned, mask, graft = made(dtype)
    if strided:
        for model in (base, tuned):
            model[4].weight = nn.Parameter(model[4].weight.detach().t().contiguous().t())
    before = copies(base)
    handle = graft.apply_(base)
    for name, p in base.named_parameters():
        assert torch.equal(p[mask[name]], tuned.get_parameter(name)[mask[name]])
        assert torch.equal(p[~mask[name]], before[name][~mask[name]])
    assert not same(base, before)
    handle.remove()
    assert same(base, before)


def test_the_whole_mask_is_the_fine_tuned_model() -> None:
    base, tuned, _, _ = made()
    everything = Mask.of({n: torch.ones_like(p, dtype=torch.bool) for n, p in base.named_parameters()})
    before = copies(base)
    with Graft.from_mask(tuned, everything, pretrained=base).applied(base):
        assert same(base, copies(tuned))
    assert same(base, before)
    with pytest.raises(ValueError, match="the mask is empty: nothing to graft"):
        Graft.from_mask(tuned, everything - everything)


def test_in_and_out_any_number_of_times_also_from_a_file(tmp_path: Path) -> None:
    base, _, _, graft = made(torch.bfloat16)
    before = copies(base)
    graft.save(tmp_path / "skill.safetensors")
    loaded = Graft.load(tmp_path / "skill.safetensors")
    assert loaded == graft and len(loaded) == len(graft) == 20
    assert loaded.fingerprint == graft.fingerprint is not None
    for patch in (graft, loaded, graft, loaded):
        handle = patch.apply_(base)
        assert not same(base, before)
        handle.remove()
        assert same(base, before)


def test_sparse_and_dense_give_the_same_outputs() -> None:
    base, tuned, mask, graft = made()
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in dense.named_parameters():
            p.copy_(torch.where(mask[name], tuned.get_parameter(name), p))
    x, _ = batches()[0]
    with graft.applied(base) as model:
        assert torch.equal(model(x), dense(x))


def test_a_mask_without_a_base_takes_it_from_the_pretrained_model() -> None:
    base, tuned, mask, graft = made()
    plain = {n: mask[n] for n in mask}
    assert Graft.from_mask(tuned, plain).base is None
    assert Graft.from_mask(tuned, plain, pretrained=base).base == graft.base
    assert Graft.from_mask(tuned.state_dict(), mask, pretrained=base.state_dict()) == graft
    with pytest.raises(
        GraftMismatchError, match="pretrained is not the base that the mask was made for: 0.weight differs"
    ):
        Graft.from_mask(tuned, mask, pretrained=tuned)
    with pytest.raises(ValueError, match="finetuned lacks 2 tensors of the mask: 0.weight, 0.bias"):
        Graft.from_mask(nn.Identity(), {n: mask[n] for n in ("0.weight", "0.bias")})
    with pytest.raises(
        ValueError, match=r"finetuned has other shapes than the mask: 0.bias: \(3,\) instead of \(16,\)"
    ):
        Graft.from_mask({"0.bias": torch.ones(3)}, {"0.bias": torch.ones(16, dtype=torch.bool)})
