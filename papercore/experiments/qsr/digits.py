"""Noisy digits under six ways to synchronise: what the paper's claim of better accuracy looks like at this size.

Growth coefficients were chosen so that the methods communicate alike (about 6 % of data parallel), not for accuracy; nothing was
tuned on these seeds. All methods of a block see the same data in the same order from the same start, seed by seed, so that
differences are paired.

Blocks
    main        lr 1.0, 2,000 steps: the comparison
    control     the same, 300 steps: a run too short for a slow drift. The paper expects no gain there
    hot         lr 1.6: a learning rate at which local methods begin to break

Glossary
    engine      "virtual": K workers in one process, several methods in parallel processes; "process": K real processes under
                torchrun that average with `LocalOptimizer`
    share       rounds / steps, percent
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from papercore.experiments.qsr.config import QuickConfig
from papercore.lab.noisy_digits import NoisyDigits
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.statistics import paired, summarize
from papercore.lab.worker_training import data_parallel, train_workers
from papercore.local_sgd import QSR, ConstantH, SyncSchedule, cosine_lr

METHODS: dict[str, SyncSchedule] = {
    "data parallel": ConstantH(1),
    "H = 4": ConstantH(4),
    "H = 16": ConstantH(16),
    "1/η rule": QSR(10.5, 4, power=1),
    "QSR": QSR(2.7, 4),
    "cubic rule": QSR(1.75, 4, power=3),
}
NAMES = {
    "data parallel": "dp",
    "H = 4": "h4",
    "H = 16": "h16",
    "1/η rule": "inverse",
    "QSR": "qsr",
    "cubic rule": "cubic",
}
CONTROL = ("data parallel", "H = 16", "QSR")
# At lr 1.6 the coefficient grows with the rate: the schedule is the same.
HOT: dict[str, SyncSchedule] = {
    "data parallel": ConstantH(1),
    "H = 16": ConstantH(16),
    "QSR": QSR(4.3, 4),
}
WARMUP = 100
POINTS = 21  # of a curve


@dataclass(frozen=True)
class Job:
    """One method in one block, as plain values: it travels to another process."""

    block: str
    method: str
    seeds: tuple[int, ...]
    lr: float
    steps: int
    warmup: int
    k: int
    local_batch: int
    device: str

    @property
    def schedule(self) -> SyncSchedule:
        return HOT[self.method] if self.block == "hot" else METHODS[self.method]

    @property
    def points(self) -> list[int]:
        return sorted({round(x) for x in np.linspace(0, self.steps, POINTS)})


def jobs(config: QuickConfig) -> list[Job]:
    """What is to be trained, the longest first."""
    base = 1000 * config.seed
    seeds = tuple(base + i for i in range(config.seeds))
    warmup = min(WARMUP, config.steps // 4), min(WARMUP, config.control_steps // 3)
    device = str(config.torch_device())
    shared = (config.workers, config.local_batch, device)
    out = [Job("main", name, seeds, config.lr, config.steps, warmup[0], *shared) for name in METHODS]
    hot = seeds[: config.hot_seeds]
    out += [Job("hot", name, hot, config.hot_lr, config.steps, warmup[0], *shared) for name in HOT]
    out += [Job("control", name, seeds, config.lr, config.control_steps, warmup[1], *shared) for name in CONTROL]  # fmt: skip
    return out


def train(job: Job) -> dict[str, Any]:
    """One method, all seeds, virtual workers. Runs in any process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # small matrices: several threads would wait for each other, and sums change their order
    try:
        task = NoisyDigits.make(job.seeds, device=job.device)
        lr = cosine_lr(job.lr, job.steps, warmup_steps=job.warmup)
        shared: dict[str, Any] = {
            "k": job.k, "local_batch": job.local_batch, "evaluate_at": job.points, "keep_diverged": True,
        }  # fmt: skip
        if job.method == "data parallel":
            run = data_parallel(task, lr, job.steps, **shared)
        else:
            run = train_workers(task, job.schedule, lr, job.steps, warmup_steps=job.warmup, **shared)
    finally:
        torch.set_num_threads(threads)
    return {
        "steps": run.steps, "accuracy": run.test_accuracy, "test_loss": run.test_loss, "train_loss": run.train_loss,
        "share": 100 * run.report.fraction, "lost": int(run.lost.sum()),
    }  # fmt: skip


