"""MeZO written without any of its tricks: the direction is a stored vector, every addition of algorithm 1 is
made apart.

The tests compare the optimiser with this and with torch's own optimisers fed with the stored estimate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from papercore.mezo import draw_seed, noise

Loss = Callable[[Tensor], Tensor]


def direction(seed: int, step: int, draw: int, d: int, dist: str) -> Tensor:
    return noise(draw_seed(seed, step, draw), 0, d, dist=dist, dtype=torch.float64)


def run_unfused(
    theta: Tensor,
    loss: Loss,
    steps: int,
    *,
    lr: float,
    eps: float,
    n: int = 1,
    dist: str = "gaussian",
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    betas: tuple[float, float] | None = None,
    seed: int = 0,
    scalars: list[list[float]] | None = None,
) -> tuple[Tensor, list[list[float]]]:
    """End point and projected gradients after `steps` steps from theta, float64 [d], which is left alone.

    scalars: projected gradients to use instead of those of the losses.
    """
    weight = nn.Parameter(theta.double().clone())
    if betas is None:
        inner: torch.optim.Optimizer = torch.optim.SGD([weight], lr, momentum=momentum)
    else:
        inner = torch.optim.Adam([weight], lr, betas=betas)
    seen: list[list[float]] = []
    for step in range(steps):
        estimate, slopes = torch.zeros_like(weight), []
        for draw in range(n):
            z = direction(seed, step, draw, theta.numel(), dist)
            with torch.no_grad():
                weight += eps * z
                plus = float(loss(weight))
                weight -= 2 * eps * z
                minus = float(loss(weight))
                weight += eps * z
            slopes.append((plus - minus) / (2 * eps) if scalars is None else scalars[step][draw])
            estimate += slopes[-1] * z / n
        seen.append(slopes)
        with torch.no_grad():
            weight *= 1 - lr * weight_decay
        weight.grad = estimate.detach()
        inner.step()
    return weight.detach(), seen


def split(
    theta: Tensor, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64
) -> list[nn.Parameter]:
    """theta [d] cut into parameters of the given shapes."""
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    parts = torch.split(theta, sizes)
    return [
        nn.Parameter(part.reshape(shape).to(dtype).clone()) for part, shape in zip(parts, shapes, strict=True)
    ]


def joined(params: list[nn.Parameter]) -> Tensor:
    """All parameters end to end, float64 [d]: a copy."""
    return torch.cat([p.detach().double().reshape(-1) for p in params])


def curved(theta: Tensor) -> Tensor:
    """A loss that is neither even nor a polynomial, with a bounded slope."""
    scale = torch.linspace(0.3, 1.5, theta.numel(), dtype=theta.dtype)
    return (scale * torch.cosh(theta - 0.3).log()).sum() / theta.numel() ** 0.5
