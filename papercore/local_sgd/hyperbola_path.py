"""What a run on the hyperbola u v = 1 leaves: its sharpness over time, and the projection that defines it.

The minimisers of (u v - 1)^2 / 2; see hyperbola.py, which makes these paths, for the problem and its symbols. Gradient flow
conserves D = u^2 - v^2, so Phi(u, v), its end, is known: sharpness lambda = sqrt(D^2 + 4) there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HyperbolaPath", "phi_on_hyperbola"]


@dataclass(frozen=True)
class HyperbolaPath:
    """Sharpness over time, at the start and after every synchronisation (S entries, CPU, float64 but for steps).

    As a sequence it is `mean`: path[-1] is the final sharpness.

    steps: [S] steps made, from 0; slow_time: [S] sum of eta^2.
    mean: [S] sharpness of the average of the workers, projected on the hyperbola; mean over replicas. se: its standard error
        (0 for a prediction, NaN for one replica).
    u, v: [S] the projected average, mean over replicas.
    variance: [S] over replicas, of the projected average: trace of its covariance (0 for a prediction).
    residual: [S] mean square of u v - 1 at the average, before the projection (a prediction that does not know it: NaN).
    """

    steps: Tensor
    slow_time: Tensor
    mean: Tensor
    se: Tensor
    u: Tensor
    v: Tensor
    variance: Tensor
    residual: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: int | slice) -> Tensor:
        return self.mean[index]

    def decay_rate(self) -> tuple[float, float]:
        """Mean rate of decay of log |D| in slow time, D = sqrt(mean^2 - 4), and its standard error.

        The Slow SDE says s2 (1/K + (1 - 1/K) psi(2 eta H lambda)): times K/s2 it is 1 for SGD and K at most.
        """
        first, last = float(self.mean[0]), float(self.mean[-1])
        span = float(self.slow_time[-1])
        if first <= 2 or last <= 2 or span == 0:
            raise ValueError(
                f"decay_rate needs sharpness above its floor of 2 and a learning rate above 0: it starts at {first}, ends at "
                f"{last}, after slow time {span}."
            )
        start, end = first**2 - 4, last**2 - 4
        return math.log(start / end) / (2 * span), float(self.se[-1]) * last / end / span


def phi_on_hyperbola(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sharpness and coordinates of Phi(u, v): the point of the hyperbola with the same D, on the side of the larger coordinate."""
    d = u.square() - v.square()
    sharpness = torch.sqrt(d.square() + 4)
    side = torch.where(u.abs() >= v.abs(), u, v).sign()
    larger = torch.sqrt((sharpness + d.abs()) / 2)
    # The smaller one as 1 / larger: (lambda - |D|) / 2 would cancel.
    pu, pv = torch.where(d >= 0, larger, 1 / larger), torch.where(d >= 0, 1 / larger, larger)
    return sharpness, side * pu, side * pv
