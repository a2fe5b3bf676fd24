"""When does an entry come on? The paper's update seen as one equation per entry.

While sigmoid(S - b) is small, its derivative is e^(S - b), and with a constant c = -G delta an entry obeys
dS/dt = lr c e^(S - b): it blows up at t = e^(b - S_0) / (lr c). So after T steps the mask holds the entries with

    c > e^(b - S_0) / (lr T)                                                                               (3)

a threshold on first-order saliency with a factor of up to e of noise from S_0; lr T is the knob of the density.
`critical_rate` replaces the continuous limit by the recursion itself, which for few steps matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from papercore.grafting.arguments import check_integer, check_number


def threshold(lr: float, steps: int, *, bias: float = 10.0, start: float = 0.5) -> float:
    """Law (3): the smallest c that is on after `steps` updates, for an entry that starts at S_0 = `start`.

    >>> round(threshold(1e7, 100), 8)
    1.336e-05
    """
    check_integer("steps", steps)
    return math.exp(bias - start) / (check_number("lr", lr, above=0.0) * steps)


def comes_on(pace: float, steps: int, *, bias: float = 10.0, start: float = 0.5) -> bool:
    """Is S > b after `steps` updates of S <- S + pace sigmoid'(S - b)? pace = lr c."""
    s = start
    for _ in range(steps):
        gate = 1 / (1 + math.exp(bias - s)) if bias - s < 700 else 0.0
        s += pace * gate * (1 - gate)
        if s > bias:
            return True
    return False


def critical_rate(steps: int, *, bias: float = 10.0, start: float = 0.5) -> float:
    """The smallest lr c that brings an entry on within `steps` updates, by bisection on the recursion."""
    check_integer("steps", steps)
    if start >= bias:
        return 0.0
    low, high = 0.0, 8.0 * math.exp(bias - start) + 4 * (bias - start)
    while not comes_on(high, steps, bias=bias, start=start):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if comes_on(middle, steps, bias=bias, start=start) else (middle, high)
    return high


def rate_for(
    scores: Mapping[str, Tensor], starts: Mapping[str, Tensor], k: int, steps: int, bias: float = 10.0
) -> float:
    """The lr at which law (3), with constant c and these S_0, has k entries on after half of the `steps` updates.

    Half, because c falls as entries come on; learning stops at k entries, so coming early costs nothing. scores: c by tensor. starts: S_0. ValueError if no entry has c > 0, so that no rate would bring one on.
    """
    tops = []
    for name, c in scores.items():
        # c e^(S_0 - 1/2): entries come on in this order
        eager = (c * torch.exp(starts[name] - 0.5)).reshape(-1)
        tops.append(torch.topk(eager, min(k, eager.numel()), sorted=False).values.double().cpu())
    best = torch.cat(tops)
    best = best[best > 0]
    if not len(best):
        raise ValueError(
            "no entry of delta lowers the loss to first order (-grad * delta <= 0 everywhere): lr='auto' has nothing to "
            "aim at; check loss_fn, or give lr"
        )
    kth = float(torch.topk(best, min(k, len(best)), sorted=False).values.min())
    return critical_rate((steps + 1) // 2, bias=bias) / kth
