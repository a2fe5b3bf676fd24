"""Masks of one fine-tuned model by every rule, and what the grafts do.

Glossary
    k         entries of a mask
    delta     fine-tuned minus pre-trained weights (`papercore.grafting.TaskVector`)
    rules     learned (exact k, annealed), paper (the paper's own), first-order, movement, random, biases
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from papercore.experiments.grafting.encoder import graftable
from papercore.experiments.grafting.finetuning import accuracy, loss, probabilities
from papercore.experiments.grafting.world import Batch
from papercore.grafting import (
    Graft,
    Mask,
    TaskVector,
    bias_mask,
    first_order_mask,
    learn_mask,
    magnitude_mask,
    random_mask,
    task_vector,
)

RULES = ("learned", "first-order", "movement", "random")


def moved(start: nn.Module, tuned: nn.Module) -> TaskVector:
    """The task vector of the layers."""
    return task_vector(start, tuned, select=graftable)


def mask_of(
    rule: str, model: nn.Module, delta: TaskVector, batch: Batch, k: int, *, steps: int, seed: int
) -> Mask:
    """A mask of k entries by a rule; "paper" and "biases" hold as many as they come out with.

    Raises:
        ValueError: an unknown rule.
    """
    if rule == "learned":
        return learn_mask(
            model, delta, loss, [batch], rule="topk", sparsity=k / delta.total, steps=steps
        ).mask
    if rule == "paper":
        return paper_mask(model, delta, batch, k, steps=steps, seed=seed)
    if rule == "first-order":
        return first_order_mask(model, delta, loss, [batch], k=k)
    if rule == "movement":
        return magnitude_mask(delta, k=k)
    if rule == "random":
        return random_mask(delta, k=k, generator=torch.Generator().manual_seed(seed))
    if rule == "biases":
        return bias_mask(delta)
    raise ValueError(f"unknown rule {rule!r}: expected one of {', '.join((*RULES, 'paper', 'biases'))}.")


def paper_mask(
    model: nn.Module,
    delta: TaskVector,
    batch: Batch,
    k: int | None,
    *,
    steps: int,
    seed: int,
    lr: float | None = None,
) -> Mask:
    """The paper's rule: gradient descent on S from an empty base; the step with the best training accuracy, as in its code.

    k: at most so many entries, with the rate that law (3) sets; None: no cap, at the rate lr.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # too large and too small rates are part of what is shown
        found = learn_mask(
            model, delta, loss, [batch], rule="paper", sparsity=None if k is None else k / delta.total, steps=steps,
            lr=lr, generator=torch.Generator().manual_seed(seed), metric=_metric,
        )  # fmt: skip
    return found.mask


def _metric(model: nn.Module, batch: Batch) -> float:
    return accuracy(probabilities(model, batch), batch.targets)


def grafted_probabilities(model: nn.Module, tuned: nn.Module, mask: Mask, batch: Batch) -> Tensor:
    """[n, classes] of the pre-trained model with the mask's entries grafted; the model is restored bit for bit."""
    with Graft.from_mask(tuned, mask).applied(model):
        return probabilities(model, batch)


def grafted_accuracy(model: nn.Module, tuned: nn.Module, mask: Mask, batch: Batch) -> float:
    return accuracy(grafted_probabilities(model, tuned, mask, batch), batch.targets)


def retrained(
    start: nn.Module, mask: Mask, batch: Batch, *, optimizer: str, lr: float, steps: int, size: int, seed: int
) -> nn.Module:
    """The control of the lottery ticket: from the pre-trained weights, train the mask's entries and nothing else."""
    from papercore.experiments.grafting.finetuning import fine_tune

    outside = {name: ~mask[name] for name in mask}
    return fine_tune(
        start, batch, optimizer=optimizer, lr=lr, steps=steps, size=size, seed=seed, frozen=outside
    )
