"""The parsing chapter's experiment: `Config` for each scale and `run(config) -> Record`."""

from __future__ import annotations

from papercore.experiments.parsing.config import Config
from papercore.lab import config as lab
from papercore.lab.record import Record
from papercore.lab.stages import Stages

NEEDS = {
    "quick": "2 CPU cores, 2 GiB, about 2 minutes; transformers",
    "standard": "a treebank (NLTK's sample: python -m nltk.downloader treebank), 2 minutes on a CPU core; for the models one GPU of 16 GB, about 40 minutes, in slices",
    "paper": "your own copy of the Penn Treebank; one GPU of 40 GB, days (six models of RoBERTa's size)",
}


def run(config: lab.Config) -> Record:
    """Run the chapter at the scale of its config; finished parts of an interrupted run are used again."""
    record, stages = Record.start(config), Stages.of(config)
    if config.scale == "quick":
        from papercore.experiments.parsing.quick import run_quick

        run_quick(config, record, stages)  # type: ignore[arg-type]
    elif config.scale == "standard":
        from papercore.experiments.parsing.standard import run_standard

        run_standard(config, record, stages)  # type: ignore[arg-type]
    else:
        from papercore.experiments.parsing.paper import run_paper

        run_paper(config, record, stages)  # type: ignore[arg-type]
    return record.finish()


__all__ = ["NEEDS", "Config", "run"]
