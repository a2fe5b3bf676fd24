"""Top-k masks against a plain sort, the random mask against its distribution, the first-order mask against enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from papercore.grafting import (
    NonFiniteError,
    bias_mask,
    first_order_mask,
    first_order_scores,
    magnitude_mask,
    paper_base,
    random_mask,
    task_vector,
    top_mask,
)
from tests.grafting.reference import Quadratic, batches, copies, exact_loss, finetuned, network, same, seeded


def delta_of(seed: int, *, zeros: float = 0.3, levels: int | None = None) -> dict[str, Tensor]:
    """Random changes; some are exactly zero, and with `levels` many are equal in size."""
    generator = seeded(seed)
    made = {}
    for name, shape in {"b": (4, 5), "a": (7,), "c": (2, 3, 2)}.items():
        t = torch.randn(shape, generator=generator)
        if levels:
            t = (t * levels).round() / levels
        made[name] = t.masked_fill(torch.rand(shape, generator=generator) < zeros, 0.0)
    return made


def sorted_choice(delta: dict[str, Tensor], k: int) -> set[tuple[str, int]]:
    rows = [(-abs(float(v)), n, i) for n, t in delta.items() for i, v in enumerate(t.reshape(-1)) if v != 0]
    return {(n, i) for _, n, i in sorted(rows)[:k]}


@pytest.mark.parametrize("levels", [None, 1, 2])
@pytest.mark.parametrize("k", [1, 2, 7, 15, 20])
def test_global_top_k_equals_a_sort(levels: int | None, k: int) -> None:
    for seed in range(5):
        delta = delta_of(seed, levels=levels, zeros=0.1)
        moved = sum(int((t != 0).sum()) for t in delta.values())
        if k > moved:
            continue
        mask = magnitude_mask(delta, k=k)
        assert mask.count == k
        assert {(n, i) for n, at in mask.index.items() for i in at.tolist()} == sorted_choice(delta, k)
        turned = {n: delta[n] for n in sorted(delta, reverse=True)}
        again = magnitude_mask(turned, k=k)
        assert all(torch.equal(again[n], mask[n]) for n in delta)


def test_per_tensor_and_global_agree_for_one_tensor() -> None:
    delta = {"w": delta_of(3)["b"]}
    assert magnitude_mask(delta, k=6, scope="tensor") == magnitude_mask(delta, k=6)
    per = magnitude_mask(delta_of(4, zeros=0.0), sparsity=0.5, scope="tensor")
    assert per.counts() == {"b": 9, "a": 3, "c": 5}  # of 20, 7 and 12 the share 19 / 39
    with pytest.raises(ValueError, match="scope='layer' is not one of 'global', 'tensor'"):
        magnitude_mask(delta, k=6, scope="layer")


def test_more_entries_than_moved_warns_and_gives_fewer() -> None:
    delta = {"w": torch.tensor([0.0, 1.0, 0.0, -2.0])}
    with pytest.warns(
        UserWarning, match="3 entries were asked for, but fine-tuning moved 2 of N=4: the mask has 2"
    ):
        mask = magnitude_mask(delta, k=3)
    assert mask["w"].tolist() == [False, True, False, True]


def test_how_many_is_said_once_and_properly() -> None:
    delta = {"w": torch.ones(100)}
    assert magnitude_mask(delta, sparsity=0.29).count == 29  # 0.29 * 100 is 28.999999999999996
    assert magnitude_mask(delta, sparsity=1.0).count == 100
    with pytest.raises(ValueError, match="sparsity 0.001 of N=100 selects 0 parameters; use k="):
        magnitude_mask(delta, sparsity=1e-3)
    with pytest.raises(ValueError, match=r"sparsity=5 must be a share in \(0, 1\], not a percentage"):
        magnitude_mask(delta, sparsity=5)
    with pytest.raises(ValueError, match=r"give either k .* or sparsity"):
        magnitude_mask(delta)
    with pytest.raises(ValueError, match=r"give either k .* or sparsity"):
        magnitude_mask(delta, k=3, sparsity=0.1)
    with pytest.raises(ValueError, match="k=101 is more than the N=100 entries"):
        magnitude_mask(delta, k=101)
    with pytest.raises(ValueError, match="k=0 must be an integer >= 1"):
        magnitude_mask(delta, k=0)
    with pytest.raises(TypeError, match="k must be an integer, got 2.5"):
        magnitude_mask(delta, k=2.5)  # type: ignore[arg-type]


def test_scores_are_checked() -> None:
    delta = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match="scores have no tensor 'w'"):
        top_mask({}, delta, k=1)
    with pytest.raises(ValueError, match=r"scores\['w'\] has shape \(2,\), delta has \(3,\)"):
        top_mask({"w": torch.ones(2)}, delta, k=1)
    with pytest.raises(NonFiniteError, match=r"scores\['w'\] has NaN entries"):
        top_mask({"w": torch.tensor([1.0, torch.nan, 0.0])}, delta, k=1)


@pytest.mark.parametrize("k", [3, 9])
def test_random_masks_choose_each_moved_entry_equally_often(k: int) -> None:
    delta = {"a": torch.tensor([1.0, 0.0, 2.0, 3.0]), "b": torch.ones(2, 4), "c": torch.zeros(3)}
    draws, moved = 600, 11
    generator = seeded(7)
    counts = {n: torch.zeros(t.shape) for n, t in delta.items()}
    for _ in range(draws):
        mask = random_mask(delta, k=k, generator=generator)
        assert mask.count == k
        for n in counts:
            counts[n] += mask[n]
    share, spread = k / moved, math.sqrt(k / moved * (1 - k / moved) / draws)
    for n, t in delta.items():
        assert bool((counts[n][t == 0] == 0).all())
        # 5 standard deviations on 11 entries: a false alarm in 150,000
        assert float((counts[n][t != 0] / draws - share).abs().max() if bool(t.any()) else 0.0) < 5 * spread


def test_random_masks_follow_the_generator_alone() -> None:
    delta = {"w": torch.ones(1000)}
    state = torch.get_rng_state()
    first, second = (random_mask(delta, k=20, generator=seeded(3)) for _ in range(2))
    assert first == second == random_mask(delta, k=20, generator=3)
    assert first != random_mask(delta, k=20, generator=seeded(4))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match="generator must be a torch.Generator"):
        random_mask(delta, k=20)


def test_biases() -> None:
    base = network()
    mask = bias_mask(task_vector(base, finetuned(base)))
    assert mask.counts() == {
        "0.weight": 0,
        "0.bias": 16,
        "1.weight": 0,
        "1.bias": 16,
        "4.weight": 0,
        "4.bias": 3,
    }
    with pytest.raises(ValueError, match="none of the 1 tensors has 'bias' in its name and moved"):
        bias_mask({"w": torch.ones(2)})


def test_the_papers_base_keeps_one_entry_less() -> None:
    delta = {"a": torch.tensor([5.0, -4.0, 3.0, 2.0, 1.0]), "b": torch.tensor([6.0, 0.5, 0.2, 0.1, 0.0])}
    mask = paper_base(delta, 0.4)  # int(0.4 * 10) = 4, strictly above the fourth largest
    assert mask["a"].tolist() == [True, True, False, False, False]
    assert mask["b"].tolist() == [True, False, False, False, False]
    with pytest.raises(ValueError, match="sparsity 1e-07 of N=10 selects 0 parameters"):
        paper_base(delta, 1e-7)


def test_first_order_scores_are_minus_gradient_times_delta() -> None:
    base = network(dtype=torch.float64)
    tuned = finetuned(base)
    delta = task_vector(base, tuned)
    data = batches(dtype=torch.float64)
    before = copies(base)
    scores = first_order_scores(base, delta, exact_loss, data)
    assert same(base, before)
    total = sum((exact_loss(base, b) for b in data), torch.zeros(())) / len(data)
    for (name, p), grad in zip(
        base.named_parameters(), torch.autograd.grad(total, list(base.parameters())), strict=True
    ):
        torch.testing.assert_close(scores[name], -grad * delta[name])
        assert p.grad is None


@pytest.mark.parametrize("seed", range(4))
def test_first_order_mask_is_the_optimum_of_a_linear_loss(seed: int) -> None:
    generator = seeded(seed)
    slope, change = (torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(2))
    base, tuned = Quadratic(torch.zeros(12, dtype=torch.float64)), Quadratic(change)
    delta = task_vector(base, tuned)
    for k in (1, 4, 8):
        mask = first_order_mask(base, delta, lambda m, _: (slope * m.theta).sum(), [None], k=k)
        best = min(itertools.combinations(range(12), k), key=lambda c: float((slope * change)[list(c)].sum()))
        assert tuple(mask.index["theta"].tolist()) == best
