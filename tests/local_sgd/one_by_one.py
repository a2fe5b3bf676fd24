"""Workers as separate models with an optimizer each, in plain Python: what VirtualWorkers has to reproduce."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from papercore.local_sgd import VirtualWorkers
from tests.local_sgd.engine_ranks import batch, loss_on

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MOMENTUM: Make = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)  # noqa: E731
MAKERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": MOMENTUM,
    "adam, amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "radam": lambda parameters: torch.optim.RAdam(parameters, lr=0.01),
    "adamax": lambda parameters: torch.optim.Adamax(parameters, lr=0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    "adadelta": lambda parameters: torch.optim.Adadelta(parameters, lr=0.5),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.001, momentum=0.5, centered=True),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.001),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, lr=0.05),
}


def double(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    return loss_on(model, (pair[0].double(), pair[1]))


def one_by_one(
    starts: list[nn.Module],
    k: int,
    make: Make,
    h: int,
    steps: int,
    loss: Callable = loss_on,
    draw: Callable[[int, int, int], Any] = lambda step, worker, seed: batch(step, worker, seed),
) -> list[list[nn.Module]]:
    """Separate models with an optimizer each, averaged every h steps and at the end: [seed][worker]."""
    out = []
    for seed, start in enumerate(starts):
        models = [copy.deepcopy(start) for _ in range(k)]
        optimizers = [make(list(model.parameters())) for model in models]
        for step in range(steps):
            for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                optimizer.zero_grad()
                loss(model, draw(step, worker, seed)).backward()
                optimizer.step()
            if (step + 1) % h == 0 or step + 1 == steps:
                with torch.no_grad():
                    for group in zip(*(model.parameters() for model in models), strict=True):
                        total = group[0].clone()
                        for p in group[1:]:
                            total += p
                        for p in group:
                            p.copy_(total / k)
        out.append(models)
    return out


def drawn(step: int, seeds: int, k: int) -> tuple[Tensor, Tensor]:
    """[seeds, k, ...] of images and labels."""
    pairs = [[batch(step, w, s) for w in range(k)] for s in range(seeds)]
    return (
        torch.stack([torch.stack([x for x, _ in row]) for row in pairs]),
        torch.stack([torch.stack([y for _, y in row]) for row in pairs]),
    )


def equal(workers: VirtualWorkers, expected: list[list[nn.Module]], tolerance: float = 0.0) -> None:
    for seed, row in enumerate(expected):
        for worker, model in enumerate(row):
            mine = workers.parameters_of(seed, worker)
            for name, p in model.named_parameters():
                torch.testing.assert_close(mine[name], p.detach(), rtol=0, atol=tolerance, msg=name)
