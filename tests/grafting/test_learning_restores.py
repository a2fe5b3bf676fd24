"""Learning a mask leaves the model as it was, also when interrupted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papercore.grafting import (
    learn_mask,
    task_vector,
)
from tests.grafting.reference import (
    batches,
    copies,
    finetuned,
    loss,
    network,
    same,
)


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
