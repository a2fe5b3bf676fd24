"""Local gradient methods over torch.distributed: any torch optimizer, and an average of the parameters at the end of every round.

    round s:   every rank k makes H steps of its own optimizer on its own batches, with its own gradients
               theta <- (1/K) sum_k theta^(k)          one all-reduce of one flat vector, then written back on every rank

(Local SGD and Local AdamW of Gu et al., 2024, arXiv 2310.14423, algorithm 2; H by a schedule of schedules.py.) A program of one
process a worker, without DistributedDataParallel:

    dist.init_process_group("gloo")                                    # or "nccl"
    model = ...                                                        # the same initial weights on all ranks
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = LocalOptimizer(inner, QSR(alpha=2e-3, h_base=4), total_steps=1000, model=model)
    scheduler = CosineAnnealingLR(optimizer, 1000)
    with optimizer:                                                    # leaving it averages what is left
        for batch in batches_of_this_rank:
            loss_on(model, batch).backward()
            averaged = optimizer.step()                                # True where the ranks averaged
            optimizer.zero_grad()
            scheduler.step()                                           # after the optimizer's step
            if averaged and time_to_evaluate: ...                      # between averages no rank holds the mean model

Started on one machine, and on two of 8 GPUs each (the same line on both, HOST one of them):

    torchrun --standalone --nproc-per-node 2 train.py
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id qsr train.py

Glossary
    global_step    t       steps attempted by this rank
    h              H       length of the round
    size           K       ranks
    payload        P       elements that are averaged
    rounds_done    R       averages so far

With H = 1 and plain SGD, with or without momentum, the average follows data-parallel training exactly; with Adam it does not,
since every worker's second moment is that of its own gradients. Optimizer state stays local by default, as in the official code:
a checkpoint needs one file a rank.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from papercore.local_sgd.agreement import Ranks, check_parameters
from papercore.local_sgd.averaging import Averages, state_tensors
from papercore.local_sgd.buffers import averaged_buffers, check_model, check_same_start, reestimate_batch_norm
from papercore.local_sgd.schedules import QSR, SyncSchedule, _whole
from papercore.local_sgd.wrapped import WrappedOptimizer

__all__ = ["LocalOptimizer"]

_END, _SYNC, _FINISH = range(3)
# A first round that takes more than this share of a run is most likely a learning rate without warmup_steps.
_LONG_FIRST_ROUND = 0.1


class LocalOptimizer(WrappedOptimizer):
    """Wraps a torch optimizer: steps are local, and parameters are averaged over ranks when the schedule says so.

    Args:
        optimizer: any torch optimizer over plain (unsharded) parameters. `param_groups`, `state` and hooks are its own, so
            learning-rate schedulers may hold either of the two.
        schedule: a SyncSchedule. It is asked at the first step of a round, with the learning rate of that step.
        total_steps: steps that every rank will make, so that the last round is cut to end there; None: not known, and
            `finish()` averages what is left.
        warmup_steps: handed to the schedule.
        process_group: the ranks that average; None: all.
        state: "local": optimizer state stays with its rank; "mean": its floating tensors of one or more dimensions are averaged
            too (Adam's moments, momentum), counters not.
        buffers: of `model`. "none": local; "mean": floating buffers are averaged with the parameters; "reestimate": local
            until `reestimate()`, which `finish()` calls by itself if `batches` is given.
        reduction: "all_reduce", or "ordered": gathered and summed in the order of the ranks, up to K times the traffic, the
            same bits as VirtualWorkers for every K. (For K = 2 both orders are one, and nothing is gathered.)
        model: the plain module. Needed for buffers; given, it is also checked for modules that cannot work here.
        reference_group: index of the parameter group whose learning rate decides H.
        batches: for buffers="reestimate": a function without arguments that gives this rank's batches, equally many on all.

    All parameters of the groups that require a gradient are averaged, also those that got none on this rank. They are copied
    into one vector a dtype, which is kept (one more copy of the parameters), reduced and copied back into their storages. In half
    precision the mean is rounded to half precision.

    With torch.amp.GradScaler call `scaler.step(local_optimizer)`: a step whose gradients overflow is not made but counted, so
    that ranks which skip different steps still meet.

    To resume inside a round, save `model.state_dict()` and `state_dict()` on every rank; make the LocalOptimizer on a fresh model
    first (starting weights must agree), then load both.

    Raises:
        RuntimeError: torch.distributed is not initialised; later: ranks that meet at different places, or more steps than
            `total_steps`.
        ValueError: arguments out of range; sharded, lazy, sparse or non-floating parameters; DistributedDataParallel or
            SyncBatchNorm; parameters, layouts or settings that differ between ranks (found by all of them).
        TypeError: a thing of the wrong kind.

    >>> import torch, torch.distributed as dist
    >>> from torch import nn
    >>> from papercore.local_sgd import ConstantH
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> weight = nn.Parameter(torch.ones(3))
    >>> with LocalOptimizer(torch.optim.SGD([weight], lr=0.1), ConstantH(4), total_steps=10) as optimizer:
    ...     averaged = []
    ...     for _ in range(10):
    ...         weight.square().sum().backward()
    ...         averaged.append(optimizer.step())
    ...         optimizer.zero_grad()
    >>> [step for step, yes in enumerate(averaged, 1) if yes], optimizer.bytes_sent
    ([4, 8, 10], 36)
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: SyncSchedule,
        *,
        total_steps: int | None,
        warmup_steps: int = 0,
        process_group: Any = None,
        state: str = "local",
        buffers: str = "none",
        reduction: str = "all_reduce",
        model: nn.Module | None = None,
        reference_group: int = 0,
        batches: Callable[[], Iterable[Any]] | None = None,
    ) -> None:
        super().__init__(optimizer)
        if not callable(getattr(schedule, "next_h", None)):
            raise TypeError(f"schedule must be a SyncSchedule such as QSR(0.2, 2), got {schedule!r}.")
        total_steps = None if total_steps is None else _whole("total_steps", total_steps, 1)
        warmup_steps = _whole("warmup_steps", warmup_steps, 0)
        _choice("state", state, ("local", "mean"))
        _choice("buffers", buffers, ("none", "mean", "reestimate"))
        _choice("reduction", reduction, ("all_reduce", "ordered"))
        if buffers != "none" and model is None:
            raise ValueError(f"buffers={buffers!r} needs the module that holds them: give model=.")
        if batches is not None and (buffers != "reestimate" or not callable(batches)):
            raise ValueError(
                "batches goes with buffers='reestimate' and is a function that gives this rank's batches."
            )
        groups = len(optimizer.param_groups)
        if not 0 <= _whole("reference_group", reference_group, 0) < groups:
            raise ValueError(
                f"reference_group = {reference_group}: the optimizer has {groups} parameter groups."
            )
        self.schedule = schedule
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self.reference_group = int(reference_group)
        self._policy = {"state": state, "buffers": buffers, "reduction": reduction}
        self._model, self._batches = model, batches
        check_parameters(self._all_params())
        if model is not None:
            check_model(model)
        self.ranks = Ranks(process_group, self._trained()[0].device)
        check_same_start(self.ranks, self._all_params(), self._settings(), model)
        self._averages = Averages(self.ranks, reduction, self._trained())

        self.global_step = self.rounds_done = 0
        self.last_loss: Any = None
        self._h = self._position = 0  # of the round in progress, or of the last one
        self._lr = 0.0
        self._open = self._finished = False
        # Without a reference to self, which would keep it alive. Runs when self is collected, or at the interpreter's exit.
        self._left: dict[str, int] = {"steps": 0, "step": 0}
        weakref.finalize(self, _warn_of_an_open_round, self._left)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; on all ranks at the same step, with the same parameters (checked here)."""
        self.inner.add_param_group(param_group)
        try:
            check_parameters(self._all_params())
            check_same_start(self.ranks, self.inner.param_groups[-1]["params"], self._settings())
        except ValueError:
            self.inner.param_groups.pop()
            raise
        self._averages.agree_on(self._trained())

    def __repr__(self) -> str:
        total = "?" if self.total_steps is None else self.total_steps
        where = f"rank {self.ranks.rank} of {self.ranks.size}, step {self.global_step} of {total}"
        return f"LocalOptimizer({self.schedule!r}, {where}, {self.inner!r})"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a LocalOptimizer belongs to its process group and is not copied: keep its state_dict()."
        )

    @property
    def bytes_sent(self) -> int:
        """Payload of all averages: R * P * size of an element, and optimizer state and buffers where they are averaged too."""
        return self._averages.bytes_sent

    # ---- rounds ------------------------------------------------------------------------------------------------------

    @property
    def h(self) -> int:
        """Length of the round in progress; between two rounds that of the one that just ended, 0 before the first."""
        return self._h

    @property
    def position(self) -> int:
        """Steps made in the round in progress; 0 when the ranks have just averaged."""
        return self._position if self._open else 0

    def step(self, closure: Callable[[], Any] | None = None) -> bool:  # type: ignore[override]
        """One local step, and the average if it ends the round.

        Args:
            closure: as the wrapped optimizer's; what it returns is kept in `last_loss`.

        Returns:
            True if the ranks averaged: all hold the same parameters now.

        Raises:
            RuntimeError: `total_steps` were made, `finish()` was called, or the ranks met at different places (nothing is
                averaged then).
            ValueError: the learning rate at the start of a round is NaN, infinite or negative.
        """
        if self._finished:
            raise RuntimeError(
                f"finish() was called after step {self.global_step}: no step follows it. For an average in the middle of a "
                "run call sync()."
            )
        if self.total_steps is not None and self.global_step >= self.total_steps:
            raise RuntimeError(
                f"total_steps = {self.total_steps} steps were made: the last round has ended. Give a larger total_steps."
            )
        if not self._open:
            h, lr = self._next_round()
        self.last_loss = self._local_step(closure)
        if not self._open:
            self._h, self._lr, self._position, self._open = h, lr, 0, True
        self.global_step += 1
        self._position += 1
        self._left.update(steps=self._position, step=self.global_step)
        if self._position < self._h:
            return False
        self._average(_END)
        return True

    def sync(self) -> bool:
        """Average now, on all ranks at the same step, and end the round. False, without communication, between rounds."""
        if not self._open:
            return False
        self._average(_SYNC)
        return True

    def finish(self) -> bool:
        """Average what is left of an unfinished round; no step may follow. A second call does nothing.

        Every rank has to call it after the same number of steps, and learns here if one did not. Leaving the context manager
        calls it.

        Returns:
            True if there was something to average.
        """
        if self._finished:
            return False
        tail = self._open
        # After total_steps all ranks have met at their last step, and nothing is left to compare.
        if self._open or self.total_steps is None or self.global_step < self.total_steps:
            self._average(_FINISH)
        self._finished = True
        if self._batches is not None:
            self.reestimate()
        return tail

    def reestimate(self, batches: Iterable[Any] | None = None) -> int:
        """Estimate batch-norm statistics anew (see `reestimate_batch_norm`); on all ranks, after an average.

        Raises ValueError without `buffers="reestimate"`, inside a round, or without batches.
        """
        if self._policy["buffers"] != "reestimate" or self._model is None:
            raise ValueError("reestimate() needs buffers='reestimate' and model= when the optimizer is made.")
        if self._open:
            raise ValueError(
                f"reestimate() inside a round ({self._position} of {self._h} steps): the ranks hold different parameters. "
                "Call it where step() returned True, or call sync() first."
            )
        if batches is None and self._batches is None:
            raise ValueError(
                "reestimate() has no batches: pass them, or give batches= when the optimizer is made."
            )
        chosen = batches if batches is not None else self._batches()  # type: ignore[misc]
        return reestimate_batch_norm(self._model, chosen, self.ranks.group)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            # The other ranks may be anywhere: an average here could wait for ever and hide the error.
            self._left.update(steps=0)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict and an entry "local_sgd": where this rank stands in its round.

        Another one on every rank, and inside a round it belongs to this rank's parameters.
        """
        local = {
            "global_step": self.global_step,
            "position": self.position,
            "h": self._h,
            "lr": self._lr,
            "rounds_done": self.rounds_done,
            "bytes_sent": self.bytes_sent,
            "finished": self._finished,
            "rank": self.ranks.rank,
            "size": self.ranks.size,
        }
        return {**self.inner.state_dict(), "local_sgd": local}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken, bit for bit, also inside a round.

        Raises ValueError, before anything is changed, if the entry "local_sgd" is missing, its step is beyond `total_steps`, or
        it was taken inside a round by another rank or another number of ranks.
        """
        if "local_sgd" not in state_dict:
            raise ValueError(
                "the state dict has no entry 'local_sgd': it is not from LocalOptimizer.state_dict(). To start a run with "
                "the state of a plain optimizer, load it into that before wrapping."
            )
        local = state_dict["local_sgd"]
        step, position = int(local["global_step"]), int(local["position"])
        if self.total_steps is not None and step > self.total_steps:
            raise ValueError(f"the state dict is from step {step}, beyond total_steps = {self.total_steps}.")
        if position and (local["rank"], local["size"]) != (self.ranks.rank, self.ranks.size):
            raise ValueError(
                f"the state dict was taken inside a round by rank {local['rank']} of {local['size']}; this is rank "
                f"{self.ranks.rank} of {self.ranks.size}. Load every rank's own file, or save where step() returned True."
            )
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != "local_sgd"})
        self.global_step, self._position = step, position
        self._h, self._lr, self._open = int(local["h"]), float(local["lr"]), position > 0
        self.rounds_done, self._averages.bytes_sent = int(local["rounds_done"]), int(local["bytes_sent"])
        self._finished = bool(local["finished"])
        self._left.update(steps=position, step=step)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _trained(self) -> list[Tensor]:
        return [p for p in self._all_params() if p.requires_grad and p.numel()]

    def _settings(self) -> dict[str, object]:
        names = ("schedule", "total_steps", "warmup_steps", "reference_group")
        return {**{name: getattr(self, name) for name in names}, **self._policy}

    def _next_round(self) -> tuple[int, float]:
        lr = float(self.inner.param_groups[self.reference_group]["lr"])
        h = self.schedule.next_h(
            self.global_step, lr, total_steps=self.total_steps, warmup_steps=self.warmup_steps
        )
        if isinstance(h, bool) or not isinstance(h, int) or h < 1:
            raise ValueError(
                f"{self.schedule!r} gave H = {h!r} at step {self.global_step}: expected a whole number >= 1."
            )
        long = self.total_steps is not None and h > _LONG_FIRST_ROUND * self.total_steps
        if long and isinstance(self.schedule, QSR) and h > self.schedule.h_base and not self.global_step:
            warnings.warn(
                f"the first round lasts {h} of {self.total_steps} steps: the learning rate is {lr:g} there. If it is still "
                "warming up give warmup_steps, during which H stays at h_base.",
                stacklevel=4,
            )
        if self.total_steps is not None:
            h = min(h, self.total_steps - self.global_step)
        return h, lr

    def _average(self, reason: int) -> None:
        """Meet the other ranks and average. Between rounds (finish) only the notes count."""
        self._left.update(steps=0)  # an error from here on tells more than the warning would
        params = self._trained()
        state = self._policy["state"] == "mean"
        moments = state_tensors(self.inner, self._all_params()) if state else {}
        place = (reason, self.global_step, self.position, self._h, self._lr)
        self._averages.compare(params, place, moments)
        if self._open:
            self._averages.write(params)
            self._averages.mean_of("state", list(moments.values()))
            if self._policy["buffers"] == "mean" and self._model is not None:
                self._averages.mean_of("buffers", averaged_buffers(self._model))
            self.rounds_done += 1
        self._open = False


def _warn_of_an_open_round(left: dict[str, int]) -> None:
    if left["steps"]:
        warnings.warn(
            f"a LocalOptimizer was left {left['steps']} steps into a round, after step {left['step']}: the ranks hold different "
            "parameters that were never averaged. Call finish() at the end, or use it as a context manager.",
            RuntimeWarning,
            stacklevel=2,
        )


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}: expected one of {', '.join(map(repr, allowed))}.")
