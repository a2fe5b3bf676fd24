"""A small record with every kind of content, for the tests of records."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from papercore.lab.config import Config
from papercore.lab.record import Record


@dataclasses.dataclass(frozen=True)
class Small(Config):
    slug: ClassVar[str] = "small"


def small_record() -> Record:
    """A finished record of `Small`."""
    made = Record.start(Small.quick(device="cpu", seed=3))
    made.metric("accuracy", 0.875, "rel:0.05")
    made.metric("accuracy_se", 0.01, "abs:0.005")
    made.metric("gain", 0.1, "se:2:accuracy_se")
    made.metric("weights", 121_344, "exact")
    made.metric("seconds_a_step", 0.03, "volatile")
    made.table("arms", ["arm", "k", "mean"], [["full", 4, 0.5], ["lora", np.int64(16), np.float32(0.25)]])
    made.array("curve", [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    made.array("names", np.array(["a", "bcd"]))
    made.note("where", "a generated language")
    return made.finish()
