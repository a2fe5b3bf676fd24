"""Settings of the MeZO chapter: one class a scale, each with its own fields."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from papercore.experiments.mezo.paper_settings import PaperSettings
from papercore.experiments.mezo.standard_settings import StandardSettings
from papercore.lab import config as lab
from papercore.lab.config import option


@dataclasses.dataclass(frozen=True)
class Config(lab.Config):
    """The chapter's settings; `standard()` and `paper()` return the classes of those scales, with other fields."""

    slug: ClassVar[str] = "mezo"


@dataclasses.dataclass(frozen=True)
class QuickConfig(Config, scale="quick"):
    """A generated language and a model of 121,344 weights, trained on the spot."""

    pretrain_steps: int = option(500, "steps of language modelling before any task", minimum=1)
    pretrain_batch: int = option(24, "documents a step", minimum=1)
    pretrain_lr: float = option(4e-3, "peak learning rate of AdamW, after 50 steps of warm-up", minimum=0.0)
    segments: int = option(5, "segments of a document", minimum=1)
    shots: tuple[int, ...] = option(
        (1, 4, 16), "examples per topic (k); the largest is used where one k is enough", minimum=1
    )
    seeds: int = option(5, "few-shot samples, each with its own noise", minimum=3)
    steps: int = option(96, "MeZO steps, two forward passes each; a multiple of 96 suits n = 16", minimum=4)
    backprop_steps: int = option(50, "steps of fine-tuning by backpropagation", minimum=1)
    tests: int = option(400, "test sentences", minimum=4)
    draws: int = option(20_000, "draws of the Monte-Carlo checks", minimum=100)
    drift_weights: int = option(100_000, "weights in the rounding experiment", minimum=1000)
    drift_steps: int = option(500, "steps of the rounding experiment", minimum=10)


@dataclasses.dataclass(frozen=True)
class StandardConfig(StandardSettings, Config, scale="standard"):
    """A pretrained sentence encoder and TREC."""


@dataclasses.dataclass(frozen=True)
class PaperConfig(PaperSettings, Config, scale="paper"):
    """The paper's models, tasks and grids."""
