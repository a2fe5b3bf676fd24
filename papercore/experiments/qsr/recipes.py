"""The runs of the paper as learning rates and schedules, and what they communicate. Nothing here trains.

The convention that gives back every communication volume that we can recall: 312 steps an epoch (1,281,167 images in full
batches of 4,096), steps counted from 0, a warm-up from 1e-6, a decay to 1e-6 over the rest, and a share of communication of
rounds / steps.

Glossary
    T, W       steps of a run, steps of its warm-up
    alpha      growth coefficient of the rule; h_base its shortest round
    strength   how much agreement with the recalled number says: "a test" where alpha was known apart from it,
               "consistent" where alpha itself was picked so that the recalled number comes out, "trivial" for constant H
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from papercore.local_sgd import (
    QSR,
    CommReport,
    ConstantH,
    SyncSchedule,
    communication_volume,
    cosine_lr,
    linear_lr,
    power_of_two_lr,
    step_lr,
)

EPOCH = 312  # steps at B = 4,096
LARGE_EPOCH = 78  # at B = 16,384


@dataclass(frozen=True)
class Recipe:
    """Learning rate of one model: lr(step), T and W."""

    lr: Callable[[int], float]
    steps: int
    warmup: int

    def volume(self, schedule: SyncSchedule) -> CommReport:
        return communication_volume(schedule, self.lr, self.steps, warmup_steps=self.warmup)


def resnet(
    decay: str = "cosine", *, epochs: int = 200, peak: float = 0.8, epoch: int = EPOCH, at: Any = None
) -> Recipe:
    """ResNet-152 by local SGD: 200 epochs, 5 of warm-up, peak 0.8 at B = 4,096. `at`: epochs of a step decay."""
    return decayed(decay, peak, epochs * epoch, 5 * epoch, None if at is None else [e * epoch for e in at])


def vit(
    decay: str = "cosine",
    *,
    epochs: int = 300,
    peak: float = 0.008,
    epoch: int = EPOCH,
    warmup: int = 10_000,
) -> Recipe:
    """ViT-B/16 by local AdamW: 300 epochs, 10,000 steps of warm-up, peak 0.008 at B = 4,096."""
    return decayed(decay, peak, epochs * epoch, warmup, None)


def decayed(decay: str, peak: float, steps: int, warmup: int, milestones: list[int] | None = None) -> Recipe:
    """A run of T steps with W of warm-up: "cosine", "linear", "step" (at `milestones`) or "cosine in powers of 2"."""
    if decay == "step":
        return Recipe(step_lr(peak, steps, milestones=milestones, warmup_steps=warmup), steps, warmup)
    if decay == "linear":
        return Recipe(linear_lr(peak, steps, warmup_steps=warmup), steps, warmup)
    cosine = cosine_lr(peak, steps, warmup_steps=warmup)
    if decay == "cosine in powers of 2":
        return Recipe(power_of_two_lr(cosine, warmup_steps=warmup), steps, warmup)
    return Recipe(cosine, steps, warmup)


@dataclass(frozen=True)
class Row:
    """A row of the paper's table: `reported` names its row in the file of reported numbers."""

    model: str
    schedule: SyncSchedule
    reported: str
    strength: str

    @property
    def recipe(self) -> Recipe:
        return resnet() if self.model == "ResNet-152" else vit()


# The eight rows at B = 4,096, section 4 of the paper. Only one alpha is known apart from the number that it must give.
ROWS = (
    Row("ResNet-152", ConstantH(2), "ResNet-152 Local SGD H=2", "trivial"),
    Row("ResNet-152", QSR(0.2, 2), "ResNet-152 Local SGD QSR H_base=2", "consistent"),
    Row("ResNet-152", ConstantH(4), "ResNet-152 Local SGD H=4", "trivial"),
    Row("ResNet-152", QSR(0.25, 4), "ResNet-152 Local SGD QSR H_base=4", "consistent"),
    Row("ViT-B", ConstantH(4), "ViT-B Local AdamW H=4", "trivial"),
    Row("ViT-B", QSR(0.0175, 4), "ViT-B Local AdamW QSR H_base=4", "a test"),
    Row("ViT-B", ConstantH(8), "ViT-B Local AdamW H=8", "trivial"),
    Row("ViT-B", QSR(0.0175, 8), "ViT-B Local AdamW QSR H_base=8", "consistent"),
)

# Settings next to those of the table (model, alpha, h_base): had the paper used them, the recalled numbers would be others.
NEIGHBOURS = (
    ("ResNet-152", 0.25, 2),
    ("ResNet-152", 0.2, 4),
    ("ResNet-152", 0.3, 4),
    ("ViT-B", 0.015, 4),
    ("ViT-B", 0.02, 4),
    ("ViT-B", 0.015, 8),
    ("ViT-B", 0.02, 8),
)


def named(schedule: SyncSchedule) -> str:
    """A schedule as a reader sees it: "H = 4", "QSR, α = 0.2, H from 2"."""
    if isinstance(schedule, ConstantH):
        return f"H = {schedule.h}"
    if isinstance(schedule, QSR):
        rule = {1.0: "1/η rule", 2.0: "QSR", 3.0: "cubic rule"}.get(
            schedule.power, f"power {schedule.power:g}"
        )
        return f"{rule}, {schedule.alpha:g}, H ≥ {schedule.h_base}"
    return type(schedule).__name__


def predictions() -> list[tuple[str, Recipe, SyncSchedule]]:
    """Runs whose published volumes we could not recover: what to compare when the paper is at hand."""
    rows: list[tuple[str, Recipe, SyncSchedule]] = []
    for alpha in (0.01, 0.0125, 0.015, 0.0175, 0.02):
        rows.append(("ViT-B, linear decay", vit("linear"), QSR(alpha, 4)))
    for alpha in (0.01, 0.0125, 0.015, 0.0175, 0.02):
        rows.append(("ViT-B, cosine rounded to powers of 2", vit("cosine in powers of 2"), QSR(alpha, 4)))
    for h_base in (2, 4):
        for alpha in (0.1, 0.2, 0.25, 0.3):
            rows.append(("ResNet-152, linear decay", resnet("linear"), QSR(alpha, h_base)))
    for epochs, at in ((90, (30, 60, 80)), (200, (50, 100, 150))):
        where = "/".join(map(str, at))
        for alpha, h_base in ((0.2, 2), (0.25, 4)):
            rows.append(
                (
                    f"ResNet-152, steps at {where} of {epochs} epochs",
                    resnet("step", epochs=epochs, at=at),
                    QSR(alpha, h_base),
                )
            )
    for peak, alpha in ((1.6, 0.2), (3.2, 0.4)):
        for h_base in (2, 4):
            rows.append(
                (
                    f"ResNet-152, B = 16,384, peak {peak:g}",
                    resnet(peak=peak, epoch=LARGE_EPOCH),
                    QSR(alpha, h_base),
                )
            )
    for warmup in (2_500, 10_000):
        for h_base in (4, 8):
            rows.append(
                (
                    f"ViT-B, B = 16,384, peak 0.016, warm-up {warmup:,}",
                    vit(peak=0.016, epoch=LARGE_EPOCH, warmup=warmup),
                    QSR(0.0175, h_base),
                )
            )
    for beta in (0.0175, 0.03):
        rows.append(("ViT-B, 1/η rule", vit(), QSR(beta, 4, power=1)))
    for rho in (0.0075, 0.01, 0.0125):
        rows.append(("ViT-B, cubic rule", vit(), QSR(rho, 4, power=3)))
    return rows
