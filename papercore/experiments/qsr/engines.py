"""K real processes against K virtual workers: the same run twice, compared bit by bit.

Both make the same elementary operations in the same order when each has one thread, oneDNN is off, and the sum over workers runs
in the order of the ranks. A network on digits, SGD with momentum, rounds by QSR.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector

from papercore.lab.noisy_digits import NoisyDigits, network
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.torchrun import Processes, launch
from papercore.lab.worker_training import cross_entropy
from papercore.local_sgd import QSR, LocalOptimizer, VirtualWorkers, cosine_lr

PEAK, MOMENTUM, LOCAL_BATCH = 0.05, 0.9, 4
SCHEDULE = QSR(0.1, 4)


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """One thread, and matrix products without oneDNN, whose kernels depend on the shape of a batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Some versions of torch warn of Intel's GPUs when this flag is set.
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),
            torch.backends.mkldnn.flags(enabled=False),
        ):
            yield
    finally:
        torch.set_num_threads(threads)


def by_processes(processes: Processes, steps: int, seed: int) -> dict[str, Any]:
    """One process's part; returns the final weights [P] and the number of averages."""
    with _plain_arithmetic():
        task, lr = NoisyDigits.make([seed]), cosine_lr(PEAK, steps)
        places, labels = task.order(0, steps, processes.world * LOCAL_BATCH)
        own = slice(processes.rank * LOCAL_BATCH, (processes.rank + 1) * LOCAL_BATCH)
        model = network(seed=seed)
        inner = torch.optim.SGD(model.parameters(), lr=PEAK, momentum=MOMENTUM)
        optimizer = LocalOptimizer(inner, SCHEDULE, total_steps=steps, reduction="ordered")
        for step in range(steps):
            inner.param_groups[0]["lr"] = lr(step)
            optimizer.zero_grad()
            x, y = task.train_x[0, places[0, step, own]], labels[0, step, own]
            cross_entropy(model, (x, y)).backward()
            optimizer.step()
        optimizer.finish()
    weights = parameters_to_vector(model.parameters()).detach().numpy()
    return {"weights": weights, "rounds": optimizer.rounds_done, "bytes": optimizer.bytes_sent}


def by_virtual_workers(k: int, steps: int, seed: int) -> np.ndarray:
    """The same with virtual workers: final weights [P]."""
    with _plain_arithmetic():
        task, lr = NoisyDigits.make([seed]), cosine_lr(PEAK, steps)
        places, labels = task.order(0, steps, k * LOCAL_BATCH)
        workers = VirtualWorkers(
            network(seed=seed),
            k,
            lambda params: torch.optim.SGD(params, lr=PEAK, momentum=MOMENTUM),
            SCHEDULE,
            total_steps=steps,
        )
        for step in range(steps):
            workers.optimizer.param_groups[0]["lr"] = lr(step)
            batch = task.train_x[0, places[0, step]], labels[0, step]
            workers.step(cross_entropy, tuple(part.unflatten(0, (k, LOCAL_BATCH)) for part in batch))
        workers.finish()
    return parameters_to_vector(workers.mean_model().parameters()).detach().numpy()


def compare(record: Record, stages: Stages, *, processes: int, steps: int, seed: int) -> None:
    """Largest difference between the two engines' final weights, beside the size of the weights."""

    def measured() -> dict[str, Any]:
        real = launch(f"{__name__}:by_processes", {"steps": steps, "seed": seed}, processes=processes)
        virtual = by_virtual_workers(processes, steps, seed)
        return {
            "difference": float(np.abs(real["weights"] - virtual).max()),
            "equal": int((real["weights"] == virtual).sum()),
            "numbers": len(virtual),
            "rounds": real["rounds"],
            "bytes": real["bytes"],
        }

    found = stages.get("engines", measured)
    record.metric("engine_processes", processes, "exact")
    record.metric("engine_steps", steps, "exact")
    # Equal bits need kernels that compute a batch of matrices as they compute each one alone; not every CPU's do.
    record.metric("engine_difference", found["difference"], "abs:1e-3")
    record.metric("engine_equal", found["equal"], "volatile")
    record.metric("engine_numbers", found["numbers"], "exact")
    record.metric("engine_rounds", found["rounds"], "exact")
    record.metric("engine_bytes", found["bytes"], "exact")
