"""A chapter of a few milliseconds. Tests of the command line put it into a copy of papercore as `experiments/toy`.

Its parts write their names to the file $TOY_LOG. While the file $TOY_GATE exists, the second part makes `<gate>.reached`
beside it and waits there, so that a test can end the process at a known moment.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from papercore.lab import config as lab
from papercore.lab.config import option
from papercore.lab.record import Record
from papercore.lab.stages import Stages

NEEDS = {"quick": "nothing", "standard": "patience", "paper": "a cluster"}


@dataclasses.dataclass(frozen=True)
class Config(lab.Config):
    """Settings of the toy chapter."""

    slug: ClassVar[str] = "toy"

    parts: int = option(3, "parts of the run", minimum=1)
    rate: float = option(0.5, "what each part adds", minimum=0.0)
    kinds: tuple[str, ...] = option(("plain",), "kinds that are run", choices=("plain", "fancy"))
    end: str = option("well", "how the last part ends", choices=("well", "error", "nan", "killed", "bug"))

    @classmethod
    def standard(cls, **overrides: Any) -> Config:
        return cls._made("standard", {"parts": 5}, overrides)


def run(config: Config) -> Record:
    record, stages = Record.start(config), Stages.of(config)
    total = 0.0
    for number in range(config.parts):
        total += stages.get(f"part {number}", lambda number=number: part(config, number))["value"]
    record.metric("total", total, "exact")
    record.metric("total_in_numpy", np.sum([config.rate] * config.parts), "rel:0.01")
    record.array("values", [config.rate] * config.parts)
    return record.finish()


def part(config: Config, number: int) -> dict[str, Any]:
    if log := os.environ.get("TOY_LOG"):
        with open(log, "a") as file:
            file.write(f"{number} ")
    gate = os.environ.get("TOY_GATE")
    if number == 1 and gate and Path(gate).exists():
        Path(f"{gate}.reached").touch()
        time.sleep(60)
    if number == config.parts - 1:
        if config.end == "error":
            raise RuntimeError("the last part fails")
        if config.end == "nan":
            raise FloatingPointError("the loss is nan at step 3")
        if config.end == "bug":
            raise KeyError("nobody thought of this")
        if config.end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return {"value": config.rate}
