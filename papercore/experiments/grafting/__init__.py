"""The grafting chapter's experiment: `Config` for each scale and `run(config) -> Record`."""

from __future__ import annotations

from papercore.experiments.grafting.config import Config
from papercore.lab import config as lab
from papercore.lab.record import Record
from papercore.lab.stages import Stages

NEEDS = {
    "quick": "2 CPU cores, 2 GiB, about 2 minutes",
    "standard": "not available yet",
    "paper": "not available yet",
}


def run(config: lab.Config) -> Record:
    """Run the chapter at the scale of its config; finished parts of an interrupted run are used again.

    Raises:
        NotImplementedError: the chapter has no code of this scale yet.
    """
    if config.scale != "quick":
        raise NotImplementedError(
            f"chapter grafting has no {config.scale} scale yet: run it with --scale quick, the only one that is there."
        )
    record, stages = Record.start(config), Stages.of(config)
    from papercore.experiments.grafting.quick import run_quick

    run_quick(config, record, stages)  # type: ignore[arg-type]
    return record.finish()


__all__ = ["NEEDS", "Config", "run"]
