"""Accuracy against sparsity from one score, and the dense path between the two models as its control.

Masks of growing size from one score are nested, so a curve writes each entry once: the model grows from theta_pre by the
entries that each point adds, and is theta_pre again at the end.

Glossary
    k, s      entries of a point's mask, and their share of N
    alpha     coefficient of the dense interpolation theta_pre + alpha delta (WiSE-FT, Wortsman et al., 2022)
    rel       value / value at theta_ft
    gain      (value - value at theta_pre) / (value at theta_ft - value at theta_pre)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from papercore.grafting.arguments import check_integer, check_number, share_of
from papercore.grafting.live import live
from papercore.grafting.selection import top_mask
from papercore.grafting.task_vector import TaskVector


@dataclass(frozen=True)
class CurvePoint:
    """One mask of a curve: k entries, their share of N, and the metric."""

    k: int
    sparsity: float
    value: float

    def rel(self, finetuned: float) -> float:
        """The share of the fine-tuned model's value: flatters tasks on which theta_pre is good already."""
        return self.value / finetuned

    def gain(self, pretrained: float, finetuned: float) -> float:
        """The share of the improvement that is kept."""
        return (self.value - pretrained) / (finetuned - pretrained)


def sparsity_curve(
    model: nn.Module,
    delta: object,
    scores: Mapping[str, Tensor],
    metric: Callable[[Any], Any],
    sparsities: Iterable[float] | None = None,
    *,
    ks: Iterable[int] | None = None,
) -> list[CurvePoint]:
    """metric(model) at the masks of the k largest scores, for several k: one ranking, nested masks.

    model: holds theta_pre before and after. scores: one tensor per tensor of delta (|delta|, `first_order_scores`,
    ...); entries with the score -inf or without movement are never chosen. metric(model) -> number. sparsities: shares
    of N, or ks: numbers of entries; in any order. Cost: one ranking, then O(k) writes and one call of metric a point.

    Values are theta_pre + delta, rounded once, where a `Graft` copies theta_ft: equal but for the last bit.

    >>> import torch
    >>> base, tuned = torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(3, 1, bias=False)
    >>> from papercore.grafting import task_vector
    >>> delta = task_vector(base, tuned)
    >>> moved = {n: t.abs() for n, t in delta.items()}
    >>> distance = lambda m: (m.weight - tuned.weight).detach().norm()
    >>> [point.k for point in sparsity_curve(base, delta, moved, distance, ks=[1, 3])]
    [1, 3]
    """
    vector = TaskVector.of(delta)
    if (sparsities is None) == (ks is None):
        raise ValueError(
            "give either sparsities (shares of the entries) or ks (numbers of entries), not both or none"
        )
    if ks is not None:
        sizes = [check_integer("ks", k) for k in ks]
    else:
        assert sparsities is not None
        sizes = [share_of(s, vector.total) for s in sparsities]
    if not sizes:
        raise ValueError("sparsities is empty: give at least one point")
    order = sorted(set(sizes))
    found: dict[int, CurvePoint] = {}
    widest = top_mask(scores, vector, k=order[-1])
    names = sorted(widest.index)  # ties by name and flat index, as in `top_mask`
    device = vector[names[0]].device
    ranked = torch.cat([scores[n].reshape(-1)[widest.index[n]].to(device).double() for n in names])
    place = torch.empty(len(ranked), dtype=torch.int64, device=device)
    place[ranked.argsort(descending=True, stable=True)] = torch.arange(len(ranked), device=device)
    places = dict(zip(names, place.split([len(widest.index[n]) for n in names]), strict=True))
    with live(model, vector, index=widest.index) as weights, torch.no_grad():
        for k in order:

            def on(name: str, k: int = k) -> Tensor:
                return (places[name] < k).to(weights.change[name].device)

            weights.switch(on)
            held = min(k, widest.count)
            found[k] = CurvePoint(held, held / vector.total, float(metric(model)))
    return [found[k] for k in sizes]


@contextmanager
def interpolated(model: nn.Module, delta: object, alpha: float) -> Iterator[nn.Module]:
    """The model at theta_pre + alpha * delta inside the block, theta_pre afterwards, bit for bit.

    WiSE-FT's path: the dense analogue of equation (1) with one coefficient for all entries, and the control for claims
    about calibration and robustness. alpha: 0 is theta_pre, 1 theta_ft up to rounding; beyond 1 extrapolates.
    """
    factor = check_number("alpha", alpha)
    with live(model, delta) as weights:
        if factor != 0:
            weights.mix(factor)
        yield model


def interpolation_curve(
    model: nn.Module, delta: object, metric: Callable[[Any], Any], alphas: Iterable[float]
) -> list[tuple[float, float]]:
    """(alpha, metric(model)) along theta_pre + alpha * delta."""
    wanted = [check_number("alphas", a) for a in alphas]
    points = []
    with live(model, delta) as weights, torch.no_grad():
        for alpha in wanted:
            weights.mix(alpha) if alpha != 0 else weights.restore()
            points.append((alpha, float(metric(model))))
    return points
