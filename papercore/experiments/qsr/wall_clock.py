"""Seconds of real processes against a model of two numbers: fitted on H = 1 and H = 4, asked about QSR.

A run of T steps with R averages is modelled to take T t_step + R t_sync. Two constant schedules give both numbers; the
prediction for QSR is then a test, since QSR took no part in the fit.

Every schedule is timed several times, in turn, and the fastest counts: what disturbs a machine only ever makes a run slower.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from papercore.lab.noisy_digits import NoisyDigits, network
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.torchrun import Processes, launch
from papercore.lab.worker_training import cross_entropy
from papercore.local_sgd import (
    QSR,
    ConstantH,
    CostModel,
    LocalOptimizer,
    SyncSchedule,
    communication_volume,
    cosine_lr,
)

SIZES = (64, 256, 256, 10)  # wider than the digits' own network, so that an average has some bytes to carry
TIMED: dict[str, SyncSchedule] = {"H = 1": ConstantH(1), "H = 4": ConstantH(4), "QSR": QSR(0.6, 4)}
PEAK = 0.3


def time_schedules(
    processes: Processes, steps: int, repeats: int, local_batch: int, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """In every process: train under each schedule `repeats` times, in turn. Returns seconds by schedule.

    Between two timings all processes wait for each other, so that a run begins together; a run ends with an average, so that
    it ends together.
    """
    task = NoisyDigits.make([seed])
    lr = cosine_lr(PEAK, steps)
    places, labels = task.order(0, steps, processes.world * local_batch)
    own = slice(processes.rank * local_batch, (processes.rank + 1) * local_batch)
    batches = [(task.train_x[0, places[0, t, own]], labels[0, t, own]) for t in range(steps)]
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    for repeat in range(repeats + 1):
        for name, schedule in TIMED.items():
            model = network(SIZES, seed=seed)
            inner = torch.optim.SGD(model.parameters(), lr=PEAK)
            optimizer = LocalOptimizer(inner, schedule, total_steps=steps)
            # The first turn warms caches and connections; a few steps do.
            length = steps if repeat else min(steps, 20)
            processes.wait()
            begun = time.perf_counter()
            for step in range(length):
                inner.param_groups[0]["lr"] = lr(step)
                inner.zero_grad(set_to_none=True)
                cross_entropy(model, batches[step]).backward()
                optimizer.step()
            optimizer.finish()
            if repeat:
                seconds[name].append(time.perf_counter() - begun)
    return {"seconds": seconds, "parameters": sum(p.numel() for p in network(SIZES).parameters())}


def predict(record: Record, stages: Stages, *, processes: int, steps: int, repeats: int, seed: int) -> None:
    """Fit on H = 1 and H = 4, predict QSR, and say how far off it is. Every number here is volatile."""

    def measured() -> dict[str, Any]:
        arguments = {"steps": steps, "repeats": repeats, "local_batch": 16, "seed": seed}
        return launch(f"{__name__}:time_schedules", arguments, processes=processes)

    found = stages.get("wall clock", measured)
    lr = cosine_lr(PEAK, steps)
    reports = {name: communication_volume(one, lr, steps) for name, one in TIMED.items()}
    best = {name: min(values) for name, values in found["seconds"].items()}
    model = CostModel.fit([(steps, reports[name].rounds, best[name]) for name in ("H = 1", "H = 4")])
    rows = []
    for name, report in reports.items():
        share = 100 * report.fraction
        rows.append(
            [name, share, report.rounds, best[name], max(found["seconds"][name]), model.seconds(report)]
        )
    record.table("wall_clock", ["schedule", "share", "rounds", "seconds", "slowest", "model"], rows)
    record.metric("clock_processes", processes, "exact")
    record.metric("clock_step_ms", 1000 * model.t_step, "volatile")
    record.metric("clock_sync_ms", 1000 * model.t_sync, "volatile")
    record.metric("clock_sync_share", 100 * model.share(reports["H = 1"]), "volatile")
    record.metric("clock_measured", best["QSR"], "volatile")
    record.metric("clock_predicted", model.seconds(reports["QSR"]), "volatile")
    record.metric("clock_error", abs(model.seconds(reports["QSR"]) / best["QSR"] - 1), "volatile")
    record.metric("clock_speedup", best["H = 1"] / best["QSR"], "volatile")
    record.metric("clock_parameters", found["parameters"], "exact")
