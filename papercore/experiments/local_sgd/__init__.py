"""The Local SGD chapter's experiment: `Config` for each scale and `run(config) -> Record`."""

from __future__ import annotations

from papercore.experiments.local_sgd.config import Config
from papercore.lab import config as lab
from papercore.lab.record import Record
from papercore.lab.stages import Stages

NEEDS = {
    "quick": "2 CPU cores, 1 GiB, under 2 minutes; scikit-learn's digits",
    "standard": "CIFAR-10; one GPU, in slices of 8 minutes, or a reduced form in about 16 minutes of a CPU core",
    "paper": "CIFAR-10, or ImageNet in folders; a process for each of 32 or 256 workers (fewer by a setting), GPU days",
}


def run(config: lab.Config) -> Record:
    """Run the chapter at the scale of its config; finished parts of an interrupted run are used again."""
    record, stages = Record.start(config), Stages.of(config)
    if config.scale == "quick":
        from papercore.experiments.local_sgd.quick import run_quick

        run_quick(config, record, stages)  # type: ignore[arg-type]
    elif config.scale == "standard":
        from papercore.experiments.local_sgd.standard import run_standard

        run_standard(config, record, stages)  # type: ignore[arg-type]
    else:
        from papercore.experiments.local_sgd.paper import run_paper

        run_paper(config, record, stages)  # type: ignore[arg-type]
    return record.finish()


__all__ = ["NEEDS", "Config", "run"]
