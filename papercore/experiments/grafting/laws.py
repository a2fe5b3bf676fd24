"""Density of the paper's mask against its rate, beside what the first-order law predicts before any mask is learned."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from papercore.experiments.grafting.config import QuickConfig
from papercore.experiments.grafting.finetuning import fine_tune, loss
from papercore.experiments.grafting.masks import moved
from papercore.experiments.grafting.world import Task, few_shot
from papercore.grafting import first_order_scores, learn_mask, threshold

RATES = (3e5, 1e6, 3e6, 1e7, 3e7)
STEPS = 10  # as in the paper's script
STARTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # S_0 is uniform on [0, 1): the law is averaged over these


def density_by_rate(config: QuickConfig, model: nn.Module, task: Task, seed: int) -> dict[str, Any]:
    """Entries switched on after `STEPS` updates and entries that law (3) predicts, by rate."""
    train = task.batch(few_shot(task, config.per_class, seed))
    tuned = fine_tune(
        model, train, optimizer="sgd", lr=config.sgd_lr, steps=config.sgd_steps, size=config.size, seed=seed
    )
    delta = moved(model, tuned)
    scores = torch.cat([c.flatten() for c in first_order_scores(model, delta, loss, [train]).values()])
    predicted, found = [], []
    for lr in RATES:
        predicted.append(np.mean([float((scores > threshold(lr, STEPS, start=s)).sum()) for s in STARTS]))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # nothing on, or nearly all: both are points of the curve
            learned = learn_mask(
                model, delta, loss, [train], steps=STEPS, lr=lr, generator=torch.Generator().manual_seed(seed)
            )
        found.append(learned.history[-1].count)
    return {
        "rates": np.array(RATES),
        "predicted": np.array(predicted),
        "found": np.array(found),
        "total": delta.total,
    }
