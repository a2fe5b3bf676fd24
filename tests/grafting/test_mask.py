"""Masks as sorted indices against dense boolean tensors."""

from __future__ import annotations

import pytest
import torch

from papercore.grafting import GraftMismatchError, Mask, intersection, magnitude_mask, task_vector, union
from tests.grafting.reference import finetuned, network, seeded

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}


def dense(seed: int, density: float = 0.4) -> dict[str, torch.Tensor]:
    generator = seeded(seed)
    return {n: torch.rand(s, generator=generator) < density for n, s in SHAPES.items()}


def test_dense_and_back() -> None:
    wanted = dense(0)
    mask = Mask.of(wanted)
    assert all(torch.equal(mask[n], wanted[n]) for n in SHAPES)
    assert mask.count == sum(int(t.sum()) for t in wanted.values())
    assert mask.total == 12 + 5 + 8
    assert mask.sparsity == mask.count / 25
    assert mask == wanted
    assert mask != dense(1)
    assert Mask.of({n: t.float() for n, t in wanted.items()}) == mask


@pytest.mark.parametrize("seed", range(5))
def test_algebra_equals_that_of_dense_masks(seed: int) -> None:
    x, y, z = dense(seed), dense(seed + 10), dense(seed + 20, 0.05)
    a, b, c = Mask.of(x), Mask.of(y), Mask.of(z)
    for result, rule in ((a | b, torch.logical_or), (a & b, torch.logical_and), (a ^ b, torch.logical_xor)):
        assert all(torch.equal(result[n], rule(x[n], y[n])) for n in SHAPES)
    assert all(torch.equal((a - b)[n], x[n] & ~y[n]) for n in SHAPES)
    assert a | a == a
    assert a | b == b | a
    assert (a | b) | c == a | (b | c)
    assert union({"x": a, "y": b, "z": c}) == a | b | c
    assert intersection([a, b, c]) == a & b & c
    assert a | y == a | b  # a dense mask on the right


def test_refusals() -> None:
    mask = Mask.of(dense(0))
    with pytest.raises(
        ValueError, match=r"mask\['a'\] has values other than 0 and 1: round a soft mask first"
    ):
        Mask.of({"a": torch.tensor([0.5, 1.0])})
    with pytest.raises(TypeError, match="a mask must be a Mask or a dict of bool tensors, got int"):
        Mask.of(3)
    with pytest.raises(KeyError, match="'z' is not among the 3 tensors of this mask"):
        mask["z"]
    with pytest.raises(ValueError, match=r"the masks differ in shape at a: \(3, 4\) and \(4, 3\)"):
        _ = mask | {"a": torch.ones(4, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match="masks is empty: give at least one mask"):
        union([])
    with pytest.raises(TypeError, match="got a single mask"):
        union(mask)


def test_masks_of_two_bases_do_not_combine() -> None:
    masks = []
    for seed in (0, 1):
        base = network(seed)
        masks.append(magnitude_mask(task_vector(base, finetuned(base)), k=5))
    with pytest.raises(
        GraftMismatchError, match="the masks belong to different bases: their 0.weight differs"
    ):
        _ = masks[0] | masks[1]
