"""Unions of grafts and stitched models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from papercore.grafting import (
    Graft,
    GraftMismatchError,
    Mask,
    random_mask,
    task_vector,
    union,
)
from tests.grafting.reference import copies, finetuned, made, network, same


def test_the_union_of_masks_is_the_patches_in_any_order() -> None:
    base, tuned, _, _ = made()
    delta = task_vector(base, tuned)
    masks = [random_mask(delta, k=60, generator=s) for s in range(3)]
    grafts = [Graft.from_mask(tuned, m) for m in masks]
    joined = Graft.from_mask(tuned, union(masks))
    assert grafts[0] | grafts[1] | grafts[2] == joined == grafts[2] | grafts[0] | grafts[1]
    assert grafts[0] & grafts[1] == Graft.from_mask(tuned, masks[0] & masks[1])
    assert (grafts[0] | grafts[0]) == grafts[0]
    with joined.applied(base):
        wanted = copies(base)
    for order in ((0, 1, 2), (2, 0, 1)):
        model = network()
        for i in order:
            grafts[i].apply_(model)
        assert same(model, wanted)


def dense_stitch(base: nn.Module, models: list[nn.Module], masks: list[Mask], rule: str) -> dict[str, Tensor]:
    """Entry by entry in plain loops."""
    result = {}
    for name, p in base.named_parameters():
        out = p.detach().clone().view(-1)
        for i in range(out.numel()):
            claims = [
                m.get_parameter(name).view(-1)[i]
                for m, k in zip(models, masks, strict=True)
                if bool(k[name].view(-1)[i])
            ]
            if claims:
                out[i] = {
                    "mean": torch.stack(claims).sum() / len(claims),
                    "first": claims[0],
                    "last": claims[-1],
                }[rule]
        result[name] = out.view(p.shape)
    return result


@pytest.mark.parametrize("rule", ["mean", "first", "last"])
def test_stitching_models_of_different_deltas(rule: str) -> None:
    from papercore.grafting import collisions, stitch

    base = network()
    models = [finetuned(base, s) for s in (1, 2, 3)]
    masks = [random_mask(task_vector(base, m), k=70, generator=s) for s, m in enumerate(models)]
    grafts = [Graft.from_mask(m, k) for m, k in zip(models, masks, strict=True)]
    shared = sum(int((sum(k[n].int() for k in masks) > 1).sum()) for n in masks[0])  # type: ignore[union-attr,arg-type]
    assert collisions(grafts) == shared > 10
    with stitch(grafts, collisions=rule).applied(base):
        after = copies(base)
    wanted = dense_stitch(base, models, masks, rule)
    for name in wanted:
        torch.testing.assert_close(after[name], wanted[name], rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"entries of .* have different values in the grafts: use stitch"):
        _ = grafts[0] | grafts[1]
    with pytest.raises(ValueError, match="the grafts have different values at shared entries of"):
        _ = grafts[0] & grafts[1]
    apart = Graft.from_mask(models[1], masks[1] - masks[0])
    assert collisions([grafts[0], apart]) == 0
    assert stitch([grafts[0], apart], collisions=rule) == grafts[0] | apart


def test_stitching_refusals() -> None:
    from papercore.grafting import stitch

    _, _, _, graft = made()
    other = network(5)
    odd = Graft.from_mask(
        finetuned(other), random_mask(task_vector(other, finetuned(other)), k=9, generator=1)
    )
    with pytest.raises(
        GraftMismatchError, match="the grafts belong to different bases: their 0.weight differs"
    ):
        stitch([graft, odd])
    with pytest.raises(ValueError, match="collisions='sum' is not one of 'mean', 'first', 'last', 'error'"):
        stitch([graft], collisions="sum")
    with pytest.raises(ValueError, match="grafts is empty"):
        stitch([])
    with pytest.raises(TypeError, match="it holds a int"):
        stitch([graft, 3])  # type: ignore[list-item]
    assert stitch({"only": graft}) == graft
