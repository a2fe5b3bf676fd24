"""The hyperbola in closed form: how fast log D falls, at any learning rate, number of workers and length of a round.

L(u, v) = (u v - 1)^2 / 2 with label noise; D = u^2 - v^2, sharpness lambda = sqrt(D^2 + 4) on the minimisers u v = 1. With
lambda frozen over a round the moments of `papercore.local_sgd.predict_hyperbola` have fixed points, and the rate is

    rho = eta^2 (s2 + mean of m over the round) - (1 - 1/K) w_H / H            a step
    w_H = eta^2 s2 (1 - q^H) / (1 - q),   q = (1 - eta lambda)^2               what one average gives back
    m_t = m + q^t (m/K - m),              m = eta^2 lambda^2 s2 / (1 - q)      mean square of u v - 1 in step t of a round

and for eta -> 0 at fixed eta H it is the theorem's eta^2 s2 [1/K + (1 - 1/K) psi(2 eta H lambda)].

Since rho depends on D alone, the time from one D to another is an integral over log D: no stepping, whatever the number of steps.

Glossary
    s2       variance of the label noise of one worker, sigma^2 / B_loc
    gap      sharpness of SGD minus sharpness of Local SGD after the same number of steps
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def psi(x: ArrayLike) -> Array:
    """psi(x) = 1 - (1 - e^-x) / x, with psi(0) = 0. numpy, for grids; papercore.local_sgd.psi is the one for tensors.

    >>> psi([0.0, 1.0]).round(4).tolist()
    [0.0, 0.3679]
    """
    x = np.asarray(x, dtype=float)
    safe = np.where(x < 1e-4, 1.0, x)
    return np.where(x < 1e-4, x / 2 - x**2 / 6, 1 + np.expm1(-safe) / safe)


def discrete_rate(sharpness: ArrayLike, eta: float, h: float, k: int, s2: float) -> Array:
    """rho, the fall of log D a step, to order eta^2 and at any H.

    >>> discrete_rate(4.25, 0.02, 1, 1, 0.5).round(7).tolist() == round(0.02**2 * 0.5 * (1 + 0.02 * 4.25 / (2 - 0.02 * 4.25)), 7)
    True
    """
    sharpness = np.asarray(sharpness, dtype=float)
    q = (1 - eta * sharpness) ** 2
    kept = -np.expm1(h * np.log(np.maximum(q, 1e-300))) / (1 - q)  # (1 - q^H) / (1 - q)
    m = eta**2 * sharpness**2 * s2 / (1 - q)
    mean_m = m * (1 - (1 - 1 / k) * kept / h)
    return eta**2 * (s2 + mean_m) - (1 - 1 / k) * eta**2 * s2 * kept / h


def continuous_rate(sharpness: ArrayLike, eta: float, h: float, k: int, s2: float) -> Array:
    """rho of the Slow SDE."""
    share = psi(2 * eta * h * np.asarray(sharpness, dtype=float))
    return eta**2 * s2 * (1 / k + (1 - 1 / k) * share)


def sharpness_after(
    steps: ArrayLike, eta: float, h: float, k: int, s2: float, *, start: float, mode: str = "discrete"
) -> Array:
    """Sharpness after `steps` steps from the sharpness `start` (> 2), by the integral over log D.

    Args:
        h: local steps; may exceed `steps`, which is then a part of one round (and too large a drift is credited to it).
        mode: "discrete" or "continuous", which rate.

    >>> float(sharpness_after(0, 0.02, 50, 8, 0.5, start=4.25))
    4.25
    """
    rate = {"discrete": discrete_rate, "continuous": continuous_rate}[mode]
    log_d = 0.5 * math.log(start**2 - 4) + np.linspace(0, -30, 3001)
    lam = np.sqrt(np.exp(2 * log_d) + 4)
    slowness = 1 / rate(lam, eta, h, k, s2)
    time = np.concatenate([[0.0], np.cumsum(0.5 * (slowness[1:] + slowness[:-1]) * -np.diff(log_d))])
    reached = np.interp(np.asarray(steps, dtype=float), time, log_d)
    return np.sqrt(np.exp(2 * reached) + 4)


def gap(steps: ArrayLike, eta: float, h: float, k: int, s2: float, *, start: float) -> Array:
    """Sharpness of SGD minus sharpness of Local SGD after the same steps."""
    sgd = sharpness_after(steps, eta, 1, k, s2, start=start)
    return sgd - sharpness_after(steps, eta, h, k, s2, start=start)


def early_gap(steps: ArrayLike, eta: float, h: float, k: int, s2: float, *, start: float) -> Array:
    """The gap for few steps: proportional to eta^2 times steps, (lambda - 4 / lambda) (rho of Local SGD - rho of SGD) steps."""
    extra = discrete_rate(start, eta, h, k, s2) - discrete_rate(start, eta, 1, k, s2)
    return (start - 4 / start) * extra * np.asarray(steps, dtype=float)
