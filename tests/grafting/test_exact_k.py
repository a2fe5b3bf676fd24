"""Masks of exactly k entries against enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from papercore.grafting import (
    first_order_mask,
    learn_mask,
    task_vector,
)
from tests.grafting.reference import (
    Quadratic,
    batches,
    loss,
    network,
    seeded,
    trained,
)


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
