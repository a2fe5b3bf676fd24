"""What the chapter's controls turn: MeZO on a quadratic whose rate is known.

Glossary
    d, r     number of weights; how many of them the loss sees (eigenvalues 1; the other d - r are flat)
    n        directions a step
    gamma    (r + n + 1) / n for Gaussian directions, (r + n - 1) / n for signs: E ||g_hat||^2 / ||g||^2 on the r weights
    share    c, the step size in units of 1 / gamma
"""

from __future__ import annotations

import warnings

import torch

from papercore.lab.config import checked_choice
from papercore.mezo import MeZO, noise


def gamma(r: int, n: int, dist: str = "gaussian") -> float:
    """The slowdown against gradient descent (Theorem 2; for signs with the constant of Lemma 2).

    >>> gamma(8, 1), gamma(8, 1, "rademacher")
    (10.0, 8.0)
    """
    checked_choice("dist", dist, ("gaussian", "rademacher"))
    return (r + n + (1 if dist == "gaussian" else -1)) / n


def loss_path(
    d: int,
    r: int,
    *,
    lr: float,
    eps: float = 1e-3,
    n: int = 1,
    dist: str = "gaussian",
    steps: int = 60,
    seed: int = 0,
) -> list[float]:
    """Loss over its start before every step and after the last: 0.5 ||theta[:r]||^2 from theta[:r] ~ N(0, I).

    Returns steps + 1 numbers, the first of them 1. The loss is that of the weights themselves, not the mean of the two that
    a step sees. float32, as in training.

    >>> path = loss_path(100, 4, lr=1 / 6, steps=50)
    >>> len(path), path[0], path[-1] < 0.1
    (51, 1.0, True)
    """
    if not 1 <= r <= d:
        raise ValueError(
            f"r is {r} and d is {d}: the loss sees at least one weight and at most all d of them"
        )
    theta = torch.nn.Parameter(torch.zeros(d))
    with torch.no_grad():
        theta[:r] = noise(seed, 0, r)
    optimizer = MeZO([theta], lr=lr, eps=eps, n=n, dist=dist, seed=seed)

    def loss() -> torch.Tensor:
        return 0.5 * theta[:r].square().sum()

    with torch.no_grad(), warnings.catch_warnings():
        # Steps that are too large and perturbations that are too small are what the control is there to show.
        warnings.simplefilter("ignore", UserWarning)
        losses = [float(loss())]
        for _ in range(steps):
            optimizer.step(loss)
            losses.append(float(loss()))
    return [value / losses[0] for value in losses]


def mean_path(r: int, *, lr: float, n: int = 1, dist: str = "gaussian", steps: int = 60) -> list[float]:
    """Mean of `loss_path` over all directions, in closed form: each step multiplies it by 1 - 2 lr + lr^2 gamma.

    >>> mean_path(8, lr=0.1, steps=1)
    [1.0, 0.9]
    """
    factor = 1 - 2 * lr + lr**2 * gamma(r, n, dist)
    return [factor**step for step in range(steps + 1)]


def thinned(path: list[float], every: int) -> list[float]:
    """Each `every`-th value with two digits: as much as a curve on a logarithmic axis shows, and a page has to store.

    >>> thinned([1.0, 0.5, 0.2468], 2)
    [1.0, 0.25]
    """
    return [float(f"{value:.2g}") for value in path[::every]]
