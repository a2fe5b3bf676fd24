"""From the starting weights and the log to the trained weights: no data, no forward pass, no random state.

exact=True repeats the additions of the run, perturbations included, so their rounding repeats as well and the
result has the same bits, in every dtype and mode. exact=False makes the updates alone, many steps to a pass:
several times faster, and equal to within what the perturbations' rounding added up to, which is little in
float32 and much in half precision (a run in exact mode has none of it).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor, nn

from papercore.mezo.history import gradient_terms
from papercore.mezo.log import Base, Retreat, ZOLog
from papercore.mezo.moves import Moves, decay_factor
from papercore.mezo.noise import MissingBackend, resolve_backend
from papercore.mezo.weights import Bucket, Terms, Weights

Model = TypeVar("Model")
_TERMS_PER_PASS = 32


class AnotherBase(ValueError):
    """The weights to start from are not those that the run started from."""


def replay(
    model: Model,
    log: ZOLog,
    steps: int | None = None,
    *,
    exact: bool = True,
    start: int = 0,
    backend: str | None = None,
) -> Model:
    """Brings `model` from the starting weights to step `steps` of the run, in place, and returns it.

    model: the nn.Module that the run started from, or its list of parameters in the optimiser's order. steps:
    how far, None for the whole log. start: the step at which the model stands already (0: the base, whose
    checksum is verified). backend: None for the one of the run. Cost: 2n + 1 passes over the weights a step,
    one in exact mode; 1/32 with exact=False and plain SGD.

    Raises AnotherBase (a ValueError) if names, shapes, dtypes or contents differ from the run's start: the
    model is then left as it was. ValueError for steps outside the log, TypeError for a wrong kind.

    >>> import copy, torch
    >>> from papercore.mezo import MeZO
    >>> model = torch.nn.Linear(4, 2); base = copy.deepcopy(model)
    >>> optimizer = MeZO(model.named_parameters(), lr=1e-2)
    >>> for _ in range(3):
    ...     _ = optimizer.step(lambda: (model(torch.ones(4)) ** 2).sum())
    >>> torch.equal(replay(base, optimizer.log).weight, model.weight)
    True
    """
    if not isinstance(log, ZOLog):
        raise TypeError(f"log must be a ZOLog, got {type(log).__name__}: read a file with ZOLog.load(path)")
    end = _step("steps", len(log) if steps is None else steps, len(log))
    begin = _step("start", start, end)
    if log.base is None:
        if end:
            raise ValueError("the log has no starting weights to compare with")
        return model
    weights = _weights(model, log.base)
    if begin == 0:
        verify(weights, log.base)
    chosen = _backend(backend or log.rule.backend, weights)
    if exact:
        _repeat(weights, log, begin, end, chosen)
    else:
        _updates_alone(weights, log, begin, end, chosen)
    return model


def base_of(weights: Weights) -> Base:
    """The fingerprint of starting weights: their table and checksums."""
    return Base(tuple(weights.table), weights.checksum(), weights.checksum(trained=False))


def verify(weights: Weights, base: Base) -> None:
    """Raises AnotherBase unless the weights hold what the run started from."""
    if weights.checksum() != base.checksum:
        raise AnotherBase(
            "the trained parameters do not hold the values that the run started from (their checksums differ): "
            "load the base model, not a fine-tuned one"
        )
    if (
        len(weights.all_tensors) == len(base.table)
        and weights.checksum(trained=False) != base.frozen_checksum
    ):
        raise AnotherBase(
            "the frozen parameters differ from those of the run: the log belongs to another base model"
        )


def _step(name: str, value: object, last: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}") from None
    if not 0 <= number <= last:
        raise ValueError(f"{name}={number} is outside 0 .. {last} (the log has steps 0 .. {last})")
    return number


def _backend(name: str, weights: Weights) -> str:
    try:
        for tensor in weights.tensors:
            resolve_backend(name, tensor.device)
    except MissingBackend:
        return "auto"  # the log comes from another kind of machine
    return name


def _weights(model: object, base: Base) -> Weights:
    """The model's parameters matched with the table of the log, or AnotherBase with the first difference."""
    if isinstance(model, nn.Module):
        named = list(model.named_parameters())
    elif isinstance(model, Iterable) and not isinstance(model, (dict, str, Tensor)):
        named = [(f"parameter {i}", p) for i, p in enumerate(model)]
        if not all(isinstance(p, Tensor) for _, p in named):
            raise TypeError(
                "model must be an nn.Module or a list of parameters; the list holds something else"
            )
    else:
        raise TypeError(f"model must be an nn.Module or a list of parameters, got {type(model).__name__}")
    table = list(base.table)
    if isinstance(model, nn.Module) and all(row.name for row in table):
        have = dict(named)
        missing = [row.name for row in table if row.name not in have and row.trained]
        if missing:
            raise AnotherBase(
                f"the model has no parameter {missing[0]!r}, which the run trained ({len(missing)} missing)"
            )
        table = [row for row in table if row.name in have]
        named = [(row.name, have[row.name]) for row in table]
    elif len(named) != len(table):
        # Frozen parameters may be absent on either side; the trained ones decide.
        table = [row for row in table if row.trained]
        if len(named) != len(table):
            named = [(name, p) for name, p in named if p.requires_grad]
        if len(named) != len(table):
            raise AnotherBase(
                f"the run trained {len(table)} parameters, the model has {len(named)} that require a gradient: freeze the "
                "same ones, or make the optimizer from model.named_parameters() so that the log knows their names"
            )
    for row, (name, tensor) in zip(table, named, strict=True):
        if tuple(tensor.shape) != row.shape or str(tensor.dtype) != f"torch.{row.dtype}":
            raise AnotherBase(
                f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; the run had "
                f"{row.name or 'there'} with shape {row.shape} and dtype torch.{row.dtype}"
            )
    entries = [
        (row.name or name, p, row.group, row.decays) for row, (name, p) in zip(table, named, strict=True)
    ]
    return Weights(entries, trained=[row.trained for row in table])


