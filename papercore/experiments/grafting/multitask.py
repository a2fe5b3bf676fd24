"""One model on several tasks, one mask a task: who overlaps with whom, and what unions of masks can do.

Glossary
    T          tasks of the model, in the order of `names(tasks)`
    subset     tasks whose masks are joined, as text such as "sentiment + topic"
    share      share of a task's gain that a graft keeps: (grafted - pre-trained) / (fine-tuned - pre-trained) accuracy
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papercore.experiments.grafting.config import QuickConfig
from papercore.experiments.grafting.finetuning import accuracy, fine_tune, probabilities
from papercore.experiments.grafting.masks import grafted_accuracy, moved, paper_mask
from papercore.experiments.grafting.world import Batch, Documents, Task, few_shot, joined
from papercore.grafting import Graft, Mask, overlap, union


def train_multitask(
    model: nn.Module, tasks: Sequence[Task], config: QuickConfig, seed: int
) -> tuple[nn.Module, list[Batch]]:
    """The fine-tuned model and each task's own training batch."""
    parts = [task.batch(few_shot(task, config.per_class, seed + 10 * i)) for i, task in enumerate(tasks)]
    tuned = fine_tune(
        model,
        joined(parts),
        optimizer="adamw",
        lr=config.adam_lr,
        steps=config.multi_steps,
        size=2 * config.size,
        seed=seed,
    )
    return tuned, parts


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All subsets that are not empty, small ones first."""
    return [some for size in range(1, len(names) + 1) for some in combinations(names, size)]


def multitask_seed(
    config: QuickConfig, model: nn.Module, tasks: Sequence[Task], tests: Documents, seed: int
) -> dict[str, Any]:
    """Accuracies of the fine-tuned model and of all unions; overlaps; counts by tensor; grafts as arrays."""
    tuned, parts = train_multitask(model, tasks, config, seed)
    delta = moved(model, tuned)
    names = [task.name for task in tasks]
    masks = {
        task.name: paper_mask(
            model, delta, part, None, steps=config.paper_steps, seed=seed + i, lr=config.paper_lr
        )
        for i, (task, part) in enumerate(zip(tasks, parts, strict=True))
    }
    held_out = [task.batch(tests) for task in tasks]
    chosen = {" + ".join(some): union([masks[n] for n in some]) for some in subsets(names)}
    scores = {
        "none": [accuracy(probabilities(model, b), b.targets) for b in held_out],
        "all weights": [accuracy(probabilities(tuned, b), b.targets) for b in held_out],
        **{
            name: [grafted_accuracy(model, tuned, mask, b) for b in held_out] for name, mask in chosen.items()
        },
    }
    grafts: dict[str, np.ndarray] = {}
    for name, mask in masks.items():
        index, values = flat_entries(tuned, mask)
        grafts |= {f"graft_{name}_index": index, f"graft_{name}_values": values}
    return {
        "subsets": list(scores),
        "accuracy": np.array(list(scores.values())),
        "counts": np.array([masks[n].count for n in names]),
        "union_counts": {name: mask.count for name, mask in chosen.items()},
        "containment": overlap(masks).numpy(),
        "by_tensor": np.stack([by_tensor(masks[n]) for n in names]),
        "total": delta.total,
        **grafts,
    }


def by_tensor(mask: Mask) -> np.ndarray:
    """Entries of the mask in each tensor, in the order of `tensors`."""
    return np.array([len(mask.index[name]) for name in mask])


def tensors(mask: Mask) -> tuple[list[str], list[int]]:
    """Names and sizes of the tensors that a mask is of."""
    return list(mask), [int(np.prod(mask.shapes[name])) for name in mask]


def flat_entries(tuned: nn.Module, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """A graft as two arrays: positions in the concatenation of the mask's tensors, int32, and fine-tuned values, float32."""
    parameters = dict(tuned.named_parameters())
    at, index, values = 0, [], []
    for name in mask:
        own = mask.index[name]
        index.append(own + at)
        values.append(parameters[name].detach().reshape(-1)[own])
        at += parameters[name].numel()
    return torch.cat(index).to(torch.int32).numpy(), torch.cat(values).numpy()


def from_entries(model: nn.Module, names: Sequence[str], index: np.ndarray, values: np.ndarray) -> Graft:
    """The graft that `flat_entries` took apart; `names`: the tensors in their order."""
    parameters = dict(model.named_parameters())
    at, flat, new = 0, torch.from_numpy(index.astype(np.int64)), torch.from_numpy(values)
    masks: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name in names:
        size = parameters[name].numel()
        here = (flat >= at) & (flat < at + size)
        dense = torch.zeros(size, dtype=torch.bool)
        dense[flat[here] - at] = True
        tuned = parameters[name].detach().reshape(-1).clone()
        tuned[flat[here] - at] = new[here]
        masks[name], state[name] = dense.view_as(parameters[name]), tuned.view_as(parameters[name])
        at += size
    return Graft.from_mask(state, masks, pretrained=model)
