"""A small training loop: progress, a stop at the first loss that is not finite, and checkpoints that resume bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from papercore.lab.paths import write_atomically
from papercore.lab.progress import progress


class HasState(Protocol):
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


class Checkpoint:
    """Where a training run keeps its state, and how often.

    Args:
        path: file of the last state (.pt).
        every: steps between two saves.
        parts: objects with `state_dict`/`load_state_dict` (model, optimizer, schedule) by name.
        generators: torch.Generators by name, restored too.
    """

    def __init__(self, path: str | Path, every: int, parts: Mapping[str, HasState], generators: Mapping[str, torch.Generator] | None = None) -> None:
        if every < 1:
            raise ValueError(f"a checkpoint every {every} steps: expected at least 1.")
        self.path, self.every, self.parts, self.generators = Path(path), every, dict(parts), dict(generators or {})

    def save(self, step: int, losses: list[float]) -> None:
        state = {
            "step": step, "losses": losses, "parts": {k: p.state_dict() for k, p in self.parts.items()},
            "generators": {k: g.get_state() for k, g in self.generators.items()},
        }  # fmt: skip
        write_atomically(self.path, lambda p: torch.save(state, p))

    def load(self) -> tuple[int, list[float]]:
        """(steps done, their losses); (0, []) when there is no checkpoint. ValueError when it belongs to other parts."""
        if not self.path.is_file():
            return 0, []
        state = torch.load(self.path, weights_only=False)
        if set(state["parts"]) != set(self.parts):
            raise ValueError(f"{self.path} holds {sorted(state['parts'])}, this run has {sorted(self.parts)}: delete it to start afresh.")
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        return state["step"], state["losses"]


def train(step: Callable[[int], float | torch.Tensor], steps: int, *, text: str = "training", checkpoint: Checkpoint | None = None) -> list[float]:
    """Call `step(0)`, ..., `step(steps - 1)`, each of which makes one update and returns its loss; return the losses.

    Raises:
        FloatingPointError: at the first loss that is NaN or infinite, with its step.
    """
    done, losses = checkpoint.load() if checkpoint else (0, [])
    for index in progress(range(done, steps), text):
        loss = float(step(index))
        if not math.isfinite(loss):
            raise FloatingPointError(f"{text}: the loss is {loss} at step {index}: lower the learning rate, or look at the data of that step.")
        losses.append(loss)
        if checkpoint and (index + 1) % checkpoint.every == 0 and index + 1 < steps:
            checkpoint.save(index + 1, losses)
    return losses


def backward_step(
    loss_fn: Callable[[int], torch.Tensor], optimizer: torch.optim.Optimizer, *, lr: Callable[[int], float] | None = None, clip: float | None = None
) -> Callable[[int], float]:
    """A step for `train` by backpropagation: loss, gradients, optional norm clipping, update.

    Args:
        loss_fn: step -> scalar loss with a graph.
        lr: step -> learning rate of every group; None leaves the optimizer's own.
        clip: largest gradient norm; None for none.
    """

    def step(index: int) -> float:
        if lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr(index)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(index)
        # A loss that is not finite must not reach the weights: `train` stops on what is returned here.
        if torch.isfinite(loss):
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
            optimizer.step()
        return float(loss.detach())

    return step


def warmup_linear(peak: float, steps: int, *, warmup: int = 0) -> Callable[[int], float]:
    """Learning rate that climbs linearly for `warmup` steps and falls linearly to 0 at `steps`."""

    def lr(index: int) -> float:
        if index < warmup:
            return peak * (index + 1) / warmup
        return peak * max(0.0, (steps - index) / max(1, steps - warmup))

    return lr
