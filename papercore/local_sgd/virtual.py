"""VirtualWorkers: a local gradient method with K workers (and S seeds) in one process, as one batched computation.

All workers of all seeds make their local step in one call (torch.func), and from time to time each seed's workers are replaced
by their mean (Gu et al., 2024, arXiv 2310.14423, section 2; Gu et al., 2023, arXiv 2303.01215, section 1):

    theta_k <- OPT(theta_k, gradient of worker k's loss)             H times, without communication
    theta_k <- (theta_1 + ... + theta_K) / K   for every k           then once

The arithmetic is that of LocalOptimizer in K processes with reduction="ordered": the sum runs in the workers' order and is then
divided by K. In float32, on one CPU thread and with oneDNN off, both give the same bits (with K = 2 under any reduction).

Glossary
    seeds        S    independent runs
    k            K    workers of a run
    h            H    local steps of the round in progress
    global_step  t    steps that every worker has made
    total_steps  T    steps of the run
    position          steps made in the round in progress
    spread            mean over the workers of |theta_k - mean|^2
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from papercore.local_sgd.schedules import QSR, SyncSchedule, _whole
from papercore.local_sgd.stacked import LossFn, StackedModels, stack_batches
from papercore.local_sgd.stacked_checks import check_index, check_optimizer, check_state, seed_modules

__all__ = ["VirtualWorkers"]

# A first round that takes more than this share of a run is most likely a learning rate without warmup_steps.
_LONG_FIRST_ROUND = 0.1

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class VirtualWorkers:
    """K workers of a local gradient method, for S seeds at once, on one device.

    Args:
        model: the network, or a sequence of S networks of one architecture: S independent runs, each from its own start. They
            are copied and not changed. All K workers of a run start from the same weights. The mode (train or eval) is kept.
        k: workers of a run, >= 1. With k = 1 nothing is averaged: S independent models (data parallel with plain SGD is k = 1
            with the joined batch).
        optimizer: called once with the list of stacked parameters, in the order of `model.named_parameters()` (the trainable
            ones), each [S * k, *shape]: `lambda parameters: torch.optim.SGD(parameters, lr=0.1)`. Elementwise optimizers
            only (SGD, Adam, AdamW, RMSprop, ...). A rule by number of axes sees one axis more than the model has.
        schedule: when to average: QSR, ConstantH, ...
        total_steps: steps of the whole run; the last round is cut to end there.
        warmup_steps: steps of learning-rate warm-up, for the schedule.
        state: what happens to the optimizer's state at an average: "local", every worker keeps its own (as the papers do); "mean",
            momenta and moments are averaged like the parameters.
        reference_group: the parameter group whose learning rate the schedule reads, at the first step of every round.
        engine: "vmap", one batched call for all models; "loop", one model after the other, to the same result up to rounding.
            On one CPU core vmap was 2 times as fast as separate models for 8 small perceptrons and 11 times for 64. Convolutions turn
            into grouped ones under vmap, with which a CPU is slow: for 8 small ResNets vmap won at 16x16 pixels and 8 samples,
            and "loop" by 1.4 times at 32x32 and 16.
        chunk_size: models in one batched call, to bound memory (engine "vmap"); None: all S * k.

    Attributes:
        optimizer: the torch optimizer. Set its learning rate, or attach an LRScheduler and step it after `step`.
        losses: Tensor [S, k], every worker's loss before its last step (NaN before the first).
        global_step, position, h, rounds_done, k, seeds, total_steps, warmup_steps, schedule.

    Dropout and other random draws take numbers from torch's generator of the device, different ones for every worker; they
    are reproducible from `torch.manual_seed`, but the two engines and different chunk sizes draw in different order. Nothing
    else here draws. A parameter that the loss does not reach has a gradient of zeros (in a real process it has none, and
    its optimizer leaves it alone, weight decay included).

    Every step looks at the losses (are they finite?), so that a CUDA device is waited for once a step.

    Evaluate `mean_model()`, not a single worker: between averages the workers are noisy copies, and the theory and the papers'
    figures are about their mean.

    Raises:
        ValueError: k < 1 or another number out of range, no trainable parameter, batch norm with running statistics (use
            GroupNorm), recurrent layers, seeds of different architecture, an optimizer that is not elementwise or
            holds other parameters.
        TypeError: an argument of the wrong kind.

    >>> from papercore.local_sgd import ConstantH, VirtualWorkers
    >>> x = torch.linspace(-1, 1, 8).reshape(4, 2, 1)                     # 4 workers, 2 samples each
    >>> model = torch.nn.Linear(1, 1)
    >>> workers = VirtualWorkers(
    ...     model, 4, lambda parameters: torch.optim.SGD(parameters, lr=0.1), ConstantH(5), total_steps=200
    ... )
    >>> def loss_fn(model, batch):
    ...     inputs, targets = batch
    ...     return (model(inputs) - targets).square().mean()
    >>> rounds = sum(workers.step(loss_fn, (x, 3 * x + 1)) for _ in range(200))
    >>> rounds, workers.losses.shape, round(workers.mean_model().weight.item(), 3)
    (40, torch.Size([1, 4]), 3.0)
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        k: int,
        optimizer: MakeOptimizer,
        schedule: SyncSchedule,
        *,
        total_steps: int,
        warmup_steps: int = 0,
        state: Literal["local", "mean"] = "local",
        reference_group: int = 0,
        engine: Literal["vmap", "loop"] = "vmap",
        chunk_size: int | None = None,
    ) -> None:
        self.k = _whole("k", k, 1)
        self.total_steps = _whole("total_steps", total_steps, 1)
        self.warmup_steps = _whole("warmup_steps", warmup_steps, 0)
        if self.warmup_steps > self.total_steps:
            raise ValueError(f"warmup_steps = {warmup_steps} is more than total_steps = {total_steps}.")
        if not isinstance(schedule, SyncSchedule):
            raise TypeError(f"schedule must be a SyncSchedule such as ConstantH(4), got {schedule!r}.")
        if state not in ("local", "mean"):
            raise ValueError(f"state = {state!r}: expected 'local' or 'mean'.")
        if engine not in ("vmap", "loop"):
            raise ValueError(f"engine = {engine!r}: expected 'vmap' or 'loop'.")
        if chunk_size is not None and engine == "loop":
            raise ValueError("chunk_size goes with engine='vmap'; the loop takes one model at a time.")
        if not callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "optimizer must be a function of the stacked parameters, for example "
                f"lambda parameters: torch.optim.SGD(parameters, lr=0.1); got {type(optimizer).__name__}."
            )
        self.schedule, self._state, self._engine = schedule, state, engine
        self._chunk_size = None if chunk_size is None else _whole("chunk_size", chunk_size, 1)
        models, self._stacked_seeds = seed_modules(model)
        self.seeds = len(models)
        self._models = StackedModels(models, self.k)
        self._parameters = list(self._models.parameters.values())
        self.optimizer = optimizer(list(self._parameters))
        check_optimizer(self.optimizer, self._parameters)
        groups = len(self.optimizer.param_groups)
        self._reference_group = _whole("reference_group", reference_group, 0)
        if self._reference_group >= groups:
            raise ValueError(f"reference_group = {reference_group}: the optimizer has {groups} group(s).")
        self.global_step = 0
        self.rounds_done = 0
        self._h = self._position = 0  # of the round in progress; h also of the one that has just ended
        self._finished = False
        self._losses = self._parameters[0].new_full((self.seeds, self.k), float("nan")).detach()

    @property
    def losses(self) -> Tensor:
        """[S, k]: every worker's loss before its last step; NaN before the first."""
        return self._losses

    @property
    def h(self) -> int:
        """Length of the round in progress; between two rounds that of the one that has just ended, 0 before the first."""
        return self._h

    @property
    def position(self) -> int:
        """Steps made in the round in progress; 0 when the workers have just been averaged."""
        return self._position

    def _length_of_round(self) -> int:
        """H of the round in progress or, between rounds, of the one that this step opens."""
        if self._position:
            return self._h
        # Read as late as this, so that a scheduler stepped after the previous step has had its say.
        lr = float(self.optimizer.param_groups[self._reference_group]["lr"])
        h = self.schedule.next_h(
            self.global_step, lr, total_steps=self.total_steps, warmup_steps=self.warmup_steps
        )
        if self.global_step == 0:
            self._warn_of_long_start(h, lr)
        return h

    def _warn_of_long_start(self, h: int, lr: float) -> None:
        if isinstance(self.schedule, QSR) and h > max(
            self.schedule.h_base, _LONG_FIRST_ROUND * self.total_steps
        ):
            warnings.warn(
                f"the first round lasts {h} of {self.total_steps} steps: the learning rate is {lr:g} there. If it is still "
                "warming up give warmup_steps, during which H stays at h_base.",
                stacklevel=4,
            )

    def step(self, loss_fn: LossFn, batches: Any) -> bool:
        """One local step of every worker of every seed, followed by an average where the round ends.

        Args:
            loss_fn: (model, batch) -> scalar. `model` is a module with one worker's weights, `batch` that worker's batch.
            batches: a list of k batches (for S seeds: a list of S such lists), or a tensor, tuple or dict whose tensors are stacked on
                a leading axis k (for S seeds, given as a sequence of models: on [S, k]). What is no tensor goes to every
                worker as it is.

        Returns:
            True where this step was followed by an average.

        Raises:
            RuntimeError: all `total_steps` steps have been made, or `finish()` was called.
            ValueError: batches of the wrong shape, a loss that is not scalar, a forward pass that writes into a buffer.
            FloatingPointError: a loss is not finite; weights, optimizer state and counters are as before the call.
        """
        if self._finished:
            raise RuntimeError(
                f"finish() was called after step {self.global_step}: no step follows it. For an average in the middle of a "
                "run call sync()."
            )
        if self.global_step >= self.total_steps:
            raise RuntimeError(
                f"all total_steps = {self.total_steps} steps have been made: the schedule ends there. "
                "For a longer run make VirtualWorkers with a larger total_steps."
            )
        stacked = stack_batches(batches, self.k, self.seeds if self._stacked_seeds else None)
        h = self._length_of_round()
        self.optimizer.zero_grad(set_to_none=True)
        if self._engine == "vmap":
            losses = self._models.gradients_vmap(loss_fn, stacked, self._chunk_size)
        else:
            losses = self._models.gradients_loop(loss_fn, stacked)
        losses = losses.detach().view(self.seeds, self.k)
        self._models.check_buffers()
        self._check_finite(losses)
        self._h, self._losses = h, losses
        self.optimizer.step()
        self.global_step += 1
        self._position += 1
        if self._position < h:
            return False
        self.sync()
        return True

    def _check_finite(self, losses: Tensor) -> None:
        finite = torch.isfinite(losses)
        if finite.all():
            return
        self.optimizer.zero_grad(set_to_none=True)
        bad = (~finite).nonzero().tolist()
        seed, worker = bad[0]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise FloatingPointError(
            f"the loss of seed {seed}, worker {worker}{more} is {losses[seed, worker].item()} at step {self.global_step}; "
            "the weights are as before this step. Lower the learning rate, or look at that worker's batch."
        )

    @torch.no_grad()
    def sync(self) -> bool:
        """Replace every seed's workers by their mean now, and end the round. False, without an effect, between rounds."""
        if not self._position:
            return False
        if self.k > 1:
            self._average(self._parameters)
            if self._state == "mean":
                self._average(self._moving_state())
        self._position = 0
        self.rounds_done += 1
        return True

    def finish(self) -> bool:
        """Average what is left of an unfinished round, for a run that stops early; no step may follow.

        Returns:
            True if there was something to average.
        """
        self._finished = True
        return self.sync()

    def _average(self, stacked: Sequence[Tensor]) -> None:
        for tensor, mean in zip(stacked, self._mean(stacked), strict=True):
            tensor.view(self.seeds, self.k, *tensor.shape[1:]).copy_(mean.unsqueeze(1))

    def _mean(self, stacked: Sequence[Tensor]) -> list[Tensor]:
        """[S, *shape] for every tensor [S * k, *shape]: the sum in the workers' order, divided by k."""
        first, *others = self._models.by_worker(stacked)
        total = [view.clone() for view in first]
        for views in others:
            torch._foreach_add_(total, views)
        return [t.div_(self.k) for t in total]

    def _center(self) -> list[Tensor]:
        """The workers' mean, [S, *shape] for every parameter. Right after an average that is any worker, to the last bit."""
        if self._position:
            return self._mean(self._parameters)
        return list(self._models.by_worker(self._parameters)[0])

    def _moving_state(self) -> list[Tensor]:
        """State with one entry per weight (momenta, moments); step counters are the same for all workers."""
        return [
            value
            for p in self._parameters
            for value in self.optimizer.state.get(p, {}).values()
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == p.shape
        ]

    def parameters_of(self, seed: int, worker: int) -> dict[str, Tensor]:
        """A copy of one worker's trainable parameters, {name: [*shape]}. For diagnosis; evaluate `mean_model` instead."""
        w = check_index("seed", seed, self.seeds) * self.k + check_index("worker", worker, self.k)
        return {name: p.detach()[w].clone() for name, p in self._models.parameters.items()}

    @torch.no_grad()
    def mean_model(self, seed: int = 0) -> nn.Module:
        """A fresh module with the mean of the seed's workers as weights; training goes on undisturbed."""
        seed, mean = check_index("seed", seed, self.seeds), self._center()
        return self._models.module(
            {name: tensor[seed] for name, tensor in zip(self._models.parameters, mean, strict=True)}, seed
        )

    @torch.no_grad()
    def spread(self) -> Tensor:
        """[S]: mean over a seed's workers of the squared distance to their mean, summed over all parameters; 0 after an average."""
        mean = self._center()
        total = mean[0].new_zeros(self.seeds)
        for views in self._models.by_worker(self._parameters):
            for view, center in zip(views, mean, strict=True):
                total += (view - center).square().flatten(1).sum(1).to(total)
        return total / self.k

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, also inside a round, as copies. Random generators and schedulers are the caller's."""
        return {
            "global_step": self.global_step,
            "position": self._position,
            "h": self._h,
            "rounds_done": self.rounds_done,
            "finished": self._finished,
            "k": self.k,
            "seeds": self.seeds,
            "losses": self._losses.clone(),
            "parameters": {name: p.detach().clone() for name, p in self._models.parameters.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`: the run continues bit for bit, also inside a round.

        Raises:
            ValueError: the state is of another number of workers, seeds or steps, or of another network; nothing is loaded then.
        """
        check_state(state, self.k, self.seeds, self.total_steps, self._models.parameters)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, p in self._models.parameters.items():
            p.copy_(state["parameters"][name])
        self.global_step, self.rounds_done = state["global_step"], state["rounds_done"]
        self._h, self._position, self._finished = state["h"], state["position"], state["finished"]
        self._losses = state["losses"].to(self._parameters[0].device, copy=True)
