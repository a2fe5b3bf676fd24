"""The TinT chapter's experiment: `Config` for each scale and `run(config) -> Record`."""

from __future__ import annotations

from papercore.experiments.tint.config import Config
from papercore.lab import config as lab
from papercore.lab.record import Record
from papercore.lab.stages import Stages

NEEDS = {
    "quick": "2 CPU cores, 2 GiB, about 2 minutes",
    "standard": "NLTK's free corpora and WikiText-2's text; tokenizers (comes with transformers); one GPU of 16 GB, or a reduced form in about 20 minutes of a CPU core",
    "paper": "GPT-2 and OPT-125M, WikiText-103 and seven classification sets from the hub; one GPU of 16 GB, hours",
}


def run(config: lab.Config) -> Record:
    """Run the chapter at the scale of its config; finished parts of an interrupted run are used again."""
    record, stages = Record.start(config), Stages.of(config)
    if config.scale == "quick":
        from papercore.experiments.tint.quick import run_quick

        run_quick(config, record, stages)  # type: ignore[arg-type]
    elif config.scale == "standard":
        from papercore.experiments.tint.standard import run_standard

        run_standard(config, record, stages)  # type: ignore[arg-type]
    else:
        from papercore.experiments.tint.paper import run_paper

        run_paper(config, record, stages)  # type: ignore[arg-type]
    return record.finish()


__all__ = ["NEEDS", "Config", "run"]
