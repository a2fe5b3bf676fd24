"""A valley in which the Slow SDE has noise along the bottom: L(a, b) = (1 + a^2) b^2 / 2, minimisers b = 0.

The gradient of one worker has independent Gaussian noise of variance s2_a along the valley and s2_b across it. At (a, 0) the
Hessian is lambda = 1 + a^2 across and 0 along, Sigma_hat = s2_b / (2 lambda), and the Slow SDE of Local SGD for a, at a fixed
local batch and with eta H -> infinity, is

    d a = - s2_b a / (2 (1 + a^2)) dt  +  sqrt(s2_a / K) dW                (t = eta^2 * steps; s2 of ONE worker)

The drift does not know K; the diffusion falls with it. Its stationary law is proportional to (1 + a^2)^(-K s2_b / (2 s2_a)),
with E a^2 = 1 / (K s2_b / s2_a - 3). So the noise along the valley keeps the iterate away from the flattest place, a = 0, and
more workers at the same local batch let it come closer.

Glossary
    sharpness    1 + a^2
    replicas     independent runs
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from papercore.local_sgd import psi


def simulate_valley(
    k: int,
    h: int,
    steps: int,
    *,
    eta: float,
    s2_a: float,
    s2_b: float,
    start: float,
    replicas: int,
    seed: int,
) -> Tensor:
    """Local SGD in the valley. Returns a at the averages, [1 + steps / h, replicas], float64.

    Raises:
        ValueError: h does not divide steps.
    """
    if steps % h:
        raise ValueError(f"{steps} steps are no whole number of rounds of {h}")
    generator = torch.Generator().manual_seed(seed)
    a = torch.full((k, replicas), start, dtype=torch.float64)
    b = torch.zeros_like(a)
    noise = torch.empty(2, k, replicas, dtype=torch.float64)
    seen = [a[0].clone()]
    scale_a, scale_b = math.sqrt(s2_a), math.sqrt(s2_b)
    for step in range(steps):
        noise.normal_(generator=generator)
        ga = a * b.square() + scale_a * noise[0]
        b -= eta * ((1 + a.square()) * b + scale_b * noise[1])
        a -= eta * ga
        if (step + 1) % h == 0:
            a.copy_(a.mean(0).expand_as(a))
            b.copy_(b.mean(0).expand_as(b))
            seen.append(a[0].clone())
    return torch.stack(seen)


def stationary_square(k: int, s2_a: float, s2_b: float, *, eta_h: float = math.inf) -> float:
    """E a^2 under the stationary law of the Slow SDE; infinite where the law has no second moment.

    At a finite eta_h the drift is 1/K + (1 - 1/K) psi(2 eta_h lambda) of its limit; lambda is taken as 1, its value at a = 0.

    >>> stationary_square(8, 0.25, 1.0)
    0.034482758620689655
    """
    share = 1.0 if math.isinf(eta_h) else 1 / k + (1 - 1 / k) * psi(2 * eta_h)
    tail = k * share * s2_b / s2_a - 3
    return 1 / tail if tail > 0 else math.inf
