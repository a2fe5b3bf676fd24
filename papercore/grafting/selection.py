"""Masks of exactly k entries from one score per entry: movement, first order, random, biases.

Glossary
    score    a number per entry; the k largest over all tensors jointly (or in each tensor) are chosen
    c        -g * delta, g = d loss / d theta at theta_pre: the first-order fall of the loss when the entry moves
    k        number of entries; entries that fine-tuning did not move are never chosen

Ties are broken by the tensor's name and then by the flat index, so that the order of the tensors does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from papercore.grafting.arguments import check_choice, check_generator, entries_asked_for
from papercore.grafting.entries import write
from papercore.grafting.errors import NonFiniteError
from papercore.grafting.live import LossFn, first_order_scores
from papercore.grafting.mask import Mask
from papercore.grafting.task_vector import TaskVector

Scores = Mapping[str, Tensor] | Callable[[str], Tensor]


@torch.no_grad()
def largest(names: Sequence[str], score: Callable[[str], Tensor], k: int) -> dict[str, Tensor]:
    """Flat indices of the k largest scores over all tensors, ascending; -inf is never chosen.

    score: a name to a tensor of any shape, called up to three times a name, so that one tensor's scores are alive at
    a time. Exact, ties by name and index. Memory: O(k) a tensor.
    """
    chosen: dict[str, Tensor] = {}
    tops: list[Tensor] = []
    for name in names:
        s = score(name).reshape(-1)
        chosen[name] = torch.empty(0, dtype=torch.int64, device=s.device)
        top = torch.topk(s, min(k, s.numel()), sorted=False).values
        tops.append(top[top > -torch.inf].to(tops[0].device if tops else top.device))
    best = torch.cat(tops)
    if k < 1 or not len(best):
        return chosen
    left = min(k, len(best))
    threshold = torch.topk(best, left, sorted=False).values.min()
    del best, tops
    for name in names:
        s = score(name).reshape(-1)
        chosen[name] = (s > threshold.to(s.device)).nonzero().squeeze(1)
        left -= len(chosen[name])
    for name in sorted(names):
        if left <= 0:
            break
        s = score(name).reshape(-1)
        ties = (s == threshold.to(s.device)).nonzero().squeeze(1)[:left]
        left -= len(ties)
        chosen[name] = torch.cat([chosen[name], ties]).sort().values
    return chosen


@torch.no_grad()
def top_mask(
    scores: Scores,
    delta: object,
    *,
    k: int | None = None,
    sparsity: float | None = None,
    scope: str = "global",
) -> Mask:
    """The mask of the entries with the largest scores among those that moved.

    scores: one tensor per tensor of `delta`, of its shape, or a function from a name to it. k: number of entries, or
    sparsity: share of N. scope: "global" over all tensors jointly, as in the paper; "tensor" takes the same share of
    each tensor (floor, at least 1). Exactly k entries, ties by name and flat index. ValueError for NaN scores.
    """
    vector = TaskVector.of(delta)
    check_choice("scope", scope, ("global", "tensor"))
    count = entries_asked_for(k, sparsity, vector.total, vector.moved)

    def score(name: str) -> Tensor:
        if isinstance(scores, Mapping) and name not in scores:
            raise ValueError(f"scores have no tensor {name!r}, which the task vector has")
        found, change = scores[name] if isinstance(scores, Mapping) else scores(name), vector[name]
        if found.shape != change.shape:
            raise ValueError(
                f"scores[{name!r}] has shape {tuple(found.shape)}, delta has {tuple(change.shape)}"
            )
        if bool(found.isnan().any()):
            raise NonFiniteError(f"scores[{name!r}] has NaN entries")
        return found.to(change.dtype).masked_fill(change == 0, -torch.inf)

    if scope == "global":
        index = largest(list(vector), score, count)
    else:
        index = {}
        for name, change in vector.items():
            index.update(largest([name], score, max(1, int(round(change.numel() * count / vector.total, 6)))))
    return Mask(index, vector.shapes, base=vector.base)


def magnitude_mask(
    delta: object, *, k: int | None = None, sparsity: float | None = None, scope: str = "global"
) -> Mask:
    """The k entries that fine-tuning moved most, |delta| ("movement" in the paper).

    delta: a `TaskVector` or a dict of tensors. k: number of entries, or sparsity: share of N in (0, 1]. scope:
    "global" (the paper's) or "tensor". If fewer than k entries moved: a UserWarning and those.

    >>> import torch
    >>> magnitude_mask({"w": torch.tensor([0.1, -3.0, 0.0, 2.0])}, k=2)["w"].tolist()
    [False, True, False, True]
    """
    vector = TaskVector.of(delta)
    count = entries_asked_for(k, sparsity, vector.total, vector.moved)
    return top_mask(lambda n: vector[n].abs(), vector, k=count, scope=scope)


@torch.no_grad()
def random_mask(
    delta: object,
    *,
    k: int | None = None,
    sparsity: float | None = None,
    generator: torch.Generator | int | None = None,
) -> Mask:
    """k of the entries that moved, each set of k equally likely: the control for every other mask.

    generator: a torch.Generator (required, so that no global state is read) or an integer seed.

    >>> import torch
    >>> delta = {"w": torch.ones(100)}
    >>> random_mask(delta, k=7, generator=torch.Generator().manual_seed(0)).count
    7
    """
    vector = TaskVector.of(delta)
    generator = check_generator(generator, needed=True)
    counts = {name: int(torch.count_nonzero(t)) for name, t in vector.items()}
    moved = sum(counts.values())
    count = entries_asked_for(k, sparsity, vector.total, moved)
    ranks = _distinct(moved, count, generator)
    index, start = {}, 0
    for name, change in vector.items():
        here = ranks[(ranks >= start) & (ranks < start + counts[name])] - start
        start += counts[name]
        places = change.reshape(-1).nonzero().squeeze(1) if len(here) else here.new_empty(0)
        index[name] = places[here.to(places.device)] if len(here) else here.to(change.device)
    return Mask(index, vector.shapes, base=vector.base)


def _distinct(n: int, k: int, generator: torch.Generator) -> Tensor:
    """k different integers below n, uniformly, ascending; memory O(k), not O(n), while k is at most n / 2."""
    device = generator.device
    if 2 * k > n:
        return torch.randperm(n, generator=generator, device=device)[:k].sort().values
    found = torch.empty(0, dtype=torch.int64, device=device)
    while len(found) < k:
        more = torch.randint(n, (2 * (k - len(found)) + 16,), generator=generator, device=device)
        found = torch.cat([found, more]).unique()
    # Which of the surplus is dropped must not depend on the values.
    return found[torch.randperm(len(found), generator=generator, device=device)[:k]].sort().values


def bias_mask(delta: object) -> Mask:
    """All entries of parameters with "bias" in their name that moved: BitFit's parameters as a mask.

    ValueError if there are none.
    """
    vector = TaskVector.of(delta)
    none = {n: torch.empty(0, dtype=torch.int64, device=t.device) for n, t in vector.items()}
    index = {n: t.reshape(-1).nonzero().squeeze(1) if "bias" in n else none[n] for n, t in vector.items()}
    mask = Mask(index, vector.shapes, base=vector.base)
    if not mask.count:
        raise ValueError(f"none of the {len(vector)} tensors has 'bias' in its name and moved")
    return mask


def first_order_mask(
    model: nn.Module,
    delta: object,
    loss_fn: LossFn,
    data: Iterable[Any],
    *,
    k: int | None = None,
    sparsity: float | None = None,
    scope: str = "global",
    dropout: bool = False,
) -> Mask:
    """The k entries with the largest first-order fall of the loss, -grad * delta at theta_pre.

    One backward pass over `data` (batches for loss_fn(model, batch) -> scalar); section 2.3's dynamics thresholds
    the same product, averaged over its path. `model` holds theta_pre before and after.

    >>> import torch
    >>> from papercore.grafting import task_vector
    >>> base, tuned = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    >>> delta = task_vector(base, tuned)
    >>> first_order_mask(base, delta, lambda m, x: (m(x) - tuned(x)).square().mean(), [torch.eye(2)], k=1).count
    1
    """
    vector = TaskVector.of(delta)
    count = entries_asked_for(k, sparsity, vector.total, vector.moved)
    scores = first_order_scores(model, vector, loss_fn, data, dropout=dropout)
    return top_mask(scores, vector, k=count, scope=scope)


def paper_base(delta: object, level: float) -> Mask:
    """The base mask as the official code makes it: entries strictly above the k-th largest |delta|, so k - 1.

    level: share of N, k = int(level * N) (released scripts: 1e-7, argument default 1e-5). ValueError if k is 0.
    """
    vector = TaskVector.of(delta)
    k = entries_asked_for(None, level, vector.total, vector.moved)
    top = largest(list(vector), lambda n: vector[n].abs(), k)
    kth = min(float(vector[n].reshape(-1)[i].abs().min()) for n, i in top.items() if len(i))
    index = {n: (t.abs().reshape(-1) > kth).nonzero().squeeze(1) for n, t in vector.items()}
    return Mask(index, vector.shapes, base=vector.base)


def screen(
    model: nn.Module,
    delta: object,
    loss_fn: LossFn,
    data: Iterable[Any],
    candidates: float | int,
    *,
    least: int | None = None,
    keep: Mask | None = None,
    batches: int | None = None,
    dropout: bool = False,
) -> dict[str, Tensor]:
    """Flat indices of the entries worth learning on: half by movement, the rest by first order, one backward pass.

    candidates: a share below 1 or a number of entries. least: the mask's size, which they must exceed. keep: entries
    that are candidates in any case.
    """
    vector = TaskVector.of(delta)
    if isinstance(candidates, float):
        count = entries_asked_for(None, candidates, vector.total)
    else:
        count = entries_asked_for(candidates, None, vector.total)
    count = min(count, vector.moved)
    if least is not None and count < least:
        raise ValueError(
            f"candidates={candidates!r} leaves {count:,} entries, fewer than the {least:,} of the mask"
        )
    scores = first_order_scores(model, vector, loss_fn, data, batches=batches, dropout=dropout)
    most_moved = magnitude_mask(vector, k=max(1, count // 2))
    for name, places in most_moved.index.items():
        write(scores[name], places.to(scores[name].device), scores[name].new_full((len(places),), torch.inf))
    index = top_mask(scores, vector, k=count).index
    if keep is None:
        return index
    return {n: torch.cat([i, keep.index[n].to(i.device)]).unique() for n, i in index.items()}
