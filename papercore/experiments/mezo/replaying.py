"""From the log alone: rebuild the fine-tuned model at any step, without data and without a forward pass."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from papercore.experiments.mezo.arms import ARMS, Task
from papercore.experiments.mezo.language import Examples
from papercore.lab.decoder import Decoder
from papercore.mezo import MeZO, ZOLog, replay


def log_and_replay(
    model: Decoder, lr: float, data: Examples, test: Examples, *, steps: int, seed: int
) -> dict[str, Any]:
    """Train with MeZO, save the log, load it, replay it on the untouched base.

    Returns: difference (largest absolute gap of replayed and trained weights; 0 means bit for bit), at and accuracy (test
    accuracy of the model replayed to each step), bytes (size of this log), bytes_20000 (size of a log of 20,000 steps).
    """
    task = Task(model, ARMS["full"], np.random.default_rng([seed, 1]))
    base = copy.deepcopy(task.model)
    ids = task.inputs(data)
    optimizer = MeZO(task.model.named_parameters(), lr=lr, seed=seed)
    with torch.no_grad():
        for _ in range(steps):
            optimizer.step(lambda: task.objective(ids, data.topics))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zolog"
        optimizer.log.save(path)
        size = path.stat().st_size
        log = ZOLog.load(path)
    again = replay(copy.deepcopy(base), log)
    pairs = zip(task.model.parameters(), again.parameters(), strict=True)
    difference = max(float((a - b).abs().max().detach()) for a, b in pairs)
    at = sorted({round(i * steps / 10) for i in range(11)})
    accuracy = []
    for step in at:
        task.model = replay(copy.deepcopy(base), log, steps=step)
        accuracy.append(task.accuracy(task.inputs(test), test.topics))
    return {
        "difference": difference,
        "at": np.array(at),
        "accuracy": np.array(accuracy),
        "bytes": size,
        "bytes_20000": bytes_of_log(20_000),
    }


def bytes_of_log(steps: int) -> int:
    """Size on disk of a real log of so many steps (of a one-weight model: the size does not depend on the model's)."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = MeZO([weight], lr=1e-3)
    with torch.no_grad():
        for step in range(steps):
            # A loss that keeps changing sign, so that the scalars cannot be compressed away.
            optimizer.step(lambda step=step: float(weight.sum()) * ((step * 7919) % 13 - 6.3))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.zolog"
        optimizer.log.save(path)
        return path.stat().st_size
