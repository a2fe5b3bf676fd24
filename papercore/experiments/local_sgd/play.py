"""What the chapter's controls turn: the hyperbola in closed form, for any K, learning rate, H and noise. Instant.

Glossary
    s2      variance of one worker's label noise
    gauge   how many times faster than SGD's theory log D falls at the start: between 1 and K
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from papercore.experiments.local_sgd.rates import discrete_rate, sharpness_after

START = 4.25


def sharpness_paths(
    k: int, eta: float, h: int, s2: float, *, steps: int = 20_000, points: int = 21, start: float = START
) -> dict[str, list[float]]:
    """Sharpness at equally spaced steps from 0 to `steps` of SGD, Local SGD and SGD with one worker's batch; three digits.

    >>> {name: path[0] for name, path in sharpness_paths(8, 0.01, 100, 0.5, points=3).items()}
    {'SGD, batch B': 4.25, 'Local SGD': 4.25, 'SGD, batch B / K': 4.25}
    """
    if points < 2 or steps < 1:
        raise ValueError(f"{points} points over {steps} steps: expected at least two points and one step")
    at = np.linspace(0, steps, points)
    arms: dict[str, NDArray[np.float64]] = {
        "SGD, batch B": sharpness_after(at, eta, 1, k, s2, start=start),
        "Local SGD": sharpness_after(at, eta, h, k, s2, start=start),
        "SGD, batch B / K": sharpness_after(at, eta, 1, 1, s2, start=start),
    }
    return {name: [float(f"{value:.3g}") for value in path] for name, path in arms.items()}


def gauge(k: int, eta: float, h: int, s2: float, *, start: float = START) -> float:
    """Rate of Local SGD over that of SGD's limit, at the start.

    >>> round(gauge(8, 0.01, 1000, 0.5), 1)
    8.1
    """
    return float(discrete_rate(start, eta, h, k, s2) * k / (eta**2 * s2))


def places(k: int, eta: float, h: int, s2: float, steps: int, *, start: float = START) -> tuple[float, float]:
    """The place (u, v) on the hyperbola after `steps` steps, u the larger.

    >>> places(8, 0.01, 100, 0.5, 0)
    (2.0, 0.5)
    """
    lam = float(sharpness_after(steps, eta, h, k, s2, start=start))
    u = float(np.sqrt((lam + np.sqrt(lam**2 - 4)) / 2))
    return round(u, 3), round(1 / u, 3)
