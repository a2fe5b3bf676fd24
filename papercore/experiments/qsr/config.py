"""Settings of the QSR chapter: one class a scale, each with its own fields."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from papercore.experiments.qsr.paper_settings import PaperSettings
from papercore.experiments.qsr.standard_settings import StandardSettings
from papercore.lab import config as lab
from papercore.lab.config import option


@dataclasses.dataclass(frozen=True)
class Config(lab.Config):
    """The chapter's settings; `standard()` and `paper()` return the classes of those scales, with other fields."""

    slug: ClassVar[str] = "qsr"


@dataclasses.dataclass(frozen=True)
class QuickConfig(Config, scale="quick"):
    """Counts, a problem with exact theory, digits with wrong labels, and real processes against a cost model."""

    engine: str = option(
        "virtual",
        "who trains on digits: virtual workers, or processes under torchrun",
        choices=("virtual", "process"),
    )
    seeds: int = option(20, "seeds of the digits experiment", minimum=3)
    steps: int = option(2000, "steps of a digits run", minimum=20)
    control_steps: int = option(300, "steps of the short control", minimum=20)
    lr: float = option(1.0, "peak learning rate on digits", minimum=0.0)
    hot_lr: float = option(1.6, "peak learning rate at which local methods begin to break", minimum=0.0)
    hot_seeds: int = option(12, "seeds of the runs at that rate, at most `seeds`", minimum=3)
    workers: int = option(8, "virtual workers (K)", minimum=2)
    local_batch: int = option(4, "samples of a worker a step", minimum=1)
    toy_steps: int = option(6000, "steps on the problem with exact theory", minimum=200)
    toy_replicas: int = option(200, "replicas there", minimum=10)
    processes: int = option(
        2, "real processes that are timed, and that train under engine=process", minimum=2
    )
    engine_steps: int = option(300, "steps of the run that both engines make", minimum=8)
    clock_steps: int = option(120, "steps of a timed run", minimum=20)
    clock_repeats: int = option(12, "times that every schedule is timed", minimum=1)
    jobs: int = option(2, "digits methods trained at once, where there are cores", minimum=1)


@dataclasses.dataclass(frozen=True)
class StandardConfig(StandardSettings, Config, scale="standard"):
    """CIFAR-10 with virtual workers on one device."""


@dataclasses.dataclass(frozen=True)
class PaperConfig(PaperSettings, Config, scale="paper"):
    """ImageNet with one process a worker."""
