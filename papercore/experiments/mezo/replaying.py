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
from papercore.mezo import MeZO, ZOLog, noise, replay


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
        "bytes_20000": bytes_of_log(log, 20_000),
    }


def bytes_of_log(log: ZOLog, steps: int) -> int:
    """Size on disk of this log after so many steps, the ones it lacks appended with scalars drawn at random."""
    settings = log.settings(len(log) - 1)
    for scalar in noise(0, 0, max(0, steps - len(log))).tolist():
        log.append([scalar], settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.zolog"
        log.save(path)
        return path.stat().st_size
