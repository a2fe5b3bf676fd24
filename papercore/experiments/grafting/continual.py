"""Tasks one after the other: plain fine-tuning beside grafts that keep their entries to themselves.

Glossary
    stage       fine-tuning on one task; after it every task is tested: scores [stages + 1, tasks], row 0 before the first
    claimed     entries of earlier grafts; later stages may not move them
    forgetting  accuracy on a task right after its own stage minus accuracy at the end, mean over all tasks but the last
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from papercore.experiments.grafting.config import QuickConfig
from papercore.experiments.grafting.finetuning import accuracy, fine_tune, probabilities
from papercore.experiments.grafting.masks import moved, paper_mask
from papercore.experiments.grafting.world import Documents, Task, few_shot
from papercore.grafting import Graft

PROTOCOLS = ("plain", "grafts")


def continual_seed(
    config: QuickConfig, model: nn.Module, tasks: Sequence[Task], tests: Documents, seed: int
) -> dict[str, Any]:
    """Scores of both protocols [2, stages + 1, tasks], and the entries that the grafts took."""
    held_out = [task.batch(tests) for task in tasks]

    def scores(now: nn.Module) -> list[float]:
        return [accuracy(probabilities(now, b), b.targets) for b in held_out]

    rows: dict[str, list[list[float]]] = {name: [scores(model)] for name in PROTOCOLS}
    kept: list[int] = []
    first = None
    for protocol in PROTOCOLS:
        current = copy.deepcopy(model)
        claimed = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
        for i, task in enumerate(tasks):
            train = task.batch(few_shot(task, config.per_class, seed + 10 * i))
            if i == 0 and first is not None:
                tuned = first  # the first stage is the same under both protocols
            else:
                frozen = {n: mask for n, mask in claimed.items() if bool(mask.any())}
                tuned = fine_tune(
                    current, train, optimizer="adamw", lr=config.adam_lr, steps=config.stage_steps, size=config.size,
                    seed=seed + i, frozen=frozen,
                )  # fmt: skip
                first = tuned if first is None else first
            if protocol == "plain":
                current = copy.deepcopy(tuned)
            else:
                delta = moved(current, tuned)
                mask = paper_mask(
                    current, delta, train, None, steps=config.paper_steps, seed=seed + i, lr=config.stage_lr
                )
                kept.append(mask.count)
                Graft.from_mask(tuned, mask).apply_(current).keep()
                for name in mask:
                    claimed[name] |= mask[name]
            rows[protocol].append(scores(current))
    return {"scores": np.array([rows[name] for name in PROTOCOLS]), "kept": np.array(kept)}


def forgetting(scores: np.ndarray) -> float:
    """Mean over all tasks but the last of (right after its own stage) - (at the end); scores [stages + 1, tasks]."""
    tasks = scores.shape[1]
    return float(np.mean([scores[i + 1, i] - scores[-1, i] for i in range(tasks - 1)]))
