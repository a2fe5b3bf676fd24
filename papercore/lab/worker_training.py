"""Train S seeds x K virtual workers on noisy digits under a synchronization schedule, and say how they did.

One call trains every seed and every worker at once (`papercore.local_sgd.VirtualWorkers`). Data parallel training is the same
call with one worker and the joined batch: it draws the same samples in the same order, so that methods are compared seed by
seed, at equal steps and equal data.

What is evaluated is always the average of the workers, never one of them. Between two averages that is a model which no worker
holds at that moment; at the end of a run the workers have just averaged.

Glossary
    S, K, E      seeds, workers, points of a curve
    steps        T, local steps of every worker
    state        weights, name -> Tensor[S, ...], averaged over the workers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.lab.noisy_digits import NoisyDigits, network
from papercore.local_sgd import CommReport, SyncSchedule, VirtualWorkers, communication_volume

_BLOCK = 500  # steps whose samples are looked up at once: memory against calls


@dataclasses.dataclass(frozen=True)
class Run:
    """What one method did, for every seed.

    Attributes:
        steps: [E] steps made when a point of the curves was taken.
        test_accuracy, test_loss, train_loss: [S, E]; losses in nat; NaN where the weights are not finite.
        spread: [S, E] mean squared distance of the workers to their mean at that point; 0 right after an average.
        state: final averaged weights, name -> Tensor[S, ...].
        report: rounds and their count; `.fraction` is the share of data parallel communication.
    """

    steps: NDArray[np.int64]
    test_accuracy: NDArray[np.float64]
    test_loss: NDArray[np.float64]
    train_loss: NDArray[np.float64]
    spread: NDArray[np.float64]
    state: dict[str, Tensor]
    report: CommReport

    @property
    def lost(self) -> NDArray[np.bool_]:
        """[S] seeds whose training diverged: no finite test loss at the end."""
        return ~np.isfinite(self.test_loss[:, -1])


def train_workers(
    task: NoisyDigits,
    schedule: SyncSchedule,
    lr_fn: Callable[[int], float],
    steps: int,
    *,
    k: int = 8,
    local_batch: int = 4,
    warmup_steps: int = 0,
    momentum: float = 0.0,
    evaluate_at: Sequence[int] = (),
    start: dict[str, Tensor] | None = None,
    first_step: int = 0,
    keep_diverged: bool = False,
    after_step: Callable[[int, bool, VirtualWorkers], None] | None = None,
) -> Run:
    """Train under `schedule` with plain SGD (or SGD with local momentum).

    Args:
        task: data of the S seeds.
        lr_fn: step of this run (from 0) -> learning rate.
        steps: T of this run.
        k, local_batch: workers, and samples of each worker a step. Data parallel training is `data_parallel` below.
        warmup_steps: as the schedule understands them.
        evaluate_at: steps at which to evaluate besides the last one, from 0 (before the first) to T.
        start: weights to begin with, name -> [S, ...], the same for every worker; None: fresh ones.
        first_step: where in the order of samples this run begins: a second phase goes on with the samples of its step.
        keep_diverged: go on with the other seeds when one diverges (it ends with NaN, see `Run.lost`) instead of stopping.
        after_step: called with (steps made, whether this step averaged, the workers), for measurements of one's own.

    Raises:
        ValueError: a point of evaluation outside the run, weights that do not fit the seeds, or what the schedule refuses.
        FloatingPointError: a loss that is not finite, with its seed and step, unless diverged seeds are kept.

    >>> from papercore.lab.noisy_digits import NoisyDigits
    >>> from papercore.local_sgd import ConstantH, constant_lr
    >>> run = train_workers(NoisyDigits.make([0, 1]), ConstantH(4), constant_lr(0.3, 20), 20, evaluate_at=[0])
    >>> run.test_accuracy.shape, run.report.fraction
    ((2, 2), 0.25)
    """
    points = sorted({*evaluate_at, steps})
    if points[0] < 0 or points[-1] > steps:
        raise ValueError(f"evaluate_at {list(evaluate_at)}: expected steps from 0 to {steps}.")
    report = communication_volume(schedule, lr_fn, steps, warmup_steps=warmup_steps)
    seeds = len(task.seeds)
    models = _models(task, start)
    loss_fn = _bounded_cross_entropy if keep_diverged else cross_entropy
    names = [name for name, _ in models[0].named_parameters()]
    workers = VirtualWorkers(
        models if seeds > 1 else models[0],
        k,
        lambda params: torch.optim.SGD(params, lr=lr_fn(0), momentum=momentum),
        schedule,
        total_steps=steps,
        warmup_steps=warmup_steps,
    )

    def averaged() -> dict[str, Tensor]:
        stacked = workers.optimizer.param_groups[0]["params"]
        return {
            name: p.detach().unflatten(0, (seeds, k)).mean(1) for name, p in zip(names, stacked, strict=True)
        }

    curves: dict[str, list[Tensor]] = {
        "test_accuracy": [],
        "test_loss": [],
        "train_loss": [],
        "spread": [],
    }

    def look() -> None:
        for name, value in task.evaluate(averaged()).items():
            curves[name].append(value)
        curves["spread"].append(workers.spread().double().cpu().view(seeds))

    if points[0] == 0:
        look()
    block: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        if not block:
            stop = min(step + _BLOCK, steps)
            block = _batches(task, first_step + step, first_step + stop, k, local_batch)
        x, y = block.pop()
        for group in workers.optimizer.param_groups:
            group["lr"] = lr_fn(step)
        averaged_now = workers.step(loss_fn, (x, y) if seeds > 1 else (x[0], y[0]))
        if after_step is not None:
            after_step(step + 1, averaged_now, workers)
        if step + 1 in points:
            if step + 1 == steps:
                workers.finish()
            look()
    stacked = {name: torch.stack(values, 1).numpy() for name, values in curves.items()}
    return Run(np.array(points, dtype=np.int64), **stacked, state=averaged(), report=report)


def data_parallel(
    task: NoisyDigits,
    lr_fn: Callable[[int], float],
    steps: int,
    *,
    k: int = 8,
    local_batch: int = 4,
    momentum: float = 0.0,
    evaluate_at: Sequence[int] = (),
    start: dict[str, Tensor] | None = None,
    first_step: int = 0,
    keep_diverged: bool = False,
) -> Run:
    """Data parallel training of K workers: one model, the joined batch of k x local_batch samples, an average every step."""
    from papercore.local_sgd import ConstantH

    return train_workers(
        task, ConstantH(1), lr_fn, steps, k=1, local_batch=k * local_batch, momentum=momentum,
        evaluate_at=evaluate_at, start=start, first_step=first_step, keep_diverged=keep_diverged,
    )  # fmt: skip


def cross_entropy(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of one worker's model on its batch (inputs [b, ...], labels [b]), in nat."""
    return F.cross_entropy(model(batch[0]), batch[1])


