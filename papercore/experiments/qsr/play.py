"""What the chapter's control turns: a rule and its numbers -> rounds, volume, hours. Closed form; nothing is trained.

Glossary
    ratio      alpha / peak learning rate: a schedule depends on this quotient alone (up to the lowest rate)
    bandwidth  of the network between nodes, Gbit/s; an average sends 2 (K - 1) / K of the weights a rank (ring)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from papercore.lab.config import checked_choice
from papercore.local_sgd import (
    QSR,
    CommReport,
    ConstantH,
    SyncSchedule,
    communication_volume,
    cosine_lr,
    linear_lr,
    step_lr,
)

RULES = {"constant H": 0.0, "1/η": 1.0, "QSR (1/η²)": 2.0, "cubic (1/η³)": 3.0}
DECAYS = ("cosine", "linear", "steps")
# ViT-B over two nodes of 8 GPUs, steps thinned by 10 so that a control answers at once.
STEPS, WARMUP = 9_360, 1_000
PARAMETERS, NODES, THINNED = 86_567_656, 2, 10
STEP_SECONDS = (
    0.75  # of computation; 93,600 such steps are the 19.5 hours that the paper's own numbers leave for it
)


def schedule(rule: str, ratio: float, h_base: int, peak: float) -> SyncSchedule:
    """The schedule that the control shows."""
    power = RULES[checked_choice("rule", rule, RULES)]
    return ConstantH(h_base) if power == 0 else QSR(ratio * peak, h_base, power=power)


@lru_cache(maxsize=512)
def report(rule: str, ratio: float, h_base: int, decay: str) -> CommReport:
    """Rounds of a thinned ViT-B run.

    >>> f"{report('QSR (1/η²)', 2.1875, 4, 'cosine').fraction:.1%}"
    '10.4%'
    """
    return communication_volume(schedule(rule, ratio, h_base, 1.0), rate(decay), STEPS, warmup_steps=WARMUP)


def rate(decay: str) -> Callable[[int], float]:
    """Learning rate over its peak."""
    make = {"cosine": cosine_lr, "linear": linear_lr}
    if checked_choice("decay", decay, DECAYS) == "steps":
        return step_lr(1.0, STEPS, warmup_steps=WARMUP)
    return make[decay](1.0, STEPS, warmup_steps=WARMUP, final=1e-4)


def heights(found: CommReport, points: int) -> tuple[list[float], list[float]]:
    """Step (thousands of the whole run) and H at that step, thinned to `points`, with two digits."""
    starts = np.array([start for start, _ in found.schedule])
    at = np.linspace(0, STEPS - 1, points).astype(int)
    lengths = [found.schedule[i].length for i in np.searchsorted(starts, at, side="right") - 1]
    return [round(THINNED * int(a) / 1000, 1) for a in at], [float(f"{h:.2g}") for h in lengths]


def sync_seconds(bandwidth: float, *, nodes: int = NODES, parameters: int = PARAMETERS) -> float:
    """Seconds of one average of fp32 weights over `nodes` at `bandwidth` Gbit/s, latency left out.

    >>> f"{sync_seconds(25):.2f}"
    '0.11'
    """
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ValueError(f"bandwidth is {bandwidth} Gbit/s: expected a finite number above 0.")
    return 2 * (nodes - 1) / nodes * 4 * parameters * 8 / (bandwidth * 1e9)


def hours(found: CommReport, bandwidth: float) -> float:
    """Hours of the whole run of 93,600 steps."""
    whole = found.steps * THINNED
    return (whole * STEP_SECONDS + found.fraction * whole * sync_seconds(bandwidth)) / 3600
