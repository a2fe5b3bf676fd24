"""Settings of the grafting chapter: one class a scale, each with its own fields."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from papercore.experiments.grafting.standard_settings import StandardSettings
from papercore.lab import config as lab
from papercore.lab.config import option


@dataclasses.dataclass(frozen=True)
class Config(lab.Config):
    """The chapter's settings; `standard()` and `paper()` return the classes of those scales, with other fields."""

    slug: ClassVar[str] = "grafting"


@dataclasses.dataclass(frozen=True)
class QuickConfig(Config, scale="quick"):
    """A language with latent attributes and a model of 109,884 weights, of which 99,968 can be grafted."""

    seeds: int = option(3, "seeds: few-shot documents, order of training, masks", minimum=2)
    per_class: int = option(64, "training documents of each label", minimum=2)
    tests: int = option(500, "test documents of each kind", minimum=10)
    size: int = option(32, "documents of a fine-tuning step", minimum=1)
    sgd_lr: float = option(0.6, "SGD's rate, single-task fine-tuning", minimum=0.0)
    sgd_steps: int = option(120, "steps of single-task fine-tuning", minimum=1)
    adam_lr: float = option(1e-3, "AdamW's rate, all other fine-tuning", minimum=0.0)
    multi_steps: int = option(
        200, "steps of multi-task fine-tuning, of twice as many documents each", minimum=1
    )
    ks: tuple[int, ...] = option(
        (10, 200, 400, 800, 1600, 2400, 4800, 9600), "entries of the masks of a curve", minimum=1
    )
    mask_steps: int = option(15, "updates that learn a mask of exactly k entries", minimum=1)
    paper_steps: int = option(25, "updates of the paper's rule", minimum=1)
    paper_ks: tuple[int, ...] = option((800,), "caps of the paper's rule on single tasks", minimum=1)
    paper_lr: float = option(2e7, "rate of the paper's rule in the multi-task model", minimum=0.0)
    deranged_ks: tuple[int, ...] = option(
        (1600, 12800), "entries, for the task whose every answer has to move", minimum=1
    )
    noise: float = option(0.4, "share of labels that are random, where fine-tuning over-fits", minimum=0.0)
    spurious: float = option(0.9, "how often style equals sentiment there", minimum=0.0)
    over_train: int = option(128, "training documents there", minimum=4)
    over_steps: int = option(120, "steps of fine-tuning there", minimum=20)
    over_lr: float = option(2e-3, "AdamW's rate there", minimum=0.0)
    over_k: int = option(1600, "entries of the masks there", minimum=1)
    order: tuple[str, ...] = option(
        ("topic", "style", "sentiment"),
        "tasks of continual learning in their order",
        choices=("topic", "style", "sentiment"),
    )
    stage_steps: int = option(80, "steps of each stage of continual learning", minimum=1)
    stage_lr: float = option(3e7, "rate of the paper's rule after each stage", minimum=0.0)


@dataclasses.dataclass(frozen=True)
class StandardConfig(StandardSettings, Config, scale="standard"):
    """A real pre-trained encoder on four real tasks."""


@dataclasses.dataclass(frozen=True)
class PaperConfig(Config, scale="paper"):
    """RoBERTa-base with prompts, as the paper ran it."""