def _bounded_cross_entropy(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same, but 0 for NaN: a diverged seed no longer stops the run, and its own weights stay NaN."""
    return torch.nan_to_num(cross_entropy(model, batch))


def _models(task: NoisyDigits, start: dict[str, Tensor] | None) -> list[nn.Module]:
    """One network a seed, fresh or with the given weights."""
    models: list[nn.Module] = [network(seed=seed) for seed in task.seeds]
    device = task.train_x.device
    if start is None:
        return [model.to(device) for model in models]
    for name, p in models[0].named_parameters():
        found = start[name].shape if name in start else None
        if found != (len(models), *p.shape):
            raise ValueError(
                f"start holds {name!r} with shape {None if found is None else list(found)}: expected {[len(models), *p.shape]}, one row a seed."
            )
    for row, model in enumerate(models):
        model.load_state_dict({name: value[row] for name, value in start.items()})
    return [model.to(device) for model in models]


def _batches(
    task: NoisyDigits, start: int, stop: int, k: int, local_batch: int
) -> list[tuple[Tensor, Tensor]]:
    """The batches of these steps, last one first: inputs [S, K, b, 64] and labels [S, K, b]."""
    places, labels = task.order(start, stop, k * local_batch)
    rows = torch.arange(len(task.seeds), device=places.device)[:, None]
    out = []
    for t in reversed(range(stop - start)):
        x = task.train_x[rows, places[:, t]]
        out.append((x.unflatten(1, (k, local_batch)), labels[:, t].unflatten(1, (k, local_batch))))
    return out
