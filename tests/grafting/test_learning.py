"""The paper's rule against its published loop and closed forms, exact k against enumeration, and what is left untouched."""

from __future__ import annotations

import copy
import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papercore.grafting import (
    GraftMismatchError,
    Mask,
    NonFiniteError,
    first_order_mask,
    learn_mask,
    magnitude_mask,
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


# ---- the paper's rule


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


# ---- exactly k


@pytest.mark.parametrize("coupling", [0.3, 1.0, 3.0])
def test_exact_k_is_within_5_percent_of_the_optimum_of_a_quadratic(coupling: float) -> None:
    n, k = 12, 4
    for seed in range(3):
        generator = seeded(seed)
        root, aim = torch.randn(n, n, generator=generator), torch.randn(n, generator=generator)
        curvature = (torch.eye(n) + coupling * root @ root.T / n).double()
        aim = aim.double()

        def value(theta: Tensor, aim: Tensor = aim, curvature: Tensor = curvature) -> Tensor:
            return 0.5 * (theta - aim) @ curvature @ (theta - aim)

        def at(chosen: Any, aim: Tensor = aim) -> float:
            theta = torch.zeros_like(aim)
            theta[list(chosen)] = aim[list(chosen)]
            return float(value(theta))

        base, tuned = Quadratic(torch.zeros_like(aim)), Quadratic(aim)
        delta = task_vector(base, tuned)
        found = learn_mask(
            base, delta, lambda m, _: value(m.theta), [None], rule="topk", sparsity=k / n, steps=100
        )
        assert found.mask.count == k
        reached = at(found.mask.index["theta"].tolist())
        optimum = min(at(c) for c in itertools.combinations(range(n), k))
        assert reached <= 1.05 * optimum
        assert reached <= at(
            first_order_mask(base, delta, lambda m, _: value(m.theta), [None], k=k).index["theta"].tolist()
        )
        assert found.train == pytest.approx(-reached)


def test_the_budget_shrinks_to_k() -> None:
    base = network()
    data = batches()
    delta = task_vector(base, trained(base, data))
    found = learn_mask(base, delta, loss, data, rule="topk", sparsity=5.5 / delta.total, steps=30)
    counts = [step.count for step in found.history]
    assert counts[0] == 50 and counts == sorted(counts, reverse=True) and counts[20:] == [5] * 10
    with pytest.raises(ValueError, match="rule='topk' learns exactly k entries: give sparsity="):
        learn_mask(base, delta, loss, data, rule="topk")
    with pytest.raises(ValueError, match="rule='topk' has no learning rate"):
        learn_mask(base, delta, loss, data, rule="topk", sparsity=0.1, lr=1.0)


# ---- candidates, data, randomness


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


# ---- what is left untouched


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["paper", "topk"])
@pytest.mark.parametrize("candidates", [None, 0.5])
@pytest.mark.parametrize("stop_at", [None, 1, 4, 11])
def test_the_model_is_as_before_also_after_an_interrupt(
    dtype: torch.dtype, rule: str, candidates: float | None, stop_at: int | None
) -> None:
    base = network(dtype=dtype, dropout=0.5)
    base.append(nn.BatchNorm1d(3, dtype=dtype))
    data = batches(dtype=dtype)
    tuned = finetuned(base)
    delta = task_vector(base, tuned, select="^(0|4)")
    base.train()
    base[1].eval()
    base[0].bias.requires_grad_(False)
    base[4].weight.grad = torch.ones_like(base[4].weight)
    before, state, calls = copies(base), torch.get_rng_state(), 0

    def fragile(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        assert not any(m.training for m in model.modules())
        if calls == stop_at:
            raise Interrupted
        torch.rand(1)  # draws from the global state, which must not show afterwards
        return loss(model, batch)

    options: dict[str, Any] = {"rule": rule, "sparsity": 0.2, "candidates": candidates, "steps": 4}
    if stop_at is None:
        learn_mask(base, delta, fragile, data, **options)
    else:
        with pytest.raises(Interrupted):
            learn_mask(base, delta, fragile, data, **options)
    assert same(base, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in base] == [True, False, True, True, True, True]
    assert not base[0].bias.requires_grad and base[0].weight.requires_grad
    assert torch.equal(base[4].weight.grad, torch.ones_like(base[4].weight))
    assert base[0].weight.grad is None
    assert not base[4].weight._post_accumulate_grad_hooks


def test_training_mode_can_be_left_on() -> None:
    base = network(dropout=0.5)
    base.append(nn.BatchNorm1d(3))
    delta = task_vector(base, finetuned(base))
    before, modes = copies(base), []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        modes.append(model.training)
        return loss(model, batch)

    learn_mask(base, delta, watched, batches(), lr=1e8, steps=2, dropout=True)
    assert all(modes)
    assert same(base, before)  # the running statistics too


def test_weights_of_any_stride() -> None:
    base = network()
    base[4].weight = nn.Parameter(base[4].weight.detach().t().contiguous().t())
    assert not base[4].weight.is_contiguous()
    plain = copy.deepcopy(base)
    plain[4].weight = nn.Parameter(plain[4].weight.detach().contiguous())
    data = batches()
    for candidates in (None, 0.5):
        masks = []
        for model in (base, plain):
            before = copies(model)
            delta = task_vector(model, finetuned(model))
            masks.append(
                learn_mask(model, delta, loss, data, sparsity=0.1, candidates=candidates, steps=20).mask
            )
            assert same(model, before)
        assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


# ---- refusals


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
