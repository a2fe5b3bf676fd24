"""Learning a mask: candidates, data, randomness, what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papercore.grafting import (
    GraftMismatchError,
    Mask,
    NonFiniteError,
    learn_mask,
    magnitude_mask,
    random_mask,
    task_vector,
)
from tests.grafting.reference import (
    Quadratic,
    accuracy,
    batches,
    copies,
    exact_loss,
    finetuned,
    loss,
    network,
    same,
    seeded,
    trained,
)


def drawn(delta: Any, seed: int) -> dict[str, Tensor]:
    """S_0 as learn_mask draws it."""
    generator = seeded(seed)
    return {n: torch.rand(t.shape, generator=generator).to(t.dtype) for n, t in delta.items()}


@pytest.mark.parametrize("rule", ["paper", "topk"])
def test_with_all_moved_entries_as_candidates_nothing_changes(rule: str) -> None:
    base = network(dtype=torch.float64)
    data = batches(dtype=torch.float64)
    delta = task_vector(base, trained(base, data))
    options: dict[str, Any] = {"rule": rule, "sparsity": 0.1, "steps": 15}
    if rule == "paper":
        options["lr"] = 1e5
    full = learn_mask(base, delta, exact_loss, data, **options)
    screened = learn_mask(base, delta, exact_loss, data, candidates=delta.moved, **options)
    if rule == "topk":
        assert screened.mask == full.mask
        assert [s.loss for s in screened.history] == pytest.approx([s.loss for s in full.history])
    else:  # S_0 is drawn for each candidate, here in the same order
        assert screened.mask == full.mask


def test_masks_stay_inside_the_candidates() -> None:
    base = network()
    data = batches()
    delta = task_vector(base, trained(base, data))
    found = learn_mask(base, delta, loss, data, sparsity=0.05, candidates=0.2)
    inside = Mask.of({n: s > -torch.inf for n, s in found.scores.items()})
    assert inside.count == int(0.2 * delta.total)
    assert (found.mask - inside).count == 0
    most_moved = magnitude_mask(delta, k=inside.count // 2)
    assert (most_moved - inside).count == 0
    start = random_mask(delta, k=3, generator=1)
    kept = learn_mask(base, delta, loss, data, lr=1e7, candidates=0.1, base=start, steps=5)
    assert (start - Mask.of({n: s > -torch.inf for n, s in kept.scores.items()})).count == 0
    with pytest.raises(ValueError, match="candidates=3 leaves 3 entries, fewer than the 8 of the mask"):
        learn_mask(base, delta, loss, data, sparsity=0.05, candidates=3)


def test_at_most_so_many_batches_an_update() -> None:
    base = network()
    data = batches(6)
    delta = task_vector(base, finetuned(base))
    seen: list[int] = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        seen.append(next(i for i, b in enumerate(data) if b is batch))
        return loss(model, batch)

    learn_mask(base, delta, counted, data, lr=1e8, steps=2, batches=4, metric=accuracy)
    assert seen == [0, 1, 2, 3] * 2


def test_the_same_generator_gives_the_same_mask() -> None:
    base = network()
    data = batches()
    delta = task_vector(base, trained(base, data))
    first, second, other = (
        learn_mask(base, delta, loss, data, lr=1e5, steps=10, generator=seeded(s)).mask for s in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_another_base_is_refused() -> None:
    base = network()
    tuned = finetuned(base)
    delta = task_vector(base, tuned)
    with pytest.raises(
        GraftMismatchError,
        match="the task vector was made for another base, 6 of 6 tensors differ: 0.weight: other values",
    ):
        learn_mask(tuned, delta, loss, batches())
    with pytest.raises(
        GraftMismatchError, match="the model lacks parameters that the task vector has: 1.weight"
    ):
        learn_mask(nn.Sequential(nn.Linear(4, 16)), delta, loss, batches())
    with torch.no_grad():
        base[4].bias[0] += 1e-3
    with pytest.raises(GraftMismatchError, match="1 of 6 tensors differ: 4.bias"):
        learn_mask(base, delta, loss, batches())


def test_losses_that_are_not_finite_are_named() -> None:
    base = network()
    delta = task_vector(base, finetuned(base))
    before = copies(base)
    calls = 0

    def breaking(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(model, batch) * (torch.nan if calls == 8 else 1.0)

    with pytest.raises(NonFiniteError, match="the loss is nan at step 2, batch 1"):
        learn_mask(base, delta, breaking, batches(), lr=1e5, metric=accuracy)
    with pytest.raises(NonFiniteError, match="the gradient of 0.weight is not finite at step 0"):
        learn_mask(base, delta, lambda m, b: (m[0].weight * 0).sqrt().sum() + loss(m, b), batches(), lr=1e5)
    assert same(base, before)


def test_what_cannot_work_is_refused_with_advice() -> None:
    base = network()
    delta = task_vector(base, finetuned(base))
    data = batches()
    with pytest.raises(
        TypeError,
        match=re.escape("data is one tuple, which may be a single batch: give a list of batches, [batch]"),
    ):
        learn_mask(base, delta, loss, data[0])
    with pytest.raises(TypeError, match="data is an iterator, which is empty after one step"):
        learn_mask(base, delta, loss, iter(data))
    with pytest.raises(ValueError, match="data holds no batches"):
        learn_mask(base, delta, loss, [], lr=1e5)
    with pytest.raises(ValueError, match="rule='l0' is not one of 'paper', 'topk'"):
        learn_mask(base, delta, loss, data, rule="l0")
    with pytest.raises(ValueError, match="lr='auto' needs a sparsity to aim at"):
        learn_mask(base, delta, loss, data, lr="auto")
    with pytest.raises(ValueError, match="lr='fast' is not one of 'auto'"):
        learn_mask(base, delta, loss, data, lr="fast")
    with pytest.raises(ValueError, match="sparsity 0.0001 of N=163 selects 0 parameters; use k="):
        learn_mask(base, delta, loss, data, sparsity=1e-4)
    with pytest.raises(ValueError, match="steps=0 must be an integer >= 1"):
        learn_mask(base, delta, loss, data, steps=0)
    with pytest.raises(ValueError, match="the loss at step 0, batch 0 does not depend on the parameters"):
        learn_mask(base, delta, lambda m, b: torch.zeros(()), data, lr=1e5)
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar, got shape \(8, 3\)"):
        learn_mask(base, delta, lambda m, b: m(b[0]), data, lr=1e5)
    with pytest.raises(TypeError, match="loss_fn must return a scalar tensor, got float"):
        learn_mask(base, delta, lambda m, b: 1.0, data, lr=1e5)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="the base mask has 9 entries, more than the 8 that sparsity allows"):
        learn_mask(base, delta, loss, data, sparsity=0.05, base=magnitude_mask(delta, k=9))
    with pytest.raises(ValueError, match="no entry of delta lowers the loss to first order"):
        rising = task_vector(Quadratic(torch.zeros(3)), Quadratic(torch.ones(3)))
        learn_mask(Quadratic(torch.zeros(3)), rising, lambda m, b: m.theta.sum(), [None], sparsity=0.5)
    with pytest.raises(TypeError, match="model must be an nn.Module, got list"):
        learn_mask([], delta, loss, data)  # type: ignore[arg-type]


def test_rates_that_do_nothing_or_too_much_warn() -> None:
    base = network(width=80)
    data = batches()
    delta = task_vector(base, trained(base, data))
    with pytest.warns(UserWarning, match="no entry changed in 5 steps at lr=1: the mask is the base mask"):
        found = learn_mask(base, delta, loss, data, lr=1.0, steps=5)
    assert found.mask.count == 0
    flat, target = Quadratic(torch.zeros(2000)), Quadratic(torch.ones(2000))
    with pytest.warns(UserWarning, match="the mask grew to 2,000 entries, more than half of them, at lr=1e"):
        learn_mask(flat, task_vector(flat, target), lambda m, _: -m.theta.sum(), [None], lr=1e6, steps=3)


def test_the_callback_sees_each_step_and_may_stop() -> None:
    base = network()
    data = batches()
    delta = task_vector(base, trained(base, data))
    seen = []

    def watch(step: Any) -> bool:
        seen.append(step.step)
        return step.step < 4

    found = learn_mask(base, delta, loss, data, lr=1e6, steps=50, callback=watch)
    assert seen == [0, 1, 2, 3, 4] and len(found.history) == 5
