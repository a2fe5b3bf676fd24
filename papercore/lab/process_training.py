"""Training by K real processes: shared data, local steps, averages, and checkpoints that resume inside a round.

`train_processes` is the loop: every process makes its local steps on its own slices of the batches, `LocalOptimizer` averages,
models are evaluated at averages alone, and every process keeps its own checkpoint, because optimizer state and, inside a
round, weights differ between processes. How to start the processes: torchrun.py.

Glossary
    rank, world    number of this process; number of processes (K)
    step           t, local steps made by every process
    global batch   samples of one step over all processes; a process takes the slice [rank * b, (rank + 1) * b)
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from papercore.lab.paths import write_atomically
from papercore.lab.torchrun import Processes
from papercore.local_sgd import LocalOptimizer

_NOTES_EVERY = 50  # steps between two exchanges of notes in data parallel training


class StepSampler:
    """Which samples this process draws, step by step: a batch sampler for `torch.utils.data.DataLoader`.

    Every epoch all processes make the same permutation, cut it into global batches, drop the rest, and take disjoint slices.
    A step draws the same samples whatever step the sampler starts at, so that a resumed run goes on with its data.

    Args:
        size: samples of the data set.
        batch: samples of one step over all processes; must divide evenly.
        steps: T of the whole run; start: step to begin with.
        seed: of the permutations.
        with_epoch: yield pairs (epoch, index), for a data set that seeds its augmentation with them.

    Raises:
        ValueError: a batch that does not divide, or is larger than the data set.

    >>> [StepSampler(10, 4, 2, seed=0, rank=r, world=2).slice(0) for r in (0, 1)]
    [[4, 1], [7, 5]]
    """

    def __init__(
        self,
        size: int,
        batch: int,
        steps: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        with_epoch: bool = False,
    ) -> None:
        if batch < 1 or batch % world:
            raise ValueError(
                f"a global batch of {batch} does not divide over {world} processes: choose a multiple of {world}."
            )
        if batch > size:
            raise ValueError(
                f"a global batch of {batch} from {size} samples: no full batch fits into an epoch."
            )
        self.size, self.batch, self.steps, self.seed = size, batch, steps, seed
        self.rank, self.world, self.start, self.with_epoch = rank, world, start, with_epoch
        self.steps_per_epoch = size // batch
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def slice(self, step: int) -> list[int]:
        """Indices of this process at a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=draw)
        own = self.batch // self.world
        first = place * self.batch + self.rank * own
        return self._order[first : first + own].tolist()

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Any]]:
        for step in range(self.start, self.steps):
            epoch = step // self.steps_per_epoch
            yield [(epoch, index) if self.with_epoch else index for index in self.slice(step)]


class RankCheckpoint:
    """One file a rank, for all ranks at the same step; a run resumes at the newest step that every rank has.

    Args:
        folder: where the files lie: step-<step>-rank-<rank>.pt. Files of the two newest steps are kept.
        parts: objects with state_dict and load_state_dict, by name.
    """

    def __init__(self, folder: Path, processes: Processes, parts: Mapping[str, Any]) -> None:
        self.folder, self.processes, self.parts = folder, processes, dict(parts)

    def save(self, step: int, extra: Mapping[str, Any]) -> None:
        """Write this rank's file, under a temporary name and then renamed."""
        state = {
            "step": step,
            "world": self.processes.world,
            "parts": {k: p.state_dict() for k, p in self.parts.items()},
            "extra": dict(extra),
        }
        write_atomically(self._path(step), lambda path: torch.save(state, path))
        for old in self._steps()[:-2]:
            self._path(old).unlink(missing_ok=True)

    def load(self) -> tuple[int, dict[str, Any]]:
        """(step, extra) after restoring the parts; (0, {}) where no step is on the disk of every rank.

        Raises:
            ValueError: the files are of another number of processes, or damaged.
        """
        common = set.intersection(*(set(steps) for steps in self.processes.gather(self._steps())))
        if not common:
            return 0, {}
        step = max(common)
        problem, state = "", {}
        try:
            state = torch.load(self._path(step), weights_only=False, map_location="cpu")
            if state["world"] != self.processes.world:
                problem = f"was written by {state['world']} processes, this run has {self.processes.world}"
        except (RuntimeError, KeyError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            problem = f"is damaged: {error}"
        # All ranks must agree to go on, or one would wait for ever for the others.
        found = [text for text in self.processes.gather(problem and f"{self._path(step)} {problem}") if text]
        if found:
            raise ValueError(f"{found[0]}. Delete {self.folder} to start afresh.")
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        return step, state["extra"]

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09}-rank-{self.processes.rank}.pt"

    def _steps(self) -> list[int]:
        return sorted(
            int(path.name.split("-")[1]) for path in self.folder.glob(f"step-*-rank-{self.processes.rank}.pt")
        )


