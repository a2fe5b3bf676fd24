"""The paper's theory on problems where the answer is known: second moments, rates on quadratics, rounding, histories.

Glossary
    d, r       number of weights; effective rank tr(H) / ||H|| of the Hessian
    n          directions a step
    gamma      (r + n + 1) / n, how much slower than SGD a step may be (Theorem 2, Gaussian directions)
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from papercore.lab.progress import progress
from papercore.mezo import MeZO, noise
from papercore.mezo.noise import add_noise_
from papercore.mezo.seeds import draw_seed


def second_moment(d: int, n: int, dist: str, draws: int, seed: int) -> tuple[float, float, float]:
    """E ||g_hat||^2 / ||grad||^2 on a linear loss: (Monte-Carlo mean, its standard error, the closed form).

    Closed forms: (d + n + 1) / n for Gaussian directions (Lemma 5), (d + n - 1) / n on the sphere (Lemma 2) and for signs,
    whose norm is sqrt(d) too.
    """
    z = noise(seed, 0, draws * n * d, dist="gaussian" if dist == "sphere" else dist).view(draws, n, d)
    if dist == "sphere":
        z = z * (math.sqrt(d) / z.norm(dim=-1, keepdim=True))
    # By symmetry any gradient of length 1 will do; a dense one keeps signs from being a special case.
    gradient = torch.full((d,), 1.0 / math.sqrt(d))
    estimate = ((z @ gradient).unsqueeze(-1) * z).mean(dim=1)
    squares = estimate.square().sum(dim=-1).double().numpy()
    closed = (d + n + 1) / n if dist == "gaussian" else (d + n - 1) / n
    return float(squares.mean()), float(squares.std(ddof=1) / math.sqrt(draws)), closed


def steps_to_target(
    d: int, r: int, *, seed: int, lr: float | None = None, target: float = 1e-3, limit: int = 20_000
) -> int:
    """MeZO steps until a quadratic with r unit eigenvalues among d is down to `target` of its start; lr = 1 / (r + 2) if None.

    The r eigenvectors are a random subspace, so that every weight matters a little (r = d: all of the space). The start lies
    in it. Returns `limit` when it does not get there.
    """
    if r == d:
        basis = torch.eye(d)
    else:
        basis, _ = torch.linalg.qr(noise(seed + 1, 0, d * r).view(d, r))  # [d, r], orthonormal columns
    theta = torch.nn.Parameter(basis @ noise(seed, 0, r))
    optimizer = MeZO([theta], lr=1.0 / (r + 2) if lr is None else lr, eps=1e-3, seed=seed)

    def loss() -> Tensor:
        return 0.5 * (theta @ basis).square().sum()

    with torch.no_grad(), warnings.catch_warnings():
        # At the largest stable rate the loss of a small quadratic jumps up and down on its way.
        warnings.filterwarnings("ignore", message="the loss rose from")
        goal = target * float(loss())
        for step in range(1, limit + 1):
            # The mean of the two losses is the loss plus eps^2 / 2 times about r: far below the goal here.
            if optimizer.step(loss) <= goal:
                return step
    return limit


def one_step_bound(d: int, r: int, n: int, draws: int, seed: int) -> tuple[float, float, float]:
    """Mean loss after one step on a rank-r projector with lr = 1 / gamma: (mean ratio to the start, its error, the bound).

    Theorem 2 with equality: for H a projector and the gradient inside its span, E L(theta') / L(theta) = 1 - 1 / gamma.
    """
    gamma = (r + n + 1) / n
    z = noise(seed, 0, draws * n * d).view(draws, n, d)[
        ..., :r
    ]  # the other d - r directions do not change the loss
    theta = torch.full((r,), 1.0 / math.sqrt(r))
    after = theta - ((z @ theta).unsqueeze(-1) * z).mean(dim=1) / gamma
    ratio = after.square().sum(dim=-1).double().numpy()
    return float(ratio.mean()), float(ratio.std(ddof=1) / math.sqrt(draws)), 1.0 - 1.0 / gamma


DRIFT_COLUMNS = (
    "dtype",
    "official sequence",
    "update-only replay",
    "fused (this book)",
    "exact mode (this book)",
    "replay of this book",
)


def rounding_drift(weights: int, steps: int, seed: int) -> list[list[Any]]:
    """How far rounding carries the weights from where exact arithmetic would, relative to the distance that was travelled.

    eps 1e-3, lr 1e-6, projected gradients drawn from N(0, 20^2): typical sizes for OPT. Columns as in `DRIFT_COLUMNS`; the
    last one compares this book's replay of the log with the weights that this book's step left (0 means bit for bit).
    """
    eps, lr = 1e-3, 1e-6
    slopes = (20.0 * noise(seed, 0, steps, dtype=torch.float64)).tolist()
    draws = [draw_seed(seed, step) for step in range(steps)]
    start = 0.05 * noise(seed + 1, 0, weights)
    ideal = start.double()
    for draw, slope in zip(draws, slopes, strict=True):
        ideal.add_(noise(draw, 0, weights), alpha=-lr * slope)
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        base = start.to(dtype)
        travelled = float((ideal - start.double()).norm())
        origin = base.double() - start.double()

        def drift(x: Tensor, origin: Tensor = origin, travelled: float = travelled) -> float:
            # The one rounding of the starting weights is not the step's fault, so it is taken out.
            return float((x.double() - ideal - origin).norm()) / travelled

        official, updates, fused, exact = (base.clone() for _ in range(4))
        for draw, slope in progress(zip(draws, slopes, strict=True), f"rounding in {dtype}", total=steps):
            z = noise(draw, 0, weights).to(dtype)  # the official code draws in the weights' own precision
            for scale in (eps, -2 * eps, eps, -lr * slope):
                official = official + z * scale
            updates = updates + z * (-lr * slope)
            for scale in (eps, -2 * eps, eps - lr * slope):
                add_noise_([fused], [0], [(draw, scale)])
            add_noise_([exact], [0], [(draw, -lr * slope)])
        again = base.clone()
        for draw, slope in zip(draws, slopes, strict=True):
            for scale in (eps, -2 * eps, eps - lr * slope):
                add_noise_([again], [0], [(draw, scale)])
        rows.append(
            [
                str(dtype).removeprefix("torch."),
                drift(official),
                drift(updates),
                drift(fused),
                drift(exact),
                float((again.double() - fused.double()).abs().max()),
            ]
        )
    return rows


def history_gap(d: int, steps: int, seed: int, betas: tuple[float, float] | None, momentum: float) -> float:
    """Largest relative difference between moments recomputed from the log and torch's optimizer with stored moments.

    Both follow the same projected gradients of the same quadratic, in float64; torch's optimizer is given g_hat in full.
    """
    scale = torch.linspace(0.1, 1.0, d, dtype=torch.float64)
    first = torch.nn.Parameter(noise(seed, 0, d, dtype=torch.float64))
    second = torch.nn.Parameter(first.detach().clone())
    ours = MeZO([first], lr=1e-3, eps=1e-4, betas=betas, momentum=momentum, window=steps, seed=seed)
    theirs = (
        torch.optim.Adam([second], lr=1e-3, betas=betas)
        if betas
        else torch.optim.SGD([second], lr=1e-3, momentum=momentum)
    )
    for step in range(steps):
        z = noise(draw_seed(seed, step), 0, d, dtype=torch.float64)
        with torch.no_grad():
            ours.step(lambda: 0.5 * (scale * first.square()).sum())
        second.grad = ours.projected_grad * z
        theirs.step()
    return float(((first - second).abs() / second.abs().clamp_min(1e-12)).max().detach())


def rates(seed: int, repeats: int = 3) -> list[list[Any]]:
    """Rows (family, r, d, steps of each repeat...) of the dimension experiment: fixed rank r in growing d, then r = d."""
    rows: list[list[Any]] = []
    for r in (2, 8, 32):
        for d in (r, 100, 10_000):
            rows.append(
                [f"rank {r}", r, d, *(steps_to_target(d, r, seed=seed + 31 * i) for i in range(repeats))]
            )
    for d in (2, 8, 32, 128, 256):
        rows.append(["isotropic", d, d, *(steps_to_target(d, d, seed=seed + 31 * i) for i in range(repeats))])
    return rows


def slope_of_logs(x: list[float], y: list[float]) -> float:
    """Exponent of the power law through the points: 1 for proportional growth, 0 for none."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
