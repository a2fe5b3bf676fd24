"""The two problems with a known answer, simulated: rates on the hyperbola, sharpness in slow time, gaps, diffusion in a valley.

Every function returns a flat dict of numpy arrays and numbers, as a stage of a run keeps them.

Glossary
    ratio        K * (rate of decay of log D in slow time) / s2: 1 for SGD and at most K for Local SGD, for eta -> 0
    eta_h        eta * H
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from papercore.experiments.local_sgd.config import QuickConfig
from papercore.experiments.local_sgd.rates import gap
from papercore.experiments.local_sgd.valley import simulate_valley, stationary_square
from papercore.local_sgd import ConstantH, predict_hyperbola, simulate_hyperbola

START = (2.0, 0.5)
SHARPNESS = START[0] ** 2 + START[1] ** 2
# Learning rates of the figure, each with periods that divide its number of steps.
RATE_GRID = ((0.02, (1, 2, 5, 10, 25, 50, 100, 250, 500)), (0.01, (1, 2, 4, 10, 20, 50, 100, 200, 500, 1000)))
# One eta_h at four learning rates: how fast the theorem's error falls with eta.
HALVINGS = ((0.04, 25), (0.02, 50), (0.01, 100), (0.005, 200))
CURVES = (0.02, 10_000, (1, 25, 500))
# (eta, eta * H, steps) at which a simulation checks the closed form of the gap.
GAPS = (
    (0.005, 1.0, 2000),
    (0.005, 1.0, 20_000),
    (0.02, 1.0, 1000),
    (0.02, 1.0, 10_000),
    (0.1, 1.0, 100),
    (0.1, 1.0, 2000),
    (0.2, 1.0, 2000),
)
VALLEY = {"eta": 0.1, "h": 50, "s2_a": 0.0625, "s2_b": 0.25, "start": 1.5}
EARLY_ROUNDS = 20


def _constant(eta: float) -> Any:
    return lambda step: eta


def rate_rows(config: QuickConfig, seed: int) -> dict[str, Any]:
    """The ratio at every point of RATE_GRID: simulated, its standard error, both theories."""
    k, s2 = config.workers, config.label_noise
    rows = []
    for eta, periods in RATE_GRID:
        rows += [[eta, h, *_ratios(config, eta, h, seed)] for h in periods]
    halvings = [[eta, h, *_ratios(config, eta, h, seed + 1)] for eta, h in HALVINGS]
    return {"rows": np.array(rows), "halvings": np.array(halvings), "k": k, "s2": s2}


def _ratios(config: QuickConfig, eta: float, h: int, seed: int) -> tuple[float, float, float, float]:
    k, s2 = config.workers, config.label_noise
    steps = max(h, h * round(config.horizon / (eta**2 * s2) / h))
    shared: dict[str, Any] = {"k": k, "label_noise": s2, "start": START}
    run = simulate_hyperbola(
        ConstantH(h), _constant(eta), steps, replicas=config.replicas, seed=seed, **shared
    )
    rate, se = run.decay_rate()
    theory = [
        predict_hyperbola(ConstantH(h), _constant(eta), steps, mode=mode, **shared).decay_rate()[0]
        for mode in ("discrete", "continuous")
    ]
    return k * rate / s2, k * se / s2, k * theory[0] / s2, k * theory[1] / s2


def curves(config: QuickConfig, seed: int) -> dict[str, Any]:
    """Sharpness of the projected average against slow time for three H, simulated and from the discrete theory."""
    eta, steps, periods = CURVES
    out: dict[str, Any] = {"periods": np.array(periods), "eta": eta}
    shared: dict[str, Any] = {"k": config.workers, "label_noise": config.label_noise, "start": START}
    for h in periods:
        run = simulate_hyperbola(
            ConstantH(h), _constant(eta), steps, replicas=config.replicas, seed=seed, **shared
        )
        theory = predict_hyperbola(ConstantH(h), _constant(eta), steps, **shared)
        keep = np.unique(np.linspace(0, len(run.steps) - 1, 41).round().astype(int))
        out |= {
            f"time_{h}": run.slow_time.numpy()[keep],
            f"mean_{h}": run.mean.numpy()[keep],
            f"se_{h}": run.se.numpy()[keep],
            f"theory_{h}": theory.mean.numpy()[keep],
            f"u_{h}": run.u.numpy()[keep],
            f"v_{h}": run.v.numpy()[keep],
        }
    return out


def gap_rows(config: QuickConfig, seed: int) -> dict[str, Any]:
    """The gap in sharpness between SGD and Local SGD, simulated and in closed form, at the points of GAPS."""
    k, s2 = config.workers, config.label_noise
    rows = []
    for eta, eta_h, steps in GAPS:
        h = max(1, round(eta_h / eta))
        ends = []
        for period in (1, h):
            run = simulate_hyperbola(
                ConstantH(period),
                _constant(eta),
                steps,
                k=k,
                label_noise=s2,
                start=START,
                replicas=config.replicas,
                seed=seed,
            )
            ends.append((float(run.mean[-1]), float(run.se[-1])))
        (sgd, sgd_se), (local, local_se) = ends
        closed = float(gap(steps, eta, h, k, s2, start=SHARPNESS))
        rows.append([eta, h, steps, sgd - local, math.hypot(sgd_se, local_se), closed])
    return {"rows": np.array(rows)}


def valley(config: QuickConfig, seed: int) -> dict[str, Any]:
    """Position along the valley for several K at one local batch: mean and variance early on, mean square in the end."""
    h = int(VALLEY["h"])
    steps = h * max(2 * EARLY_ROUNDS, round(config.valley_steps / h))
    rows, paths = [], {}
    for k in config.valley_workers:
        seen = simulate_valley(
            k, h, steps, eta=VALLEY["eta"], s2_a=VALLEY["s2_a"], s2_b=VALLEY["s2_b"], start=VALLEY["start"],
            replicas=config.valley_replicas, seed=seed,
        ).numpy()  # fmt: skip
        early = seen[EARLY_ROUNDS]
        late = np.square(seen[len(seen) // 2 :]).mean(0)  # of one replica: its rounds are not independent
        rows.append([
            k, early.mean(), early.std(ddof=1) / math.sqrt(early.size), early.var(ddof=1),
            late.mean(), late.std(ddof=1) / math.sqrt(late.size), stationary_square(k, VALLEY["s2_a"], VALLEY["s2_b"], eta_h=VALLEY["eta"] * h),
        ])  # fmt: skip
        paths[f"mean_{k}"], paths[f"sd_{k}"] = seen.mean(1), seen.std(1, ddof=1)
    return {"rows": np.array(rows), "steps": np.arange(0, steps + 1, h), **paths}


VALLEY_COLUMNS = ["K", "mean a", "se", "variance of a", "E a^2 late", "se late", "E a^2, stationary law"]
RATE_COLUMNS = ["eta", "H", "simulated", "se", "discrete theory", "Slow SDE"]
GAP_COLUMNS = ["eta", "H", "steps", "simulated", "se", "closed form"]
