"""Calibration and other domains, in a world where fine-tuning over-fits: noisy labels, and a feature that misleads.

In training, a share of the labels is random, and style equals sentiment nine times in ten. At home (the same distribution) the style
helps; in domain B, where both are independent and the words are others, it misleads. Every number of the graft stands beside those of
what is cheaper: stop earlier, divide the logits by a temperature, go only a part of the way (WiSE-FT), graft other entries, or train
the same entries from scratch.

Glossary
    methods    rows of every result: see METHODS
    home, away the training distribution; domain B with style and sentiment independent. Labels are noisy in both
    ece        expected calibration error, 15 bins of equal width
    gap        training accuracy minus accuracy at home
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.experiments.grafting.config import QuickConfig
from papercore.experiments.grafting.encoder import graftable
from papercore.experiments.grafting.finetuning import fine_tune, label_logits
from papercore.experiments.grafting.masks import mask_of, moved, retrained
from papercore.experiments.grafting.world import LABEL, Batch, Task, documents
from papercore.grafting import Graft, expected_calibration_error, fit_temperature, reliability

METHODS = (
    "fine-tuned", "graft, learned", "graft, movement", "graft, random", "stopped early", "temperature", "WiSE-FT",
    "graft + temperature", "trained anew in the region",
)  # fmt: skip
# Label words of another attribute, topic: what the model says before fine-tuning has nothing to do with either feature.
OVERFIT = {
    "sentiment": Task("sentiment", "sentiment", ("Q", "IT"), LABEL["topic"][:2]),
    "style": Task("style", "style", ("Q", "WAS"), LABEL["topic"][2:]),
}
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MEASURES = ("train", "home", "away", "ece", "ece_away", "confidence")
BINS = 15


def noisy(task: Task, n: int, seed: int, config: QuickConfig, *, away: bool = False) -> Batch:
    """n documents of the over-fitting world with their noisy labels."""
    docs = documents(n, seed, domain="B" if away else "A", spurious=0.5 if away else config.spurious)
    g = torch.Generator().manual_seed(seed)
    y = docs.values[task.attribute]
    random = torch.randint(task.classes, y.shape, generator=g)
    return task.batch(docs, torch.where(torch.rand(n, generator=g) < config.noise, random, y))


def trust_seed(config: QuickConfig, model: nn.Module, task: Task, seed: int) -> dict[str, Any]:
    """[methods, measures] of one task and seed, and reliability counts of three methods."""
    train = noisy(task, config.over_train, seed, config)
    sets = {
        "train": train,
        "dev": noisy(task, config.over_train, seed + 1, config),
        "home": noisy(task, config.tests, seed + 2, config),
        "away": noisy(task, config.tests, seed + 3, config, away=True),
    }
    stops: list[dict[str, Tensor]] = []

    def check(now: nn.Module, step: int) -> bool:
        stops.append(_logits(now, sets))
        return False

    options: dict[str, Any] = {
        "optimizer": "adamw", "lr": config.over_lr, "steps": config.over_steps, "size": config.size, "seed": seed,
    }  # fmt: skip
    tuned = fine_tune(model, train, check=check, **options)
    delta = moved(model, tuned)
    found: dict[str, dict[str, Tensor]] = {"fine-tuned": _logits(tuned, sets)}
    masks = {
        rule: mask_of(rule, model, delta, train, config.over_k, steps=config.mask_steps, seed=seed)
        for rule in ("learned", "movement", "random")
    }
    for rule, mask in masks.items():
        with Graft.from_mask(tuned, mask).applied(model):
            found[f"graft, {rule}"] = _logits(model, sets)
    goal = _right(found["graft, learned"], sets, "dev")
    # The checkpoint whose dev accuracy is nearest to the graft's; of equal ones the earliest.
    found["stopped early"] = min(stops, key=lambda logits: abs(_right(logits, sets, "dev") - goal))
    temperature = {
        name: fit_temperature(found[name]["dev"], sets["dev"].targets)
        for name in ("fine-tuned", "graft, learned")
    }
    found["temperature"] = {k: v / temperature["fine-tuned"] for k, v in found["fine-tuned"].items()}
    found["graft + temperature"] = {
        k: v / temperature["graft, learned"] for k, v in found["graft, learned"].items()
    }
    alpha, found["WiSE-FT"] = _interpolated(model, tuned, sets)
    again = retrained(model, masks["learned"], train, **options)
    found["trained anew in the region"] = _logits(again, sets)
    rows = [[_measure(found[name], sets, what) for what in MEASURES] for name in METHODS]
    drawn = {}
    for name in ("fine-tuned", "graft, learned", "temperature"):
        bins = reliability(found[name]["home"].softmax(1), sets["home"].targets, bins=BINS)
        drawn[f"bins_{name}"] = (
            torch.stack([bins.count, bins.confidence, bins.accuracy]).nan_to_num(0.0).numpy()
        )
    before = _logits(model, sets)
    return {
        "rows": np.array(rows),
        "before": np.array([_measure(before, sets, what) for what in MEASURES]),
        "alpha": alpha,
        "temperature": temperature["fine-tuned"],
        **drawn,
    }


def _interpolated(
    model: nn.Module, tuned: nn.Module, sets: dict[str, Batch]
) -> tuple[float, dict[str, Tensor]]:
    """WiSE-FT, theta_pre + alpha delta, with the alpha of the smallest dev loss."""
    mixed, new, old = copy.deepcopy(model), dict(tuned.named_parameters()), dict(model.named_parameters())
    best: tuple[float, float] | None = None
    for alpha in ALPHAS:
        _mix(mixed, old, new, alpha)
        value = float(F.cross_entropy(_logits(mixed, {"dev": sets["dev"]})["dev"], sets["dev"].targets))
        if best is None or value < best[0]:
            best = (value, alpha)
    assert best is not None
    _mix(mixed, old, new, best[1])
    return best[1], _logits(mixed, sets)


@torch.no_grad()
def _mix(mixed: nn.Module, old: dict[str, nn.Parameter], new: dict[str, nn.Parameter], alpha: float) -> None:
    for name, p in mixed.named_parameters():
        if graftable(name):
            p.copy_(torch.lerp(old[name], new[name], alpha))


@torch.no_grad()
def _logits(model: nn.Module, sets: dict[str, Batch]) -> dict[str, Tensor]:
    return {name: label_logits(model, batch) for name, batch in sets.items()}


def _right(logits: dict[str, Tensor], sets: dict[str, Batch], name: str) -> float:
    return float((logits[name].argmax(1) == sets[name].targets).double().mean())


def _measure(logits: dict[str, Tensor], sets: dict[str, Batch], what: str) -> float:
    if what.startswith("ece"):
        name = "away" if what == "ece_away" else "home"
        return expected_calibration_error(logits[name].softmax(1), sets[name].targets, bins=BINS)
    if what == "confidence":
        return float(logits["home"].softmax(1).max(1).values.double().mean())
    return _right(logits, sets, what)
