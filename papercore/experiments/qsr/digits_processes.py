"""The digits experiment with K real processes: the same schedules, data and start as the virtual workers, over torchrun.

Every process holds one worker of every seed, stacked, and one all-reduce averages them all. The order of samples is that of the
virtual engine, so that with as many processes as workers both engines train the same models up to rounding. Here a worker is a
process: `--set processes=8` for the K = 8 of the page, which wants eight cores.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from papercore.lab.noisy_digits import NoisyDigits, logits, mean_loss
from papercore.lab.torchrun import Processes, launch
from papercore.local_sgd import LocalOptimizer, communication_volume, cosine_lr

if TYPE_CHECKING:
    from papercore.experiments.qsr.digits import Job


def train_under_torchrun(job: Job, processes: int) -> dict[str, Any]:
    """Start the processes, train, and return what `digits.train` returns. The K of the job becomes the number of processes."""
    job = dataclasses.replace(job, k=processes)
    return launch(
        f"{__name__}:train_rank", {"job": dataclasses.asdict(job)}, processes=processes, timeout=3600
    )


def train_rank(processes: Processes, job: dict[str, Any]) -> dict[str, Any]:
    """One process's part of a job."""
    from papercore.experiments.qsr.digits import Job

    todo = Job(**{**job, "seeds": tuple(job["seeds"])})
    task = NoisyDigits.make(todo.seeds)
    lr = cosine_lr(todo.lr, todo.steps, warmup_steps=todo.warmup)
    weights = {name: nn.Parameter(value) for name, value in task.start().items()}
    inner = torch.optim.SGD(weights.values(), lr=todo.lr)
    schedule = todo.schedule
    optimizer = LocalOptimizer(inner, schedule, total_steps=todo.steps, warmup_steps=todo.warmup)
    curves: dict[str, list[np.ndarray]] = {"test_accuracy": [], "test_loss": [], "train_loss": []}
    rows = torch.arange(len(todo.seeds))[:, None]
    own = slice(processes.rank * todo.local_batch, (processes.rank + 1) * todo.local_batch)
    points = set(todo.points)
    if 0 in points:
        _look(curves, task, weights, processes)
    for step in range(todo.steps):
        places, labels = task.order(step, step + 1, processes.world * todo.local_batch)
        x = task.train_x[rows, places[:, 0, own]]
        inner.param_groups[0]["lr"] = lr(step)
        inner.zero_grad(set_to_none=True)
        # Seeds share no weight, so the gradient of the sum holds every seed's own gradient.
        mean_loss(logits(weights, x), labels[:, 0, own]).nan_to_num().sum().backward()
        optimizer.step()
        if step + 1 in points:
            _look(curves, task, weights, processes)
    optimizer.finish()
    report = communication_volume(schedule, lr, todo.steps, warmup_steps=todo.warmup)
    curve = {name: np.stack(values, 1) for name, values in curves.items()}
    return {
        "steps": np.array(sorted(points)), "accuracy": curve["test_accuracy"], "test_loss": curve["test_loss"],
        "train_loss": curve["train_loss"], "share": 100 * report.fraction,
        "lost": int((~np.isfinite(curve["test_loss"][:, -1])).sum()), "rounds": optimizer.rounds_done,
    }  # fmt: skip


@torch.no_grad()
def _look(
    curves: dict[str, list[np.ndarray]],
    task: NoisyDigits,
    weights: dict[str, nn.Parameter],
    processes: Processes,
) -> None:
    """Evaluate the mean of the processes' weights, without changing them."""
    parts = processes.gather({name: value.detach().clone() for name, value in weights.items()})
    mean = {name: torch.stack([part[name] for part in parts]).mean(0) for name in weights}
    for name, value in task.evaluate(mean).items():
        curves[name].append(value.numpy())
