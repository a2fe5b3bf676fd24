"""How much the regions of several tasks have in common, beside what chance would give.

Glossary
    o_ij       containment |gamma_i and gamma_j| / |gamma_j|: the share of j's region that lies inside i's
    iou        |gamma_i and gamma_j| / |gamma_i or gamma_j|
    lift       o_ij / s_i with s_i = |gamma_i| / N: 1 for independent masks, whatever their sizes
    chance     s_i, what o_ij would be for independent masks
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from papercore.grafting.arguments import check_choice
from papercore.grafting.fingerprint import combine
from papercore.grafting.mask import Mask, listed

KINDS = ("containment", "iou", "lift")


def overlap(masks: Iterable[object] | Mapping[str, object], *, kind: str = "containment") -> Tensor:
    """The overlap of each pair of masks: float64 [T, T], row i and column j as in the glossary.

    masks: T masks (or dicts of bool tensors), a list or a dict by task. kind: "containment" (the paper's, not
    symmetric: |i and j| / |j|), "iou", or "lift" (containment over the chance level s_i; its diagonal is 1 / s_i). An
    overlap with an empty mask is NaN. Raises ValueError for masks of other tensors or bases.

    >>> import torch
    >>> a, b = {"w": torch.tensor([1, 1, 0, 0]) == 1}, {"w": torch.tensor([0, 1, 0, 0]) == 1}
    >>> overlap([a, b]).tolist(), overlap([a, b], kind="lift").tolist()
    ([[1.0, 1.0], [0.5, 1.0]], [[2.0, 2.0], [2.0, 4.0]])
    """
    check_choice("kind", kind, KINDS)
    parts = _alike(masks)
    size = len(parts)
    both = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        both[i, i] = parts[i].count
        for j in range(i):
            both[i, j] = both[j, i] = (parts[i] & parts[j]).count
    counts = both.diagonal().clone()
    if kind == "iou":
        return both / (counts[:, None] + counts[None, :] - both)
    contained = both / counts[None, :]
    if kind == "containment":
        return contained
    return contained / (counts[:, None] / parts[0].total)


def chance_overlap(masks: Iterable[object] | Mapping[str, object]) -> Tensor:
    """s_i, float64 [T]: what row i of the containment matrix would be for independent masks."""
    return torch.tensor([m.sparsity for m in _alike(masks)], dtype=torch.float64)


def _alike(masks: object) -> list[Mask]:
    """Masks with the same tensors and base, else ValueError."""
    parts = listed(masks)
    for number, part in enumerate(parts[1:], start=1):
        if part.shapes != parts[0].shapes:
            odd = sorted(set(part.shapes.items()) ^ set(parts[0].shapes.items()))[:3]
            raise ValueError(f"mask {number} is of other tensors than mask 0: {odd}")
    combine([m.base for m in parts], "masks")
    return parts
