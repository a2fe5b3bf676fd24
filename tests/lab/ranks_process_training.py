"""What the processes of test_process_training.py do; started by `papercore.lab.torchrun.launch`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from papercore.lab.noisy_digits import NoisyDigits, network
from papercore.lab.process_training import RankCheckpoint, StepSampler, train_processes
from papercore.lab.torchrun import Processes
from papercore.local_sgd import QSR, SWAP, LocalOptimizer, cosine_lr

STEPS, BATCH = 14, 8
LR = cosine_lr(0.1, STEPS)


class Stop(Exception):
    """An interruption in the middle of a round."""


def run(
    processes: Processes,
    *,
    stop_at: int = -1,
    broken_at: int = -1,
    folder: Path | None = None,
    parallel: bool = False,
    micro_batch: int = 0,
    seconds: float = math.inf,
) -> tuple[np.ndarray, dict[str, Any]]:
    """One run, or a part of it; returns this process's weights and what the loop says."""
    task = NoisyDigits.make([0])
    model = network(seed=0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = SWAP(0) if parallel else QSR(0.15, 2)
    optimizer = LocalOptimizer(inner, schedule, total_steps=STEPS)

    def batches(step: int):
        sampler = StepSampler(
            400, BATCH, STEPS, seed=3, rank=processes.rank, world=processes.world, start=step
        )
        for places in sampler:
            if step == stop_at:
                raise Stop
            x = task.train_x[0, places]
            yield (x * math.nan if step == broken_at and processes.rank == 1 else x), task.train_y[0, places]
            step += 1

    checkpoint = None
    if folder is not None:
        checkpoint = RankCheckpoint(folder, processes, {"model": model, "optimizer": optimizer})
    try:
        found = train_processes(
            model, optimizer, LR, batches, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), processes,
            steps=STEPS, evaluate=lambda net, step: {"sum": float(parameters_to_vector(net.parameters()).sum())},
            evaluate_every=5, parallel=parallel, micro_batch=micro_batch, checkpoint=checkpoint,
            checkpoint_every=1 if folder else 0, seconds=seconds,
        )  # fmt: skip
    except Stop:
        found = {}
        optimizer._left.update(steps=0)  # the run is abandoned on purpose
    return parameters_to_vector(model.parameters()).detach().numpy(), found


def everything(processes: Processes, folder: str) -> dict[str, Any]:
    """All runs that the tests compare."""
    torch.set_num_threads(1)
    root, out = Path(folder), {}
    weights, found = run(processes)
    out["whole"], out["losses"] = weights, found["losses"]
    out["evaluations"], out["rounds"] = found["evaluations"], found["rounds"]
    out["same_on_all"] = bool(all(np.array_equal(weights, other) for other in processes.gather(weights)))

    # Stopped inside a round (rounds of 2 steps at first, longer later), then resumed from the files.
    run(processes, folder=root / "inside", stop_at=9)
    out["resumed"], again = run(processes, folder=root / "inside")
    out["resumed_losses"] = again["losses"]
    out["resumed_evaluations"] = again["evaluations"]
    out["files"] = sorted(path.name for path in (root / "inside").iterdir()) if processes.first else []

    _, first = run(processes, folder=root / "slices", seconds=-1.0)
    out["slice_step"], out["slice_finished"] = first["step"], first["finished"]
    out["sliced"], _ = run(processes, folder=root / "slices")

    # One rank loses its newest file: all go back to the newest step that every rank has.
    run(processes, folder=root / "lost", stop_at=9)
    if processes.rank == 1:
        (root / "lost" / "step-000000009-rank-1.pt").unlink()
    processes.wait()
    out["after_loss"], _ = run(processes, folder=root / "lost")

    out["parallel"], parallel = run(processes, parallel=True)
    out["parallel_rounds"], out["parallel_bytes"] = parallel["rounds"], parallel["bytes_sent"]
    out["micro"], _ = run(processes, micro_batch=3)
    try:
        run(processes, broken_at=4)
        said = ""
    except FloatingPointError as error:
        said = str(error)
    out["said"] = processes.gather(said)

    if processes.rank == 1:
        (root / "inside" / f"step-{STEPS:09}-rank-1.pt").write_bytes(b"not a file of torch")
    processes.wait()
    try:
        run(processes, folder=root / "inside")
        refused = ""
    except ValueError as error:
        refused = str(error)
    out["refused"] = processes.gather(refused)
    return out


def fails(processes: Processes) -> dict[str, Any]:
    """The second process fails."""
    if processes.rank == 1:
        raise ValueError("the second process has had enough")
    return {}
