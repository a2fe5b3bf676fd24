"""Exactly k entries, without a learning rate: accumulated first-order scores under an annealed budget.

Plain straight-through top-k from the start fails on skills that need many entries to move together (a mask of k
entries chosen at theta_pre sits where the first-order picture is wrong, and the swaps after it are noise). The
budget therefore begins wide and shrinks to k.

Glossary
    q        accumulated score of an entry, q <- 0.9 q + c; c = -G delta at the hard mask of the step
    k_t      entries in the mask at step t, from `_WIDTH` k down to k over the first two thirds of the steps
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from papercore.grafting.live import LiveWeights
from papercore.grafting.scoring import Best, Scorer, Step
from papercore.grafting.selection import largest

_WIDTH = 10.0
_KEEP = 0.9


def budget(step: int, steps: int, k: int, most: int) -> int:
    """k_t: geometric from min(10 k, most) to k over the first two thirds of the steps, then k."""
    wide = min(int(_WIDTH * k), most)
    shrink = max(1, (2 * steps) // 3)
    if step >= shrink or steps < 3:
        return k
    return max(k, round(wide * (k / wide) ** (step / shrink)))


def learn_exact_k(
    weights: LiveWeights,
    scorer: Scorer,
    k: int,
    steps: int,
    callback: Callable[[Step], object] | None,
) -> tuple[Best, list[Step], dict[str, Tensor]]:
    """The mask of exactly k entries with the best score among those visited, the steps, and the scores q."""
    most = sum(int(torch.count_nonzero(change)) for change in weights.change.values())
    k = min(k, most)
    best, history = Best(), []
    _, grads = scorer.gradient("theta_pre")
    q = {n: torch.mul(g, weights.change[n]).neg_().contiguous() for n, g in grads.items()}
    del grads  # the next backward pass must not find them alive
    before: dict[str, Tensor] | None = None
    for step in range(steps):
        width = budget(step, steps, k, most)
        chosen = largest(list(q), lambda n: q[n].masked_fill(weights.change[n] == 0, -torch.inf), width)
        flips = width if before is None else _changed(before, chosen)
        before = chosen

        def on(name: str, chosen: dict[str, Tensor] = chosen) -> Tensor:
            dense = torch.zeros(q[name].shape, dtype=torch.bool, device=q[name].device)
            dense.view(-1)[chosen[name]] = True
            return dense

        weights.switch(on)
        loss, grads = scorer.gradient(f"step {step}")
        record = Step(step, loss, width, flips)
        if width == k and (flips or best.step < 0):
            scorer.rate(record, on, train=None if scorer.has_metric else -loss)
            best.offer(record, on, list(q))
        history.append(record)
        for name, s in q.items():
            s.mul_(_KEEP).sub_(grads[name].mul_(weights.change[name]))
        del grads
        if callback is not None and callback(record) is False and best.step >= 0:
            break
    return best, history, q


def _changed(before: dict[str, Tensor], now: dict[str, Tensor]) -> int:
    """Entries that are in one of two masks of indices but not in the other."""
    same = sum(int(torch.isin(before[n], now[n], assume_unique=True).sum()) for n in now)
    return sum(len(i) for i in before.values()) + sum(len(i) for i in now.values()) - 2 * same
