"""The linear probe: multinomial logistic regression on a frozen feature, with the penalty chosen on held-out examples.

Objective, as scikit-learn's: C * sum of cross-entropies + 1/2 |W|^2, the intercept free; float64, L-BFGS.
The paper probes the last hidden state. What a probe reaches depends on the feature, so this chapter shows two of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def logistic_regression(features: Tensor, labels: Tensor, *, classes: int, c: float) -> tuple[Tensor, Tensor]:
    """Weights [d, classes] and intercepts [classes] in float64, for features [N, d] and int64 labels [N].

    >>> weights, intercepts = logistic_regression(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), classes=2, c=10.0)
    >>> bool(weights[0, 1] > weights[0, 0])
    True
    """
    if c <= 0:
        raise ValueError(f"the inverse penalty c must be above 0, got {c}")
    x = features.double()
    weights = torch.zeros(x.shape[1], classes, dtype=torch.float64, device=x.device, requires_grad=True)
    intercepts = torch.zeros(classes, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, intercepts],
        max_iter=500,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        fit = torch.nn.functional.cross_entropy(x @ weights + intercepts, labels, reduction="sum")
        # divided by C so that its size does not depend on it
        value = fit + weights.square().sum() / (2 * c)
        value.backward()
        return value

    solver.step(objective)
    return weights.detach(), intercepts.detach()


def probe(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    test: Tensor,
    *,
    classes: int,
    grid: Sequence[float],
) -> tuple[Tensor, float]:
    """Logits of `test` [M, d] -> [M, classes], and the C of `grid` that did best on the held-out examples.

    Best is accuracy, then the lower loss: the rule by which checkpoints are chosen too.
    """
    best: tuple[float, float] | None = None
    chosen, logits = 0.0, torch.empty(0)
    for c in grid:
        weights, intercepts = logistic_regression(*train, classes=classes, c=c)
        guess = held_out[0].double() @ weights + intercepts
        loss = float(torch.nn.functional.cross_entropy(guess, held_out[1]))
        score = (float((guess.argmax(1) == held_out[1]).double().mean()), -loss)
        if best is None or score > best:
            best, chosen, logits = score, c, test.double() @ weights + intercepts
    return logits, chosen
