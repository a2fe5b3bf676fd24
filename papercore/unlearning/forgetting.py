"""Forgetting without a gradient: choose key-value pairs by how the forget set uses them, and mask them.

    usage[c, j] = number of forget examples x with j_c(x) = j                   nothing masked; one forward pass, or a log
    via activations   mask the N_a pairs of largest usage, over all codebooks   (Shah et al., 2023, section 3.1)
    via examples      mask every pair that N_e random forget examples fetch     at most N_e * C (* T tokens) pairs

Usage is taken with nothing masked, also for later requests: then the same request twice is the same mask, the order
of requests does not matter, and a log written during training serves for ever. A pair that no forget example fetches is
never masked.

`forget_until` finds N by the forget set's own training examples: the smallest share of their pairs at which at most a given share
of them is still predicted as before. It needs no test example and no retained example.

What this does: it suppresses votes in the outputs. Nothing is removed from memory (that is `erase` and `compact`), the backbone
stays as it is, and a probe may still find the class there or in the outputs: see `evaluate_unlearning`.

Different from the paper: ranking by share, count / (count + count of the rest), is offered beside ranking by count.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from papercore.unlearning.arguments import Examples, check_generator, check_integer, check_number, gather
from papercore.unlearning.bottleneck import KeyValueBottleneck
from papercore.unlearning.classifier import DKVBClassifier, bottleneck_of
from papercore.unlearning.flops import bottleneck_flops
from papercore.unlearning.lookups import LookupLog, look_up

__all__ = [
    "UnlearnReport",
    "forget_until",
    "random_pairs",
    "rank_pairs",
    "unlearn_by_activations",
    "unlearn_by_examples",
]


@dataclass
class UnlearnReport:
    """What was masked, and what it cost.

    masked          BoolTensor [C, K]: pairs of this request, whether or not an earlier one masked them too
    fresh           pairs that were not masked before
    used            pairs that the forget set fetches
    flops           of the bottleneck, forward; 0 where look-ups were logged. There is no backward pass
    backbone_flops  of the backbone, where a DKVBClassifier knows them
    seconds         all of the call
    history         of `forget_until`: (pairs, share of the forget examples still predicted as before)
    """

    masked: Tensor
    fresh: int
    used: int
    examples: int
    flops: int
    seconds: float
    backbone_flops: int = 0
    method: str = ""
    subject: str = ""
    history: list[tuple[int, float]] = field(default_factory=list)

    @property
    def backward_flops(self) -> int:
        """0: nothing is trained."""
        return 0

    def __str__(self) -> str:
        return (
            f"{self.method} masked {int(self.masked.sum()):,} of {self.masked.numel():,} pairs to suppress {self.subject or 'the forget set'} in the "
            f"outputs ({self.used:,} pairs used, {self.flops / 1e9:.3g} GFLOP, {self.seconds:.3g} s). Keys and values are still stored, and "
            "the backbone is unchanged."
        )


def unlearn_by_activations(
    model: KeyValueBottleneck | DKVBClassifier,
    forget: Examples | LookupLog,
    *,
    num_pairs: int | None = None,
    share: float | None = None,
    retain_usage: Tensor | None = None,
) -> UnlearnReport:
    """Masks the pairs that the forget set uses most.

    Args:
        model: masked in place.
        forget: features (inputs of the backbone for a DKVBClassifier), a pair (features, labels), a DataLoader of such batches,
            or a LookupLog, which costs no forward pass.
        num_pairs: N_a, over all C x K pairs. More than the forget set uses: a warning, and all that it uses.
        share: instead of num_pairs, a share (0, 1] of the pairs that the forget set uses.
        retain_usage: LongTensor [C, K] of the retained examples: rank by share of use instead of by count.

    Raises:
        ValueError: num_pairs < 1 or > C K; an empty forget set; a codebook would have no pair left (nothing is masked then).

    >>> features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    >>> model = KeyValueBottleneck(16, 8, 20, dim_key=4, dim_value=3).init_keys(features)
    >>> report = unlearn_by_activations(model, features[:10], num_pairs=25)
    >>> int(report.masked.sum()), report.fresh, report.flops
    (25, 25, 23040)
    """
    start = time.perf_counter()
    bottleneck = bottleneck_of(model)
    total = bottleneck.num_codebooks * bottleneck.num_pairs
    if (num_pairs is None) == (share is None):
        raise ValueError(
            "give either num_pairs (N_a) or share (of the pairs that the forget set uses), not both or none"
        )
    if num_pairs is not None:
        check_integer("num_pairs", num_pairs)
        if num_pairs > total:
            raise ValueError(f"num_pairs={num_pairs:,} is more than the {total:,} pairs of the bottleneck")
    log, cost = _logged(model, forget)
    backbone = _backbone_flops(model, log, forget)
    usage = log.usage()
    order, used = rank_pairs(usage, retain_usage=retain_usage)
    if share is not None:
        num_pairs = max(1, round(check_number("share", share, above=0.0, most=1.0) * used))
    assert num_pairs is not None
    if num_pairs > used:
        warnings.warn(
            f"num_pairs={num_pairs:,}, but the forget set uses {used:,} pairs: {used:,} are masked",
            stacklevel=2,
        )
    pairs = _marked(order[: min(num_pairs, used)], usage)
    name = f"unlearn_by_activations(num_pairs={min(num_pairs, used)})"
    return _mask(bottleneck, pairs, log, used, (cost, backbone), name, start)


def unlearn_by_examples(
    model: KeyValueBottleneck | DKVBClassifier,
    forget: Examples | LookupLog,
    *,
    num_examples: int,
    generator: torch.Generator | None = None,
) -> UnlearnReport:
    """Masks every pair that `num_examples` random forget examples fetch.

    Args:
        model, forget: as for `unlearn_by_activations`.
        num_examples: N_e.
        generator: of the choice; default: seeded with 0.

    Raises:
        ValueError: num_examples < 1 or more than there are; a codebook would have no pair left (nothing is masked then).
    """
    start = time.perf_counter()
    bottleneck = bottleneck_of(model)
    check_integer("num_examples", num_examples)
    draw = check_generator(generator)
    inputs: Examples | LookupLog = forget
    if not isinstance(forget, LookupLog):
        features, labels = gather("forget", forget)
        inputs = features if labels is None else (features, labels)
    count = len(inputs) if isinstance(inputs, (LookupLog, Tensor)) else len(inputs[0])  # type: ignore[index]
    if num_examples > count:
        raise ValueError(f"num_examples={num_examples:,} is more than the {count:,} forget examples")
    chosen = torch.randperm(count, generator=draw)[:num_examples]
    if isinstance(inputs, LookupLog):
        some: Examples | LookupLog = inputs.at(chosen)
    elif isinstance(inputs, Tensor):
        some = inputs[chosen.to(inputs.device)]
    else:
        some = tuple(part[chosen.to(part.device)] for part in inputs)
    log, cost = _logged(model, some)
    usage = log.usage()
    pairs = usage > 0
    name = f"unlearn_by_examples(num_examples={num_examples})"
    costs = (cost, _backbone_flops(model, log, some))
    return _mask(bottleneck, pairs, log, int(pairs.sum()), costs, name, start)


@torch.no_grad()
def forget_until(
    model: KeyValueBottleneck | DKVBClassifier,
    forget: Examples,
    *,
    target: float = 0.005,
    step: float = 0.05,
    max_examples: int = 500,
    retain_usage: Tensor | None = None,
    log: LookupLog | None = None,
    generator: torch.Generator | None = None,
) -> UnlearnReport:
    """Masks the smallest share of the forget set's pairs at which it is no longer recognised. Needs no test labels.

    In steps of `step` the most used pairs are masked, until at most `target` of the forget examples are predicted as before: as
    their label where labels are given, else as the model predicts them now.

    Args:
        model, forget, retain_usage: as for `unlearn_by_activations`; forget are training examples, with features.
        target: largest share still recognised.
        max_examples: a random part of the forget set that is looked up again at each step.
        log: the forget set's look-ups, if logged in training.

    Returns:
        UnlearnReport with `.history`, one row a step.

    Raises:
        ValueError: not even all pairs bring the share down to `target`, or a codebook would have no pair left on the way: nothing
        stays masked then, and the message gives the history.
    """
    start = time.perf_counter()
    bottleneck = bottleneck_of(model)
    check_number("target", target, least=0.0, most=1.0)
    check_number("step", step, above=0.0, most=1.0)
    check_integer("max_examples", max_examples)
    inputs, labels = gather("forget", forget)
    kept, cost = (
        _logged(model, (inputs, labels) if labels is not None else inputs) if log is None else (log, 0)
    )
    chosen = torch.randperm(len(inputs), generator=check_generator(generator))[:max_examples].to(
        inputs.device
    )
    some = inputs[chosen].to(bottleneck.keys.device)
    features = model.encode(some) if isinstance(model, DKVBClassifier) else some
    passes = len(inputs) if log is None else 0
    was_training = model.training
    model.eval()
    try:
        decode = model.decoder if isinstance(model, DKVBClassifier) else torch.nn.Identity()
        before = decode(bottleneck(features)).argmax(1)
        if labels is not None:
            before = labels[chosen.to(labels.device)].to(before.device)
        usage = kept.usage()
        order, used = rank_pairs(usage, retain_usage=retain_usage)
        old = bottleneck.mask.clone()
        history: list[tuple[int, float]] = []
        try:
            for k in range(round(1 / step + 1) + 1):
                count = min(used, round(k * step * used))
                pairs = _marked(order[:count], usage).to(old.device)
                if bool((old | pairs).all(1).any()) and not bottleneck.abstain:
                    break
                bottleneck.mask.copy_(old | pairs)
                left = float((decode(bottleneck(features)).argmax(1) == before).double().mean())
                cost += bottleneck_flops(bottleneck, len(features))
                history.append((count, left))
                if left <= target or count == used:
                    break
        finally:
            # Tried masks leave no trace; the one that is chosen goes through the log.
            bottleneck.mask.copy_(old)
    finally:
        model.train(was_training)
    if not history or history[-1][1] > target:
        raise ValueError(
            f"no mask brings the share of recognised forget examples down to {target:g}; (pairs, share) so far: {history}"
        )
    name = f"forget_until(target={target:g}, pairs={history[-1][0]})"
    pairs = _marked(order[: history[-1][0]], usage)
    backbone = getattr(model, "backbone_flops", 0) * (passes + len(features))
    report = _mask(bottleneck, pairs, kept, used, (cost, backbone), name, start)
    report.history = history
    return report


def rank_pairs(usage: Tensor, *, retain_usage: Tensor | None = None) -> tuple[Tensor, int]:
    """Flat numbers of all pairs, the one to mask first in front, and how many of them are used at all.

    By count; with retain_usage by usage / (usage + retain_usage), then by count. Ties go to the lower number.

    >>> rank_pairs(torch.tensor([[0, 3], [5, 1]]))
    (tensor([2, 1, 3, 0]), 3)
    >>> rank_pairs(torch.tensor([[0, 3], [5, 1]]), retain_usage=torch.tensor([[9, 1], [5, 0]]))
    (tensor([3, 1, 2, 0]), 3)
    """
    flat = usage.flatten()
    order = flat.argsort(descending=True, stable=True)
    if retain_usage is not None:
        if retain_usage.shape != usage.shape:
            raise ValueError(
                f"retain_usage has the shape {tuple(retain_usage.shape)}, expected [C, K] = {list(usage.shape)}"
            )
        rest = retain_usage.flatten().to(flat.device)
        part = flat.double() / (flat + rest).clamp(min=1)
        order = order[part[order].argsort(descending=True, stable=True)]
    return order, int((flat > 0).sum())


def random_pairs(pairs: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """`count` random ones of the marked pairs [C, K]: the control for a mask of equal size."""
    places = pairs.flatten().nonzero().flatten()
    if check_integer("count", count) > len(places):
        raise ValueError(f"count={count:,} is more than the {len(places):,} marked pairs")
    chosen = torch.randperm(len(places), generator=check_generator(generator))[:count].to(places.device)
    return _marked(places[chosen], pairs)


def _marked(flat: Tensor, like: Tensor) -> Tensor:
    pairs = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    pairs[flat] = True
    return pairs.view(like.shape)


def _logged(
    model: KeyValueBottleneck | DKVBClassifier, forget: Examples | LookupLog
) -> tuple[LookupLog, int]:
    """Unmasked look-ups, and the operations of the bottleneck that they cost."""
    bottleneck = bottleneck_of(model)
    if isinstance(forget, LookupLog):
        if forget.num_pairs != bottleneck.num_pairs or forget.indices.shape[-1] != bottleneck.num_codebooks:
            raise ValueError(
                f"the log has {forget.indices.shape[-1]} codebooks of {forget.num_pairs} pairs, the model {bottleneck.num_codebooks} of "
                f"{bottleneck.num_pairs}: look the examples up again with this model"
            )
        if len(forget) == 0:
            raise ValueError("forget is empty: expected at least one example")
        return forget, 0
    inputs, labels = gather("forget", forget)
    log = look_up(model, inputs if labels is None else (inputs, labels))
    tokens = log.indices[0].numel() // bottleneck.num_codebooks
    return log, bottleneck_flops(bottleneck, len(log), read=False, tokens=tokens)


def _backbone_flops(model: object, log: LookupLog, forget: object) -> int:
    return 0 if isinstance(forget, LookupLog) else len(log) * getattr(model, "backbone_flops", 0)


def _mask(
    bottleneck: KeyValueBottleneck,
    pairs: Tensor,
    log: LookupLog,
    used: int,
    cost: tuple[int, int],
    method: str,
    start: float,
) -> UnlearnReport:
    subject = f"{len(log):,} examples"
    if log.labels is not None:
        classes = log.labels.unique().tolist()
        named = ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")
        subject += f" of class{'es' if len(classes) > 1 else ''} {named}"
    fresh = bottleneck.mask_pairs(pairs, by=method, subject=subject)
    if not bool(fresh.any()):
        warnings.warn(
            f"all {int(pairs.sum()):,} pairs of this request are masked already: nothing changed",
            stacklevel=3,
        )
    return UnlearnReport(
        masked=pairs.to(bottleneck.mask.device),
        fresh=int(fresh.sum()),
        used=used,
        examples=len(log),
        flops=cost[0],
        backbone_flops=cost[1],
        seconds=time.perf_counter() - start,
        method=method,
        subject=subject,
    )
