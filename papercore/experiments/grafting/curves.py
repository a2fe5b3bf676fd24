"""One task, one fine-tuned model, masks of every size by every rule: what a graft of k entries keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from papercore.experiments.grafting.config import QuickConfig
from papercore.experiments.grafting.finetuning import accuracy, fine_tune, probabilities
from papercore.experiments.grafting.masks import RULES, grafted_probabilities, mask_of, moved, retrained
from papercore.experiments.grafting.multitask import by_tensor
from papercore.experiments.grafting.world import Documents, Task, few_shot
from papercore.grafting import Graft, Mask

SMALLEST = 0.95  # of the fine-tuned accuracy: the paper's measure of a mask that is large enough


def curve(config: QuickConfig, model: nn.Module, task: Task, tests: Documents, seed: int) -> dict[str, Any]:
    """Accuracy and agreement with the fine-tuned model by rule and k, [rules, ks], with the end points and the controls."""
    train, held_out = task.batch(few_shot(task, config.per_class, seed)), task.batch(tests)
    options: dict[str, Any] = {
        "optimizer": "sgd", "lr": config.sgd_lr, "steps": config.sgd_steps, "size": config.size, "seed": seed,
    }  # fmt: skip
    tuned = fine_tune(model, train, **options)
    delta = moved(model, tuned)
    whole = probabilities(tuned, held_out)
    own = whole.argmax(1)
    acc = np.zeros((len(RULES), len(config.ks)))
    agree = np.zeros_like(acc)
    masks: dict[tuple[str, int], Mask] = {}
    for r, rule in enumerate(RULES):
        for i, k in enumerate(config.ks):
            mask = mask_of(rule, model, delta, train, k, steps=config.mask_steps, seed=seed + i)
            p = grafted_probabilities(model, tuned, mask, held_out)
            masks[rule, k] = mask
            acc[r, i] = accuracy(p, held_out.targets)
            agree[r, i] = float((p.argmax(1) == own).double().mean())
    paper = []
    for k in config.paper_ks:
        mask = mask_of("paper", model, delta, train, k, steps=config.paper_steps, seed=seed)
        p = grafted_probabilities(model, tuned, mask, held_out)
        paper.append([mask.count, accuracy(p, held_out.targets)])
    biases = mask_of("biases", model, delta, train, 1, steps=1, seed=seed)
    before, after = (
        accuracy(probabilities(model, held_out), held_out.targets),
        accuracy(whole, held_out.targets),
    )
    kept = masks["learned", smallest(config.ks, acc[0], after) or config.ks[-1]]
    again = retrained(model, kept, train, **options)
    return {
        "accuracy": acc,
        "agreement": agree,
        "before": before,
        "after": after,
        "train_after": accuracy(probabilities(tuned, train), train.targets),
        "paper": np.array(paper),
        "biases": np.array(
            [biases.count, accuracy(grafted_probabilities(model, tuned, biases, held_out), held_out.targets)]
        ),
        "retrained": np.array(
            [
                kept.count,
                accuracy(grafted_probabilities(model, tuned, kept, held_out), held_out.targets),
                accuracy(probabilities(again, held_out), held_out.targets),
            ]
        ),
        "by_tensor": by_tensor(kept),
        "wrong_entries": wrong_entries(model, tuned, kept),
        "bytes": Graft.from_mask(tuned, kept).nbytes,
    }


def smallest(ks: tuple[int, ...], acc: np.ndarray, after: float, share: float = SMALLEST) -> int | None:
    """The smallest k whose accuracy is at least `share` of the fine-tuned one; None if there is none."""
    return next((k for k, a in zip(ks, acc, strict=True) if a >= share * after), None)


def wrong_entries(model: nn.Module, tuned: nn.Module, mask: Mask) -> int:
    """Entries of the grafted model that are not bit for bit what they must be, and entries not restored after it."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    new = dict(tuned.named_parameters())
    wrong = 0
    with Graft.from_mask(tuned, mask).applied(model):
        for name, p in model.named_parameters():
            inside = mask[name] if name in mask else torch.zeros_like(p, dtype=torch.bool)
            wrong += int((p != torch.where(inside, new[name], before[name])).sum())
    wrong += sum(int((p != before[name]).sum()) for name, p in model.named_parameters())
    return wrong


def deranged(
    config: QuickConfig, model: nn.Module, task: Task, tests: Documents, seed: int
) -> dict[str, Any]:
    """The task whose every answer has to move: learned masks and movement at larger sizes, and the paper's rule uncapped."""
    train, held_out = task.batch(few_shot(task, config.per_class, seed)), task.batch(tests)
    tuned = fine_tune(
        model, train, optimizer="sgd", lr=config.sgd_lr, steps=config.sgd_steps, size=config.size, seed=seed
    )
    delta = moved(model, tuned)
    acc = [
        [
            accuracy(
                grafted_probabilities(
                    model,
                    tuned,
                    mask_of(rule, model, delta, train, k, steps=config.mask_steps, seed=seed),
                    held_out,
                ),
                held_out.targets,
            )
            for k in config.deranged_ks
        ]
        for rule in ("learned", "first-order", "movement")
    ]
    return {
        "accuracy": np.array(acc),
        "before": accuracy(probabilities(model, held_out), held_out.targets),
        "after": accuracy(probabilities(tuned, held_out), held_out.targets),
    }
