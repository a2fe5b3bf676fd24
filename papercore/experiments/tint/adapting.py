"""Losses of documents after an update on their first part, for any auxiliary model, and the search for the inner rate.

Glossary
    way        what is done to a document: a method with its rate, trained layers and inner steps
    vanilla    nothing; tint: one forward pass of the simulator; dynamic: autograd through everything, with the weights of
               queries, keys and norms updated too (plain SGD, no momentum)
    fraction   share of a document's tokens that are trained on: floor(fraction * length)
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from papercore.lab.progress import progress
from papercore.tint import TinTConfig, TinTModel, TinTOutput, dynamic_eval

METHODS = ("vanilla", "tint", "dynamic")


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to treat documents; `layers` None trains all of them."""

    method: str
    rate: float = 0.0
    steps: int = 1
    layers: int | None = None
    fd_eps: float = 1e-2
    stack: int = 4

    def run(self, model: nn.Module, input_ids: Tensor, mask: Tensor, **masks: Any) -> TinTOutput:
        """Logits and losses of these documents; `masks` go to the simulator or to dynamic evaluation as they are."""
        with warnings.catch_warnings():
            # A rate that is too big is part of the search.
            warnings.simplefilter("ignore", UserWarning)
            if self.method == "dynamic":
                return dynamic_eval(
                    model, input_ids, mask, lr=self.rate, steps=self.steps, n_layers=self.layers,
                    detach_scores=False, update_layernorm="all", **masks,
                )  # fmt: skip
            return self.simulator(model)(input_ids, mask, **masks)

    def simulator(self, model: nn.Module) -> TinTModel:
        """TinT of this model; with method "vanilla" it takes no step."""
        settings = TinTConfig(
            inner_lr=self.rate if self.method == "tint" else 0.0, n_steps=self.steps, n_layers=self.layers,
            fd_eps=self.fd_eps, stack=self.stack,
        )  # fmt: skip
        return TinTModel.from_auxiliary(model, settings)


def train_mask(input_ids: Tensor, fraction: float) -> Tensor:
    """[n, T] bool, True for the first floor(fraction * T) tokens.

    Raises:
        ValueError: fewer than two tokens to train on, or none to test on.
    """
    length = input_ids.shape[1]
    n_train = int(fraction * length)
    if not 2 <= n_train < length:
        raise ValueError(
            f"train fraction {fraction} is {n_train} of {length} tokens: expected at least 2 and fewer than all."
        )
    return (torch.arange(length, device=input_ids.device) < n_train).expand_as(input_ids)


def document_losses(
    model: nn.Module, input_ids: NDArray[np.int64], fraction: float, way: Way, *, batch: int, device: torch.device
) -> NDArray[np.float64]:  # fmt: skip
    """Mean loss [n] in nats of the tokens behind the training part; every document has an update of its own."""
    out = []
    for start in progress(range(0, len(input_ids), batch), f"{way.method}, {fraction:.0%}"):
        ids = torch.from_numpy(input_ids[start : start + batch]).to(device)
        out.append(way.run(model, ids, train_mask(ids, fraction)).document_losses.double().cpu().numpy())
    return np.concatenate(out)


def search(
    grid: Sequence[float], score: Callable[[float], float], first: int | None = None
) -> tuple[int, dict[int, float]]:
    """Index of the rate with the least score, and the scores that were asked for.

    From `first` (the middle) outward until the best has a worse one on both sides, so that no choice is an outermost rate that was
    tried unless the grid ends there. A score that is not finite counts as the worst.

    >>> search((1, 2, 4, 8, 16), lambda rate: (rate - 4) ** 2)[0]
    2
    """
    tried: dict[int, float] = {}
    todo = [len(grid) // 2 if first is None else first]
    best = todo[0]
    while todo:
        for index in todo:
            value = float(score(grid[index]))
            tried[index] = value if np.isfinite(value) else np.inf
        best = min(tried, key=lambda index: (tried[index], index))
        todo = [i for i in range(max(0, best - 1), min(len(grid), best + 2)) if i not in tried]
    return best, dict(sorted(tried.items()))
