"""Several grafts as one: where two of them claim the same entry, somebody must decide.

Masks of one delta never conflict (the union of their regions is a graft that is good at all their tasks). Grafts of separately fine-tuned models do: Localize-and-Stitch (He et al., 2024) averages over the tasks
that claim an entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from papercore.grafting.arguments import check_choice
from papercore.grafting.fingerprint import combine

if TYPE_CHECKING:
    from papercore.grafting.graft import Graft

POLICIES = ("mean", "first", "last", "error")


def stitch(grafts: Iterable[Graft] | Mapping[str, Graft], *, collisions: str = "mean") -> Graft:
    """One graft with the entries of all.

    grafts: a list or a dict by task, of the same base. collisions: what an entry gets that several grafts claim with
    different values: "mean" of them (for one base, the mean of the deltas), "first" or "last" in order, or "error".
    Raises ValueError for an unknown policy, an empty list, other shapes, and for collisions under "error";
    GraftMismatchError for grafts of different bases.
    """
    from papercore.grafting.graft import Graft

    check_choice("collisions", collisions, POLICIES)
    parts = _listed(grafts)
    shapes = _shapes(parts)
    index: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name in shapes:
        here = [g for g in parts if name in g.index]
        device, dtype = here[0].values[name].device, here[0].values[name].dtype
        places = torch.cat([g.index[name].to(device) for g in here])
        claims = torch.cat([g.values[name].to(device, dtype) for g in here])
        union, slot = places.unique(return_inverse=True)
        # Claims in order: a stable sort by slot keeps the order of the grafts within an entry.
        order = slot.argsort(stable=True)
        counts = torch.bincount(slot, minlength=len(union))
        ends = counts.cumsum(0)
        first, last = claims[order[ends - counts]], claims[order[ends - 1]]
        differing = torch.zeros(len(union), dtype=torch.int64, device=device)
        same = differing.index_add_(0, slot, (claims != first[slot]).long()) == 0
        if collisions == "error" and not bool(same.all()):
            raise ValueError(
                f"{int((~same).sum())} entries of {name} have different values in the grafts: use "
                "stitch(grafts, collisions='mean' or 'first' or 'last')"
            )
        if collisions == "mean":
            wide = torch.promote_types(dtype, torch.float32)
            total = torch.zeros(len(union), dtype=wide, device=device).index_add_(0, slot, claims.to(wide))
            merged = torch.where(same, first, (total / counts).to(dtype))
        else:
            merged = last if collisions == "last" else first
        index[name], values[name] = union, merged
    return Graft(index, values, shapes, base=combine([g.base for g in parts], "grafts"))


def collisions(grafts: Iterable[Graft] | Mapping[str, Graft]) -> int:
    """The number of entries that two or more grafts claim with different values."""
    parts = _listed(grafts)
    total = 0
    for name in _shapes(parts):
        here = [g for g in parts if name in g.index]
        if len(here) < 2:
            continue
        device, dtype = here[0].values[name].device, here[0].values[name].dtype
        places = torch.cat([g.index[name].to(device) for g in here])
        claims = torch.cat([g.values[name].to(device, dtype) for g in here])
        union, slot = places.unique(return_inverse=True)
        first = torch.empty(len(union), dtype=dtype, device=device)
        first[slot] = claims  # any one of the claims will do
        odd = torch.zeros(len(union), dtype=torch.int64, device=device)
        total += int((odd.index_add_(0, slot, (claims != first[slot]).long()) > 0).sum())
    return total


def shared(first: Graft, second: Graft) -> Graft:
    """The entries that both grafts hold; ValueError if a value differs."""
    from papercore.grafting.graft import Graft

    base = combine([first.base, second.base], "grafts")
    index: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name in _shapes([first, second]):
        if name not in first.index or name not in second.index:
            continue
        mine, theirs = first.index[name], second.index[name].to(first.index[name].device)
        in_both = torch.isin(mine, theirs, assume_unique=True)
        index[name], values[name] = mine[in_both], first.values[name][in_both]
        other = second.values[name].to(values[name].device)[torch.isin(theirs, mine, assume_unique=True)]
        if not torch.equal(values[name], other):
            raise ValueError(
                f"the grafts have different values at shared entries of {name}: intersect their masks instead"
            )
    return Graft(index, values, {n: first.shapes[n] for n in index}, base=base)


def _listed(grafts: object) -> list[Graft]:
    from papercore.grafting.graft import Graft

    if isinstance(grafts, Mapping):
        grafts = list(grafts.values())
    if isinstance(grafts, Graft) or not isinstance(grafts, Iterable):
        raise TypeError(f"grafts must be a list of grafts or a dict by task, got {type(grafts).__name__}")
    parts = list(grafts)
    if not parts:
        raise ValueError("grafts is empty: give at least one graft")
    for part in parts:
        if not isinstance(part, Graft):
            raise TypeError(f"grafts must be a list of grafts, it holds a {type(part).__name__}")
    return parts


def _shapes(parts: list[Graft]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        for name, shape in part.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(f"the grafts differ in shape at {name}: {shapes[name]} and {shape}")
    return shapes