def train_processes(
    model: nn.Module,
    optimizer: LocalOptimizer,
    lr_fn: Callable[[int], float],
    batches: Callable[[int], Iterator[Any]],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    processes: Processes,
    *,
    steps: int,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    clip: float = math.inf,
    micro_batch: int = 0,
    parallel: bool = False,
    checkpoint: RankCheckpoint | None = None,
    checkpoint_every: int = 0,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """The loop: local steps, averages, evaluation at averages, checkpoints.

    Args:
        model: this process's copy, in train mode, with the same weights as the others'.
        optimizer: around the model's parameters; its schedule says when to average.
        lr_fn: step -> learning rate; set before every step, so that a round begins with the rate of its first step.
        batches: first step -> this process's batches from that step on.
        loss_fn: (model, batch) -> scalar.
        evaluate: (model, step) -> numbers by name; called on all processes with the same weights, at the first average at or
            after each multiple of `evaluate_every`, and at the end. Batch-norm statistics are its own business.
        clip: largest norm of the gradient of a step.
        micro_batch: samples that go through the model at once; their gradients are added up. 0: the whole batch of the process.
            A batch is then a tensor or a tuple of tensors, and `loss_fn` a mean over samples.
        parallel: data parallel training instead: gradients are averaged at every step, so that every step counts as an average.
            `optimizer` is then made with a schedule of one round (`SWAP(0)`).
        checkpoint, checkpoint_every: where to keep the state, and after how many steps.
        seconds: stop after so long, with a checkpoint; the result then says "finished": False.

    Returns:
        "losses" [T] (mean over processes), "evaluations" (list of dicts with "step"), "rounds", "bytes_sent", "seconds",
        "step", "finished".

    Raises:
        FloatingPointError: a process's loss is not finite; raised on all of them at the next average.
    """
    begun = time.monotonic()
    done, extra = checkpoint.load() if checkpoint else (0, {})
    losses: list[float] = list(extra.get("losses", []))
    evaluations: list[dict[str, float]] = list(extra.get("evaluations", []))
    spent = float(extra.get("seconds", 0.0))
    wanted = int(extra.get("wanted", evaluate_every))
    broken, out_of_time = -1, False
    step = done

    def kept() -> dict[str, Any]:
        passed = spent + time.monotonic() - begun
        return {"losses": losses, "evaluations": evaluations, "seconds": passed, "wanted": wanted}

    source = batches(done)
    while step < steps:
        rate = lr_fn(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        value = _gradients(model, loss_fn, next(source), micro_batch)
        losses.append(value)
        if not math.isfinite(value):
            # Nothing of it reaches the weights; the others hear of it at the next average.
            broken = step if broken < 0 else broken
            optimizer.zero_grad(set_to_none=True)
        if parallel:
            _average_gradients(model, processes)
        if math.isfinite(clip):
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        averaged = optimizer.step()
        step += 1
        evaluating = evaluate is not None and (step == steps or (evaluate_every > 0 and step >= wanted))
        # Under data parallel training weights are equal at every step; an exchange of notes at each would cost more than it says.
        meeting = averaged or (parallel and (evaluating or step % _NOTES_EVERY == 0))
        if meeting:
            # One exchange serves both: every process learns who broke, and whether the time of the first one is over.
            notes = processes.gather((broken, time.monotonic() - begun > seconds))
            bad = [(where, rank) for rank, (where, _) in enumerate(notes) if where >= 0]
            if bad:
                raise FloatingPointError(
                    f"the loss of process {bad[0][1]} is not finite at step {bad[0][0]}: lower the learning rate."
                )
            out_of_time = notes[0][1]
            if evaluate is not None and evaluating:
                evaluations.append({"step": step, **evaluate(model, step)})
                wanted = (step // evaluate_every + 1) * evaluate_every if evaluate_every else steps
                model.train()
        due = checkpoint_every and step % checkpoint_every == 0 and step < steps
        if checkpoint and (due or (out_of_time and step < steps)):
            checkpoint.save(step, kept())
        if out_of_time:
            break
    if step == steps:
        optimizer.finish()
    if step == steps and checkpoint:
        checkpoint.save(step, kept())
    every = np.mean(processes.gather(losses), axis=0)
    return {
        "losses": np.asarray(every), "evaluations": evaluations, "rounds": step if parallel else optimizer.rounds_done,
        "bytes_sent": step * _gradient_bytes(model) if parallel else optimizer.bytes_sent, "seconds": kept()["seconds"], "step": step, "finished": step == steps,
    }  # fmt: skip


def _gradients(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, micro_batch: int
) -> float:
    """Fill `.grad` with the gradient of the mean loss over the batch, in parts of `micro_batch` samples; return that loss."""
    parts = [batch]
    if micro_batch:
        columns = batch if isinstance(batch, tuple) else (batch,)
        split = list(zip(*(column.split(micro_batch) for column in columns), strict=True))
        parts = split if isinstance(batch, tuple) else [part[0] for part in split]
    sizes = [len(part[0] if isinstance(part, tuple) else part) for part in parts] if len(parts) > 1 else [1]
    total = 0.0
    for part, size in zip(parts, sizes, strict=True):
        loss = loss_fn(model, part) * (size / sum(sizes))
        total += float(loss.detach())
        if not math.isfinite(total):
            break
        loss.backward()
    return total


def _average_gradients(model: nn.Module, processes: Processes) -> None:
    """Replace gradients by their mean over the processes, in one exchange; a missing one counts as zero."""
    params = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).detach().flatten().float() for p in params]
    )
    if processes.world > 1:
        dist.all_reduce(flat)
        flat /= processes.world
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)


def _gradient_bytes(model: nn.Module) -> int:
    return 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
