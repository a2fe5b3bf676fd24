"""A small training loop: progress, a stop at the first loss that is not finite, and checkpoints that resume bit for bit."""

from __future__ import annotations

import math
import pickle
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

    def __init__(
        self,
        path: str | Path,
        every: int,
        parts: Mapping[str, HasState],
        generators: Mapping[str, torch.Generator] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"a checkpoint every {every} steps: expected at least 1.")
        self.path, self.every, self.parts, self.generators = (
            Path(path),
            every,
            dict(parts),
            dict(generators or {}),
        )

    def save(self, step: int, losses: list[float]) -> None:
        state = {
            "step": step, "losses": losses, "parts": {k: p.state_dict() for k, p in self.parts.items()},
            "generators": {k: g.get_state() for k, g in self.generators.items()},
        }  # fmt: skip
        write_atomically(self.path, lambda p: _write_state(state, p))

    def load(self) -> tuple[int, list[float]]:
        """(steps done, their losses); (0, []) when there is no checkpoint.

        Raises:
            ValueError: the file is damaged, or it belongs to a run with other parts or generators.
        """
        if not self.path.is_file():
            return 0, []
        try:
            state = torch.load(self.path, weights_only=False)
            parts, generators = state["parts"], state["generators"]
        except (
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            OSError,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(
                f"{self.path} is not a checkpoint: {error}. Delete it to start afresh."
            ) from error
        for kind, stored, own in (("parts", parts, self.parts), ("generators", generators, self.generators)):
            if set(stored) != set(own):
                raise ValueError(
                    f"{self.path} holds the {kind} {sorted(stored)}, this run has {sorted(own)}: delete it to start afresh."
                )
        for name, part in self.parts.items():
            part.load_state_dict(parts[name])
        for name, generator in self.generators.items():
            generator.set_state(generators[name])
        return state["step"], state["losses"]


def _write_state(state: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch reports a full disk as a mismatch of positions; the cause stands behind it.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def train(
    step: Callable[[int], float | torch.Tensor],
    steps: int,
    *,
    text: str = "training",
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Call `step(0)`, ..., `step(steps - 1)`, each of which makes one update and returns its loss; return the losses.

    Raises:
        FloatingPointError: at the first loss that is NaN or infinite, with its step.
        ValueError: the checkpoint is not one of this run.
    """
    done, losses = checkpoint.load() if checkpoint else (0, [])
    if checkpoint and done > steps:
        raise ValueError(
            f"{checkpoint.path} is {done} steps into a longer run than this one of {steps}: delete it to start afresh."
        )
    for index in progress(range(done, steps), text):
        value = step(index)
        loss = float(value.detach() if isinstance(value, torch.Tensor) else value)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{text}: the loss is {loss} at step {index}: lower the learning rate, or look at the data of that step."
            )
        losses.append(loss)
        if checkpoint and (index + 1) % checkpoint.every == 0 and index + 1 < steps:
            checkpoint.save(index + 1, losses)
    return losses


def backward_step(
    loss_fn: Callable[[int], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    lr: Callable[[int], float] | None = None,
    clip: float | None = None,
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
