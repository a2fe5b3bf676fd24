"""The QSR chapter's experiment: `Config` for each scale and `run(config) -> Record`."""

from __future__ import annotations

from papercore.experiments.qsr.config import Config
from papercore.lab import config as lab
from papercore.lab.record import Record
from papercore.lab.stages import Stages

NEEDS = {
    "quick": "2 CPU cores, 1 GiB, under 2 minutes",
    "standard": "CIFAR-10 (a local folder or the hub); one GPU of 24 GB, in slices of at most 8 minutes, or a reduced form in about 15 minutes of a CPU core",
    "paper": "ImageNet (a folder of images or the hub), 16 GPUs or more under torchrun; 20 to 30 hours a run",
}


def run(config: lab.Config) -> Record:
    """Run the chapter at the scale of its config; finished parts of an interrupted run are used again."""
    record, stages = Record.start(config), Stages.of(config)
    if config.scale == "quick":
        from papercore.experiments.qsr.quick import run_quick

        run_quick(config, record, stages)  # type: ignore[arg-type]
    elif config.scale == "standard":
        from papercore.experiments.qsr.standard import run_standard

        run_standard(config, record, stages)  # type: ignore[arg-type]
    else:
        from papercore.experiments.qsr.paper import run_paper

        run_paper(config, record, stages)  # type: ignore[arg-type]
    return record.finish()


__all__ = ["NEEDS", "Config", "run"]
