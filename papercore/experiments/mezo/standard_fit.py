"""One run of the `standard` scale: train an arm, evaluate it on the way, resume where it was killed, replay its log.

Glossary
    check      an evaluation, every so many steps and at the end
    losses     training loss of each step; for MeZO the mean of its two
    replay     the trained weights made again from the log alone (claim C12); its gap is the largest difference of a weight
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papercore.experiments.mezo.standard_task import Indices, Task
from papercore.lab.training import Checkpoint, train
from papercore.mezo import MeZO, replay

Run = dict[str, Any]


def fit(
    task: Task,
    arm: str,
    train_set: Indices,
    held_out: Indices,
    *,
    lr: float,
    seed: int,
    steps: int,
    check_every: int,
    text: str,
    test: bool = True,
    folder: Path | None = None,
) -> Run:
    """Train one arm and evaluate it every `check_every` steps and at the end; arm "adam" is backpropagation through "full".

    Returns losses [steps] (of MeZO: the mean of its two), and at each evaluation its step, the held-out accuracy and loss
    and, with `test`, accuracy, calibration error and right answers [evaluations, questions] on the test questions.
    `folder` keeps a checkpoint of an unfinished run.
    """
    config = task.config
    classifier, tuned = task.classifier("full" if arm == "adam" else arm, seed)
    optimizer: torch.optim.Optimizer
    if arm == "adam":
        optimizer = torch.optim.Adam(tuned, lr=lr)
    else:
        optimizer = MeZO(tuned, lr=lr, eps=config.standard_eps, dist=config.standard_dist, seed=seed)
    curve = _Curve()
    spent = 0.0
    # a step ends by reading its loss, so that the wall clock is right on CUDA; a shared CPU is timed by its own clock
    clock = time.perf_counter if config.torch_device().type == "cuda" else time.process_time

    def step(index: int) -> float:
        nonlocal spent
        batch = batch_of(train_set, index, config.standard_batch, seed)
        ids, labels = [task.train_ids[i] for i in batch], task.train_labels[batch]
        begun = clock()
        if arm == "adam":
            optimizer.zero_grad(set_to_none=True)
            loss = classifier.loss(ids, labels)
            if torch.isfinite(loss):
                loss.backward()
                optimizer.step()
            value = float(loss.detach())
        else:
            value = float(optimizer.step(lambda: classifier.loss(ids, labels)))
        spent += clock() - begun
        if (index + 1) % check_every == 0 or index + 1 == steps:
            held = task.score(classifier, [task.train_ids[i] for i in held_out], task.train_labels[held_out])
            tested = task.score(classifier, task.test_ids, task.test_labels) if test else None
            curve.add(index + 1, held, tested)
        return value

    checkpoint = None
    if folder is not None and check_every < steps:
        parts = {"weights": _Weights(tuned), "optimizer": optimizer, "curve": curve}
        checkpoint = Checkpoint(folder / "state.pt", check_every, parts)
    done = checkpoint.load()[0] if checkpoint else 0
    losses = train(step, steps, text=text, checkpoint=checkpoint)
    result: Run = {
        "lr": lr,
        "parameters": sum(p.numel() for p in tuned),
        "losses": np.array(losses),
        **curve.state_dict(),
    }
    result["seconds_per_step"] = spent / (steps - done)
    if isinstance(optimizer, MeZO) and test:
        _, again = task.classifier(arm, seed)
        replay(again, optimizer.log)
        gaps = [float((a.detach() - b.detach()).abs().max()) for a, b in zip(again, tuned, strict=True)]
        result |= {"replay_gap": max(gaps), "log_bytes": optimizer.log.nbytes}
    return result


def batch_of(train_set: Indices, step: int, size: int, seed: int) -> Indices:
    """Indices of one step: a fresh order each epoch, drawn from (seed, epoch) alone, so that a resumed run sees the same."""
    size = min(size, len(train_set))
    epoch, place = divmod(step, len(train_set) // size)
    order = np.random.default_rng([seed, epoch]).permutation(train_set)
    return order[place * size : (place + 1) * size]


class _Curve:
    """What the evaluations of a run found, in the shape that checkpoints and stages store."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {"checks": [], "held_accuracy": [], "held_loss": []}

    def add(self, step: int, held: dict[str, Any], tested: dict[str, Any] | None) -> None:
        found = {"checks": step, "held_accuracy": held["accuracy"], "held_loss": held["loss"]}
        if tested is not None:
            found |= {"accuracy": tested["accuracy"], "ece": tested["ece"], "correct": tested["correct"]}
        for name, value in found.items():
            self.values.setdefault(name, []).append(value)

    def state_dict(self) -> dict[str, Any]:
        return {
            name: np.stack(value) if name == "correct" else list(value) for name, value in self.values.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = {name: list(value) for name, value in state.items()}


class _Weights:
    """The tuned tensors alone, for checkpoints: the frozen ones lie on disk already."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def state_dict(self) -> list[Tensor]:
        return [parameter.detach().cpu() for parameter in self.parameters]

    @torch.no_grad()
    def load_state_dict(self, state: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, state, strict=True):
            parameter.copy_(value)
