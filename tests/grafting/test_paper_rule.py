"""The paper's rule against its published loop and closed forms."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papercore.grafting import (
    learn_mask,
    random_mask,
    task_vector,
)
from papercore.grafting.law import comes_on, critical_rate, threshold
from papercore.grafting.paper_rule import soft
from tests.grafting.reference import (
    OfficialLoop,
    Quadratic,
    accuracy,
    batches,
    exact_loss,
    finetuned,
    loss,
    network,
    seeded,
    trained,
)


def drawn(delta: Any, seed: int) -> dict[str, Tensor]:
    """S_0 as learn_mask draws it."""
    generator = seeded(seed)
    return {n: torch.rand(t.shape, generator=generator).to(t.dtype) for n, t in delta.items()}


@pytest.mark.parametrize(("level", "lr"), [(None, 3e5), (0.05, 3e5), (0.3, 3e6)])
def test_masks_are_those_of_the_official_loop(level: float | None, lr: float) -> None:
    base = network(dtype=torch.float64)
    data, val = batches(dtype=torch.float64), batches(2, seed=9, dtype=torch.float64)
    tuned = trained(base, data)
    delta = task_vector(base, tuned)
    start = None
    if level is not None:
        sizes = torch.cat([t.abs().reshape(-1) for t in delta.values()])
        kth = sizes.topk(int(level * delta.total)).values[-1]
        start = {n: t.abs() > kth for n, t in delta.items()}
    official = OfficialLoop(copy.deepcopy(base), base, tuned, list(delta), logits=drawn(delta, 3), base=start)
    wanted = official.run(exact_loss, accuracy, data, val, lr=lr, steps=30)
    found = learn_mask(
        base,
        delta,
        exact_loss,
        data,
        val=val,
        metric=accuracy,
        lr=lr,
        steps=30,
        base=level,
        generator=seeded(3),
    )
    assert 0 < found.mask.count < delta.total
    assert found.mask != (start or found.mask - found.mask)  # something was learned
    assert found.mask == wanted
    for n, s in zip(delta, official.logits, strict=True):
        on = torch.round(torch.sigmoid(s - 10.0)) == 1
        assert torch.equal(on if start is None else on ^ start[n], found.mask[n])


def test_one_update_is_the_gradient_of_the_soft_graft() -> None:
    base = network(dtype=torch.float64)
    tuned = finetuned(base)
    delta = task_vector(base, tuned)
    data = batches(dtype=torch.float64)
    start = random_mask(delta, k=40, generator=2)
    bias, lr = 0.7, 0.3  # so that sigmoid' is not tiny

    def total(*logits: Tensor) -> Tensor:
        weights = {
            n: p.detach() + soft(s, start[n], bias) * delta[n]
            for (n, p), s in zip(base.named_parameters(), logits, strict=True)
        }
        values = [
            nn.functional.cross_entropy(torch.func.functional_call(base, weights, (x,)), y) for x, y in data
        ]
        return torch.stack(values).mean()

    logits = [s.requires_grad_() for s in drawn(delta, 5).values()]
    grads = torch.autograd.grad(total(*logits), logits)
    found = learn_mask(
        base, delta, exact_loss, data, base=start, bias=bias, lr=lr, steps=1, generator=seeded(5)
    )
    for s, grad, moved in zip(logits, grads, found.scores.values(), strict=True):
        torch.testing.assert_close(moved, s.detach() - lr * grad, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(total, logits)


def test_soft_mask_is_an_exclusive_or() -> None:
    base = torch.tensor([True, False, True, False])
    assert soft(torch.full((4,), -200.0), base, 10.0).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert soft(torch.full((4,), 200.0), base, 10.0).tolist() == [0.0, 1.0, 0.0, 1.0]
    logits = torch.rand(1000, generator=seeded())
    on = torch.rand(1000, generator=seeded(1)) < 0.5
    gamma = soft(logits, on, 10.0)
    assert (
        4.5e-5 < float((gamma - on.float()).abs().min()) <= float((gamma - on.float()).abs().max()) < 1.24e-4
    )
    torch.testing.assert_close(soft(logits, None, 10.0), torch.sigmoid(logits - 10))
    logits.requires_grad_()
    (slope,) = torch.autograd.grad(soft(logits, on, 10.0).sum(), logits)
    assert torch.equal(slope.sign(), 1 - 2 * on.float())


def test_a_linear_loss_follows_the_scalar_recursion_and_law_3() -> None:
    size, steps, lr = 400, 25, 1e7
    generator = seeded(4)
    c = torch.exp(torch.empty(size, dtype=torch.float64).uniform_(-16, -4, generator=generator))
    base, tuned = (
        Quadratic(torch.zeros(size, dtype=torch.float64)),
        Quadratic(torch.ones(size, dtype=torch.float64)),
    )
    delta = task_vector(base, tuned)
    found = learn_mask(
        base, delta, lambda m, _: -(c * m.theta).sum(), [None], lr=lr, steps=steps, generator=seeded(6)
    )
    starts = drawn(delta, 6)["theta"]
    wanted = [comes_on(lr * float(ci), steps, start=float(si)) for ci, si in zip(c, starts, strict=True)]
    assert 20 < sum(wanted) < size - 20
    assert found.mask["theta"].tolist() == wanted
    # Law (3) is the continuous limit: the recursion needs up to about half as much again at 25 steps.
    pace = c * lr * steps / torch.exp(10 - starts)
    on = found.mask["theta"]
    assert bool(on[pace > 1.6].all()) and not bool(on[pace < 1].any())


def test_the_critical_rate_tends_to_law_3() -> None:
    for start in (0.0, 0.5, 1.0):
        limit = math.exp(10 - start)
        ratios = [critical_rate(steps, start=start) * steps / limit for steps in (1, 10, 100, 1000)]
        assert ratios[1] > ratios[2] > ratios[3] > 1.0  # the recursion lags behind its limit
        assert ratios[-1] == pytest.approx(1.0, abs=0.02)
    assert threshold(1e7, 10, start=0.0) == pytest.approx(math.exp(10) / 1e8)
    with pytest.raises(ValueError, match="lr=0 must be finite and > 0"):
        threshold(0.0, 10)


@pytest.mark.parametrize("k", [3, 20, 60])
def test_auto_rate_fills_the_mask_whatever_the_scale_of_the_loss(k: int) -> None:
    base = network()
    data = batches()
    tuned = trained(base, data)
    delta = task_vector(base, tuned)
    masks = []
    for scale in (1.0, 1e-4, 1e4):
        found = learn_mask(
            base, delta, lambda m, b, scale=scale: scale * loss(m, b), data, sparsity=(k + 0.5) / delta.total
        )
        assert found.mask.count <= k
        assert max(step.count for step in found.history) >= 0.5 * k
        assert found.lr is not None
        masks.append((found.mask, found.lr * scale))
    assert masks[0][1] == pytest.approx(masks[1][1], rel=1e-3)
    assert (masks[0][0] & masks[1][0]).count >= 0.9 * masks[0][0].count


@pytest.mark.parametrize("rule", ["paper", "topk"])
@pytest.mark.parametrize("lr", [None, 1e9])
def test_sparsity_caps_the_mask_under_every_rule(rule: str, lr: float | None) -> None:
    base = network()
    data = batches()
    delta = task_vector(base, trained(base, data))
    for sparsity in (0.01, 0.05, 0.3):
        cap = int(sparsity * delta.total)
        found = learn_mask(
            base,
            delta,
            loss,
            data,
            rule=rule,
            sparsity=sparsity,
            steps=20,
            lr=lr if rule == "paper" else None,
        )
        assert 0 < found.mask.count <= cap
        assert all(step.count <= cap for step in found.history) or rule == "topk"
        if rule == "topk":
            assert found.mask.count == cap


def test_a_rate_that_is_too_large_keeps_those_that_came_first() -> None:
    size = 30
    c = torch.linspace(1, 3, size, dtype=torch.float64)
    base, tuned = (
        Quadratic(torch.zeros(size, dtype=torch.float64)),
        Quadratic(torch.ones(size, dtype=torch.float64)),
    )
    delta = task_vector(base, tuned)
    found = learn_mask(
        base, delta, lambda m, _: -(c * m.theta).sum(), [None], lr=1e8, steps=9, sparsity=0.2, generator=3
    )
    assert len(found.history) == 1  # everything comes on at once
    eager = c * torch.exp(drawn(delta, 3)["theta"])
    first = learn_mask(base, delta, lambda m, _: -(c * m.theta).sum(), [None], lr=1e8, steps=1, generator=3)
    assert first.mask.count == size
    assert found.mask.index["theta"].tolist() == sorted(eager.topk(6).indices.tolist())


def test_the_step_with_the_best_score_is_kept_and_the_first_of_equals() -> None:
    base = network()
    data, val = batches(), batches(2, seed=11)
    delta = task_vector(base, trained(base, data))
    found = learn_mask(base, delta, loss, data, val=val, metric=accuracy, lr=1e5, steps=40)
    scored = [step for step in found.history if step.score is not None]
    assert len(scored) > 3
    assert all(step.score == pytest.approx(step.train + step.held_out) for step in scored)
    best = max(scored, key=lambda step: (step.score, -step.step))
    assert (found.best_step, found.train, found.held_out) == (best.step, best.train, best.held_out)
    assert found.mask.count == best.count
    assert all(step.score is None for step in found.history if step.flips == 0 and step.step > 0)
    # The score is that of the rounded mask.
    with torch.no_grad():
        for n, p in base.named_parameters():
            p.copy_(torch.where(found.mask[n], p + delta[n], p))
    assert found.train == pytest.approx(sum(accuracy(base, b) for b in data) / len(data))