def _repeat(weights: Weights, log: ZOLog, begin: int, end: int, backend: str) -> None:
    """The same additions in the same order. In exact mode the visits leave no trace and are left out."""
    moves = Moves(weights, log, backend)
    flushes = set(log.flushes)
    retreats: dict[int, list[Retreat]] = {}
    for retreat in log.retreats if not moves.exact else ():
        retreats.setdefault(retreat.step, []).append(retreat)
    # What happened between the last step and the next belongs to the whole run, not to a part of it.
    for step in range(begin, end + (end == len(log))):
        if step in flushes and step > begin:
            moves.back()
        for retreat in retreats.get(step, ()):
            for move in range(retreat.moves):
                moves.visit(step, move // 2, 1.0 if move % 2 == 0 else -1.0, retreat.settings)
            moves.back()
        if step == end:
            break
        if not moves.exact:
            settings = log.settings(step)
            for draw in range(settings.draws):
                moves.visit(step, draw, 1.0, settings)
                moves.visit(step, draw, -1.0, settings)
        moves.finish(step)
    moves.back()


def _updates_alone(weights: Weights, log: ZOLog, begin: int, end: int, backend: str) -> None:
    """theta <- c theta - lr g, many steps in a pass: each step's terms are scaled by the later decays."""
    if log.rule.momentum or log.rule.betas:
        moves = Moves(weights, log, backend)
        for step in range(begin, end):
            moves.finish(step)
            moves.back()
        return
    step = begin
    while step < end:
        last, count = step, 0
        while last < end and (count == 0 or count + log.settings(last).draws <= _TERMS_PER_PASS):
            count += log.settings(last).draws
            last += 1

        def terms_of(bucket: Bucket, first: int = step, last: int = last) -> tuple[float, Terms]:
            scale, terms = 1.0, []
            for at in range(last - 1, first - 1, -1):
                if log.is_skipped(at):
                    continue
                group = log.settings(at).groups[bucket.group]
                terms += gradient_terms(log, at, bucket.group, -group.lr * scale)
                scale *= decay_factor(bucket, group)
            return scale, terms

        weights.add(terms_of, dist=log.rule.dist, backend=backend)
        step = last
