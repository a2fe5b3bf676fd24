"""Scores of rounded masks while a mask is learned, and the best of them.

The official code keeps the step whose rounded mask has the best metric on the training examples plus the
development examples; so do we, with minus the loss where no metric is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from papercore.grafting.errors import NonFiniteError
from papercore.grafting.live import LiveWeights, LossFn, Metric


@dataclass
class Step:
    """One update: loss of the mixed weights, entries in the rounded mask, entries that changed, and its score.

    score = train + held_out; None where the mask was the same as before and was not scored again.
    """

    step: int
    loss: float
    count: int
    flips: int
    score: float | None = None
    train: float | None = None
    held_out: float | None = None


@dataclass
class Best:
    """The rounded mask with the best score so far: positions of its entries by tensor."""

    score: float = float("-inf")
    step: int = -1
    train: float | None = None
    held_out: float | None = None
    on: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, record: Step, on: Callable[[str], Tensor], names: Iterable[str]) -> bool:
        """Takes the mask if its score is strictly better: of equal ones the first is kept."""
        if record.score is None or not record.score > self.score:
            return False
        self.score, self.step = record.score, record.step
        self.train, self.held_out = record.train, record.held_out
        self.on = {n: on(n).reshape(-1).nonzero().squeeze(1) for n in names}
        return True


class Scorer:
    """Loss, gradient and score at masks, on one set of data."""

    def __init__(
        self,
        weights: LiveWeights,
        loss_fn: LossFn,
        metric: Metric | None,
        data: Iterable[Any],
        val: Iterable[Any] | None,
        batches: int | None,
    ) -> None:
        self.weights, self.loss_fn, self.data, self.val, self.batches = weights, loss_fn, data, val, batches
        self.metric: Metric = (
            metric if metric is not None else (lambda model, batch: -float(loss_fn(model, batch)))
        )
        self.has_metric = metric is not None

    def gradient(self, where: str) -> tuple[float, dict[str, Tensor]]:
        """Mean loss and gradient at the weights as they stand."""
        return self.weights.gradient(self.loss_fn, self.data, batches=self.batches, where=where)

    def rate(self, record: Step, on: Callable[[str], Tensor], *, train: float | None = None) -> None:
        """Fills in the score of the mask on(name). train: its score on the data if it is known already."""
        self.weights.switch(on)
        with torch.no_grad():
            record.train = (
                train
                if train is not None
                else self.weights.score(self.metric, self.data, batches=self.batches)
            )
            record.held_out = None if self.val is None else self.weights.score(self.metric, self.val)
        record.score = record.train + (record.held_out or 0.0)
        if record.score != record.score:
            raise NonFiniteError(f"the score of the mask is NaN at step {record.step}")
