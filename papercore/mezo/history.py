"""Momentum and Adam without stored moments: both are recomputed from the log (section 2.1 and appendix B of
the paper).

Glossary
    g_i        estimate of step i, (1/n) sum_j pg_ij z(s_ij); [d], never stored
    mu         momentum: v_t = mu v_(t-1) + g_t, theta <- theta - lr v_t (torch.optim.SGD)
    beta1, 2   Adam's decay rates; m_t and v_t as in torch.optim.Adam, bias correction included
    window K   how many updates back the history reaches: the first K with mu^K (beta^K) below a tolerance

Every direction is a sum of coefficients times noise, so momentum needs no moments: one pass over theta with K
n terms. Adam divides by sqrt(v): the noise of the window is made again chunk by chunk, and m and v live for
one chunk. With Rademacher noise and one draw, z^2 = 1 makes v a single number for all weights, and Adam is
one pass too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from papercore.mezo.log import ZOLog
from papercore.mezo.noise import add_noise_
from papercore.mezo.seeds import draw_seed
from papercore.mezo.weights import Terms

# Weight of what a window leaves out, relative to the whole. The first moment keeps single precision; the
# second, which decays slowly and enters through a square root, costs 6,905 updates at 0.999 already.
FIRST_MOMENT_TOLERANCE = 1e-6
SECOND_MOMENT_TOLERANCE = 1e-3


def window_of(decay: float, tolerance: float = FIRST_MOMENT_TOLERANCE) -> int:
    """The smallest K with decay^K < tolerance: what older updates add is then below the tolerance.

    >>> window_of(0.0), window_of(0.9), window_of(0.9, 1e-3), window_of(0.999, 1e-3)
    (1, 132, 66, 6905)
    """
    return 1 if decay == 0 else max(1, math.floor(math.log(tolerance) / math.log(decay)) + 1)


def updates_before(log: ZOLog, step: int, window: int) -> Iterator[int]:
    """The last `window` steps up to and including `step` that made an update, newest first."""
    left, at = window, step
    while left and at >= 0:
        if not log.is_skipped(at):
            yield at
            left -= 1
        at -= 1


def gradient_terms(log: ZOLog, step: int, group: int, factor: float = 1.0) -> Terms:
    """factor * g_step for the tensors of a group, as (seed, coefficient) pairs.

    A group with its own eps is perturbed by eps_group z, so its estimate is the difference of the losses over
    2 eps_group, times z (unbiased: definition 6 of the paper). The log keeps the scalar of the first group.
    """
    settings = log.settings(step)
    scale = factor * (settings.groups[0].eps / settings.groups[group].eps) / settings.draws
    return [(draw_seed(log.rule.seed, step, j), scale * pg) for j, pg in enumerate(log.scalars(step))]


def momentum_terms(log: ZOLog, step: int, group: int) -> Terms:
    """-lr v_t as terms: sum over the window of -lr mu^age g. Without momentum the window is one step."""
    rule, lr = log.rule, log.settings(step).groups[group].lr
    window = rule.window or window_of(rule.momentum)
    terms: Terms = []
    for age, at in enumerate(updates_before(log, step, window if rule.momentum else 1)):
        terms += gradient_terms(log, at, group, -lr * rule.momentum**age)
    return terms


def adam_is_one_pass(log: ZOLog, step: int) -> bool:
    """True if v is one number for all weights: Rademacher noise, and one draw at every step so far."""
    return log.rule.dist == "rademacher" and (log.first_of_many is None or step < log.first_of_many)


class ScalarSecondMoment:
    """Adam's v for Rademacher noise at one draw, where g^2 = pg^2 in every weight: one number a group.

    The recursion runs forward through the log and remembers where it stands, so that a step costs O(1).
    """

    def __init__(self, log: ZOLog) -> None:
        self.log = log
        self.at = 0  # steps consumed
        self.values: list[float] = []

    def upto(self, step: int) -> list[float]:
        """v after `step`, per group, before bias correction."""
        assert self.log.rule.betas is not None
        beta2 = self.log.rule.betas[1]
        if step + 1 < self.at:
            self.at, self.values = 0, []
        while self.at <= step:
            settings = self.log.settings(self.at)
            if not self.values:
                self.values = [0.0] * len(settings.groups)
            if not self.log.is_skipped(self.at):
                pg = self.log.scalars(self.at)[0]
                squares = [(pg * settings.groups[0].eps / group.eps) ** 2 for group in settings.groups]
                self.values = [beta2 * v + (1 - beta2) * g for v, g in zip(self.values, squares, strict=True)]
            self.at += 1
        return self.values


def scalar_adam_terms(log: ZOLog, step: int, group: int, second: ScalarSecondMoment) -> Terms:
    """-lr m_hat / (sqrt(v_hat) + eps) as terms, for Rademacher noise and one draw."""
    rule, lr = log.rule, log.settings(step).groups[group].lr
    assert rule.betas is not None
    beta1, beta2 = rule.betas
    taken = log.taken(step)
    root = math.sqrt(second.upto(step)[group] / (1 - beta2**taken)) + rule.adam_eps
    if root == 0:
        return []  # no slope so far
    factor = -lr / (1 - beta1**taken) / root * (1 - beta1)
    terms: Terms = []
    for age, at in enumerate(updates_before(log, step, rule.window or window_of(beta1))):
        terms += gradient_terms(log, at, group, factor * beta1**age)
    return terms


def adam_direction(log: ZOLog, step: int, group: int, like: Tensor, start: int, backend: str) -> Tensor:
    """-lr m_hat / (sqrt(v_hat) + eps) for one chunk of weights, by torch.optim.Adam's recursion from the
    window's noise.

    like: float32 or float64 [m], for size, dtype and device; start: index of its first element. Returns a
    tensor like it. Cost: K n passes of noise; memory: three chunks.
    """
    rule, lr = log.rule, log.settings(step).groups[group].lr
    assert rule.betas is not None
    beta1, beta2 = rule.betas
    m, v, g = (torch.zeros_like(like) for _ in range(3))
    window = rule.window or max(window_of(beta1), window_of(beta2, SECOND_MOMENT_TOLERANCE))
    for at in reversed(list(updates_before(log, step, window))):
        add_noise_([g], [start], gradient_terms(log, at, group), scale=0.0, dist=rule.dist, backend=backend)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    taken = log.taken(step)
    root = v.div_(1 - beta2**taken).sqrt_().add_(rule.adam_eps).clamp_min_(torch.finfo(like.dtype).tiny)
    return m.div_(root).mul_(-lr / (1 - beta1**taken))
