"""Settings of the Local SGD chapter: one class a scale, each with its own fields."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from papercore.experiments.local_sgd.paper_settings import PaperSettings
from papercore.experiments.local_sgd.standard_settings import StandardSettings
from papercore.lab import config as lab
from papercore.lab.config import option


@dataclasses.dataclass(frozen=True)
class Config(lab.Config):
    """The chapter's settings; `standard()` and `paper()` return the classes of those scales, with other fields."""

    slug: ClassVar[str] = "local_sgd"


@dataclasses.dataclass(frozen=True)
class QuickConfig(Config, scale="quick"):
    """Two problems with a known answer, and scikit-learn's digits with wrong labels."""

    workers: int = option(8, "workers K of every run, unless a figure varies it", minimum=2)
    replicas: int = option(200, "independent runs of a problem with a known answer", minimum=2)
    label_noise: float = option(0.5, "variance of one worker's label noise on the hyperbola", minimum=1e-9)
    horizon: float = option(0.4, "eta^2 * label_noise * steps of the runs that measure rates", minimum=1e-3)
    valley_workers: tuple[int, ...] = option(
        (2, 4, 8, 16, 32), "workers K in the experiment on diffusion, at a fixed local batch", minimum=1
    )
    valley_replicas: int = option(200, "independent runs of that experiment", minimum=2)
    valley_steps: int = option(8000, "steps of the experiment on diffusion", minimum=100)
    first_seed: int = option(100, "first seed of the digits; settings were chosen on seeds below", minimum=0)
    seeds: int = option(10, "seeds of every run on digits", minimum=8)
    local_batch: int = option(4, "images of one worker and step", minimum=1)
    lr: float = option(0.3, "learning rate on digits", minimum=0.0)
    wrong: float = option(0.2, "share of training labels that are wrong for good", minimum=0.0)
    scratch_steps: int = option(2400, "steps from a fresh network, with a falling learning rate", minimum=300)
    control_steps: int = option(2000, "steps of the two controls without memorised labels", minimum=100)
    switch: int = option(800, "steps of phase 1 of the post-local runs, with an average a step", minimum=1)
    post_steps: int = option(3000, "steps of both phases of the post-local runs", minimum=2)
    periods: tuple[int, ...] = option((4, 16, 64), "local steps H from a fresh network", minimum=2)
    post_periods: tuple[int, ...] = option((16, 64), "local steps H of the second phase", minimum=2)
    probes: int = option(16, "random probes of the trace of the Hessian", minimum=1)


@dataclasses.dataclass(frozen=True)
class StandardConfig(StandardSettings, Config, scale="standard"):
    """CIFAR-10 and a small residual network with virtual workers."""


@dataclasses.dataclass(frozen=True)
class PaperConfig(PaperSettings, Config, scale="paper"):
    """The networks, data and settings of the paper's code."""