@contextmanager
def _workers(
    config: QuickConfig, missing: list[Job]
) -> Iterator[Callable[[Job], Callable[[], dict[str, Any]]]]:
    """A way to compute jobs: started now in parallel processes where there are cores for it, else when asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    several = min(cores, config.jobs, len(missing))
    if several < 2 or config.torch_device().type != "cpu":
        yield lambda job: lambda: train(job)
        return
    # Fresh interpreters: a forked child would inherit torch's threads in an unusable state.
    fresh = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(several, fresh, _end_with, (os.getpid(),))
    try:
        futures = {job: pool.submit(train, job) for job in missing}
        yield lambda job: futures[job].result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _end_with(parent: int) -> None:
    """In a worker: end when the process that asked for the work is gone; nobody would take the result."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Train every job, or take it from an interrupted run, and fill the record."""
    if config.engine == "process":
        from papercore.experiments.qsr.digits_processes import train_under_torchrun as by_processes

        found = {
            job: stages.get(_stage(job), lambda job=job: by_processes(job, config.processes))  # type: ignore[misc]
            for job in jobs(config)
        }
    else:
        todo = jobs(config)
        missing = [job for job in todo if not stages.done(_stage(job))]
        with _workers(config, missing) as compute:
            found = {job: stages.get(_stage(job), compute(job)) for job in todo}
    for block in ("main", "control", "hot"):
        _block(record, block, {job.method: found[job] for job in found if job.block == block})


def _stage(job: Job) -> str:
    return f"digits {job.block} {NAMES[job.method]}"


def _block(record: Record, block: str, runs: dict[str, dict[str, Any]]) -> None:
    """Table, curves and paired differences of one block. Accuracies in percent."""
    end = {name: 100 * run["accuracy"][:, -1] for name, run in runs.items()}
    reference = end["H = 16"]
    rows: list[list[Any]] = []
    for name, run in runs.items():
        kept = np.isfinite(end[name]) & np.isfinite(reference)
        gap = paired(end[name][kept], reference[kept]) if name != "H = 16" and kept.sum() > 1 else None
        wins = int((end[name][kept] > reference[kept]).sum())
        mean = summarize(end[name][np.isfinite(end[name])])
        rows.append(
            [
                name, run["share"], mean.mean, mean.se,
                gap.difference if gap else None, gap.se if gap else None, wins if gap else None, int(kept.sum()),
                float(np.nanmean(run["train_loss"][:, -1])), float(np.nanmean(run["test_loss"][:, -1])), run["lost"],
            ]
        )  # fmt: skip
        short = NAMES[name]
        record.array(f"digits_{block}_steps", run["steps"])
        for what in ("accuracy", "test_loss", "train_loss"):
            record.array(f"digits_{block}_{what}_{short}", np.asarray(run[what], dtype=np.float32))
        record.metric(f"{block}_{short}_share", run["share"], "exact")
        # At a rate where single runs break, the means are those of the broken ones, and these differ between machines.
        moves = {"accuracy": "abs:2", "train_loss": "abs:0.1", "lost": "exact"}
        for what, value in (("accuracy", mean.mean), ("train_loss", rows[-1][8]), ("lost", run["lost"])):
            record.metric(f"{block}_{short}_{what}", value, "volatile" if block == "hot" else moves[what])
    columns = ["method", "share", "accuracy", "se", "difference", "difference se", "wins", "seeds", "train loss", "test loss", "lost"]  # fmt: skip
    record.table(f"digits_{block}", columns, rows)
    record.metric(f"{block}_seeds", len(reference), "exact")
    pairs = [("qsr", "QSR", "h16", "H = 16"), ("h16", "H = 16", "dp", "data parallel"), ("qsr", "QSR", "dp", "data parallel")]  # fmt: skip
    for first, name, second, other in pairs:
        kept = np.isfinite(end[name]) & np.isfinite(end[other])
        gap = paired(end[name][kept], end[other][kept])
        hot = block == "hot"
        record.metric(f"{block}_{first}_minus_{second}", gap.difference, "volatile" if hot else "abs:2")
        record.metric(f"{block}_{first}_minus_{second}_se", gap.se, "volatile" if hot else "abs:0.5")
        record.metric(f"{block}_{first}_minus_{second}_p", gap.p, "volatile")
    if block == "main":
        gap = paired(end["QSR"], end["1/η rule"])
        record.metric("main_qsr_minus_inverse", gap.difference, "abs:2")
        record.metric("main_qsr_minus_inverse_se", gap.se, "abs:0.5")
        for short, name in (("h16", "H = 16"), ("qsr", "QSR"), ("dp", "data parallel")):
            record.metric(
                f"main_{short}_test_loss", float(np.nanmean(runs[name]["test_loss"][:, -1])), "abs:0.2"
            )
