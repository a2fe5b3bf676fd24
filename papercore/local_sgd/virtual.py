"""VirtualWorkers: a local gradient method with K workers (and S seeds) in one process, as one batched computation.

All workers of all seeds make their local step in one call (torch.func), and from time to time every seed's workers are replaced by
their mean (Gu et al., 2024, arXiv 2310.14423, section 2; Gu et al., 2023, arXiv 2303.01215, section 1):

    theta_k <- OPT(theta_k, grad of worker k's loss)                 H times, no communication
    theta_k <- (theta_1 + ... + theta_K) / K   for all k             then once

The arithmetic is that of LocalOptimizer in K processes with reduction="ordered": the sum runs in the workers' order and is divided
by K. In float32 on one CPU thread with oneDNN off both give the same bits.

Glossary
    seeds        S         independent runs
    k            K         workers of a run
    h            H         local steps of the round in progress
    position               steps made in that round
    global_step  t         steps made by every worker
    total_steps  T
    spread                 mean over workers of |theta_k - mean|^2, per seed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from papercore.local_sgd.schedules import SyncSchedule
from papercore.local_sgd.stacked import LossFn, StackedModels, stack_batches
from papercore.local_sgd.stacked_checks import check_optimizer

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class VirtualWorkers:
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
        models = [model] if isinstance(model, nn.Module) else list(model)
        self.k, self.seeds = k, len(models)
        self.total_steps, self.warmup_steps, self.schedule = total_steps, warmup_steps, schedule
        self._given_seeds = None if isinstance(model, nn.Module) else self.seeds
        self._state, self._reference_group = state, reference_group
        self._engine, self._chunk_size = engine, chunk_size
        self._models = StackedModels(models, k)
        self._parameters = list(self._models.parameters.values())
        self.optimizer = optimizer(list(self._parameters))
        check_optimizer(self.optimizer, self._parameters)
        self.global_step = 0
        self._position = 0
        self._h: int | None = None
        self._losses = torch.full((self.seeds, k), float("nan"))

    @property
    def losses(self) -> Tensor:
        return self._losses

    @property
    def h(self) -> int:
        if self._h is not None:
            return self._h
        if self.global_step >= self.total_steps:
            return 0
        lr = float(self.optimizer.param_groups[self._reference_group]["lr"])
        return self.schedule.next_h(
            self.global_step, lr, total_steps=self.total_steps, warmup_steps=self.warmup_steps
        )

    def step(self, loss_fn: LossFn, batches: Any) -> bool:
        if self.global_step >= self.total_steps:
            raise RuntimeError(f"all {self.total_steps} steps (total_steps) have been made.")
        stacked = stack_batches(batches, self.k, self._given_seeds)
        h = self.h
        self.optimizer.zero_grad(set_to_none=True)
        if self._engine == "vmap":
            losses = self._models.gradients_vmap(loss_fn, stacked, self._chunk_size)
        else:
            losses = self._models.gradients_loop(loss_fn, stacked)
        losses = losses.detach().view(self.seeds, self.k)
        if not bool(torch.isfinite(losses).all()):
            self.optimizer.zero_grad(set_to_none=True)
            seed, worker = (~torch.isfinite(losses)).nonzero()[0].tolist()
            raise FloatingPointError(
                f"the loss of seed {seed}, worker {worker} is {losses[seed, worker].item()} at step {self.global_step}; "
                "no weight was changed. Lower the learning rate, or look at this worker's batch."
            )
        self._h = h
        self.optimizer.step()
        self._losses = losses
        self.global_step += 1
        self._position += 1
        if self._position < h:
            return False
        self.sync()
        return True

    @torch.no_grad()
    def sync(self) -> None:
        if self.k > 1:
            self._average(self._models.by_worker)
            if self._state == "mean":
                self._average(self._models.split(self._moving_state()))
        self._h, self._position = None, 0

    def finish(self) -> None:
        if self._position:
            self.sync()

    def _average(self, by_worker: list[list[Tensor]]) -> None:
        mean = self._mean(by_worker)
        for views in by_worker:
            torch._foreach_copy_(views, mean)

    def _mean(self, by_worker: list[list[Tensor]]) -> list[Tensor]:
        """[S, *shape] for every tensor: the sum in the workers' order, divided by k."""
        mean = [view.clone() for view in by_worker[0]]
        for views in by_worker[1:]:
            torch._foreach_add_(mean, views)
        torch._foreach_div_(mean, self.k)
        return mean

    def _moving_state(self) -> list[Tensor]:
        return [
            value
            for p in self._parameters
            for value in self.optimizer.state.get(p, {}).values()
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == p.shape
        ]

    @torch.no_grad()
    def parameters_of(self, seed: int, worker: int) -> dict[str, Tensor]:
        w = seed * self.k + worker
        return {name: p.detach()[w].clone() for name, p in self._models.parameters.items()}

    @torch.no_grad()
    def mean_model(self, seed: int = 0) -> nn.Module:
        mean = self._mean(self._models.by_worker)
        return self._models.module(
            {n: t[seed] for n, t in zip(self._models.parameters, mean, strict=True)}, seed
        )

    @torch.no_grad()
    def spread(self) -> Tensor:
        mean = self._mean(self._models.by_worker)
        total = sum(
            (view - m).square().flatten(1).sum(1)
            for views in self._models.by_worker
            for view, m in zip(views, mean, strict=True)
        )
        assert isinstance(total, Tensor)
        return total / self.k

    def state_dict(self) -> dict[str, Any]:
        return {
            "global_step": self.global_step,
            "position": self._position,
            "h": self._h,
            "k": self.k,
            "seeds": self.seeds,
            "losses": self._losses.clone(),
            "parameters": {n: p.detach().clone() for n, p in self._models.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, p in self._models.parameters.items():
                p.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.global_step, self._position, self._h = state["global_step"], state["position"], state["h"]
        self._losses = state["losses"].clone()
