"""The chapter at `quick` scale: what can be counted, what has an exact theory, what small networks show, what processes take."""

from __future__ import annotations

import torch

from papercore.experiments.qsr import counting, digits, engines, toy, wall_clock
from papercore.experiments.qsr.config import QuickConfig
from papercore.lab.record import Record
from papercore.lab.stages import Stages


def run_quick(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Fill the record; every part that trains is a stage, so that an interrupted run goes on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # small tensors: more threads only wait for each other, and sums keep their order
    try:
        seed = 1000 * config.seed
        # The timing comes first, while nothing else of this run is at work.
        wall_clock.predict(
            record, stages, processes=config.processes, steps=config.clock_steps, repeats=config.clock_repeats, seed=seed
        )  # fmt: skip
        engines.compare(record, stages, processes=config.processes, steps=config.engine_steps, seed=seed)
        digits.run_all(config, record, stages)
        toy.compare(record, stages, steps=config.toy_steps, replicas=config.toy_replicas, seed=seed)
        toy.rates(record, stages, replicas=config.toy_replicas, seed=seed)
        counting.count_all(record)
    finally:
        torch.set_num_threads(threads)
    if config.engine == "process":
        record.note("engine", f"Digits were trained by {config.processes} real processes a run.")
