"""A fair opponent: a baseline tuned on a small grid, by training data alone, with the price of the search.

Chosen is the setting with the largest accuracy on the retained training examples among those that leave at most `target` of the
forget training examples recognised; if none does, the one that recognises the fewest. No test example is seen.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from papercore.unlearning.arguments import Examples, check_number, gather
from papercore.unlearning.baselines import BaselineReport, scrub
from papercore.unlearning.flops import Flops

__all__ = ["SCRUB_GRID", "TuningResult", "tune"]

# With alpha = .001, gamma = 1, T = 2, 8 epochs, Adam and forget batches of 500: what made SCRUB forget five of five classes.
SCRUB_GRID: Mapping[str, Sequence[float]] = {"lr": (1e-3, 2e-3, 4e-3), "msteps": (2, 3)}


@dataclass
class TuningResult:
    """best     the chosen run, with its own cost
    settings    what was chosen from the grid
    reached     whether its forget accuracy is at most the target
    table       one row a setting: the setting, "retain_accuracy", "forget_accuracy" (training data) and "seconds"
    seconds, flops   of the whole search
    """

    best: BaselineReport
    settings: dict[str, float]
    reached: bool
    table: list[dict[str, float]]
    seconds: float
    flops: Flops


def tune(
    student: nn.Module,
    forget: Examples,
    retain: Examples,
    *,
    method: Callable[..., BaselineReport] = scrub,
    grid: Mapping[str, Sequence[float]] = SCRUB_GRID,
    target: float = 0.01,
    **settings: object,
) -> TuningResult:
    """Runs `method` on a copy of the student for every setting of the grid; the student itself stays as it is.

    Args:
        student: the model before forgetting.
        forget, retain: training examples with labels, for `method`.
        method: `scrub` or `neggrad_plus`, or anything called like them.
        grid: values to try, by argument name.
        target: largest share of the forget training examples that may still be recognised.
        settings: further arguments of `method`, the same for all.

    Raises:
        ValueError: an empty grid; whatever `method` refuses.
    """
    check_number("target", target, least=0.0, most=1.0)
    if not grid or not all(len(values) for values in grid.values()):
        raise ValueError(f"grid={dict(grid)!r} has nothing to try: give at least one value for each argument")
    gone, kept = gather("forget", forget, labelled=True), gather("retain", retain, labelled=True)
    best: tuple[tuple[bool, float, float], BaselineReport, dict[str, float]] | None = None
    table: list[dict[str, float]] = []
    flops, seconds = Flops(), 0.0
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        report = method(copy.deepcopy(student), forget, retain, **chosen, **settings)
        left, right = share_right(report.model, *gone), share_right(report.model, *kept)
        table.append({**chosen, "retain_accuracy": right, "forget_accuracy": left, "seconds": report.seconds})
        flops, seconds = flops + report.flops, seconds + report.seconds
        reached = left <= target
        order = (reached, right if reached else -left, right)
        if best is None or order > best[0]:
            best = (order, report, chosen)
    assert best is not None
    return TuningResult(best[1], best[2], best[0][0], table, seconds, flops)


@torch.no_grad()
def share_right(model: nn.Module, inputs: Tensor, labels: Tensor | None, batch_size: int = 1024) -> float:
    """Accuracy in eval mode; the model's mode is put back."""
    assert labels is not None
    was_training = model.training
    model.eval()
    try:
        right = 0
        for some, known in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
            right += int((model(some).argmax(1) == known.to(some.device)).sum())
    finally:
        model.train(was_training)
    return right / len(inputs)
