"""The chapter's figures. Each function reads a record alone and returns a `Drawn`.

They lie in files by what they show: figures_theory.py (the idea, rates, slow time, the conditions, diffusion) and
figures_digits.py (training of networks). All are reached from here::

    from papercore.experiments.local_sgd import figures
    page.show(figures.rates, record)
"""

from __future__ import annotations

from papercore.experiments.local_sgd.figures_digits import flatness, post, scratch, standard
from papercore.experiments.local_sgd.figures_theory import (
    conditions,
    diffusion,
    idea,
    plane,
    rates,
    slow_time,
)

__all__ = [
    "conditions",
    "diffusion",
    "flatness",
    "idea",
    "plane",
    "post",
    "rates",
    "scratch",
    "slow_time",
    "standard",
]
