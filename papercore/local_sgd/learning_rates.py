"""Learning rates as functions of the step, without torch: lr_fn(step) -> float.

A synchronization rule that follows the learning rate must know it before the run, to count rounds, and during the run, to make
them. Functions of the step serve both. All share one warm-up: linear from `start` at step 0 to `peak` at step `warmup_steps`.

Glossary
    peak          eta_max    highest rate, reached at step warmup_steps
    total_steps   T          steps of the run; steps are numbered 0 .. T - 1
    warmup_steps  W          steps of linear warm-up
    final         eta_min    rate that the decay would reach at step T, which is never taken

The convention (QSR's official code): with s = (t - W) / (T - W), cosine is eta_min + (eta_max - eta_min) (1 + cos(pi s)) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from papercore.local_sgd.schedules import _number, _whole

__all__ = ["constant_lr", "cosine_lr", "linear_lr", "power_of_two_lr", "step_lr"]

LearningRate = Callable[[int], float]

_START = 1e-6  # where the warm-up of the official recipes begins


def cosine_lr(
    peak: float, total_steps: int, *, warmup_steps: int = 0, final: float = 1e-6, start: float = _START
) -> LearningRate:
    """Half a cosine from `peak` at the end of warm-up to `final` at step `total_steps`.

    Raises:
        ValueError: a rate is negative or not finite, final > peak, or warmup_steps is not within the run. The returned function
            raises ValueError for a step outside 0 .. total_steps.

    >>> lr = cosine_lr(0.8, 62_400, warmup_steps=1_560)
    >>> lr(0), lr(1_560), round(lr(31_980), 3)
    (1e-06, 0.8, 0.4)
    """
    peak, final = _rates(peak, final)

    def decay(share: float) -> float:
        return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * share))

    return _with_warmup(decay, peak, total_steps, warmup_steps, start)


def linear_lr(
    peak: float, total_steps: int, *, warmup_steps: int = 0, final: float = 1e-6, start: float = _START
) -> LearningRate:
    """A straight line from `peak` at the end of warm-up to `final` at step `total_steps`. Raises as `cosine_lr`."""
    peak, final = _rates(peak, final)
    return _with_warmup(lambda share: peak + (final - peak) * share, peak, total_steps, warmup_steps, start)


def constant_lr(
    peak: float, total_steps: int, *, warmup_steps: int = 0, start: float = _START
) -> LearningRate:
    """`peak` throughout, after warm-up. Raises as `cosine_lr`."""
    peak, _ = _rates(peak, peak)
    return _with_warmup(lambda share: peak, peak, total_steps, warmup_steps, start)


def step_lr(
    peak: float,
    total_steps: int,
    *,
    milestones: Sequence[int] | None = None,
    factor: float = 0.1,
    warmup_steps: int = 0,
    start: float = _START,
) -> LearningRate:
    """`peak`, multiplied by `factor` at every milestone that has been reached.

    Args:
        milestones: steps, increasing; default: a third, two thirds and eight ninths of the run (30, 60, 80 of 90 epochs).
        factor: between 0 (excluded) and 1.

    Raises:
        ValueError: as `cosine_lr`; also milestones that do not increase or lie outside the run, or a factor out of range.

    >>> lr = step_lr(0.8, 900, milestones=[300, 600])
    >>> [round(lr(step), 4) for step in (0, 299, 300, 899)]
    [0.8, 0.8, 0.08, 0.008]
    """
    peak, _ = _rates(peak, peak)
    factor = _number("factor", factor)
    if not 0 < factor <= 1:
        raise ValueError(f"factor = {factor}: expected 0 < factor <= 1.")
    total = _whole("total_steps", total_steps, 1)
    at = [total // 3, 2 * total // 3, 8 * total // 9] if milestones is None else list(milestones)
    at = [_whole("milestone", one, 1) for one in at] if milestones is not None else at
    if at != sorted(at) or any(one >= total for one in at):
        raise ValueError(f"milestones {at}: expected increasing steps before total_steps = {total}.")
    rate = _with_warmup(lambda share: peak, peak, total, warmup_steps, start)

    def lr(step: int) -> float:
        return rate(step) * factor ** sum(one <= step for one in at)

    return lr


def power_of_two_lr(lr_fn: LearningRate, *, warmup_steps: int = 0, base: float = 2.0) -> LearningRate:
    """`lr_fn` rounded to the nearest power of `base` after warm-up: a smooth schedule turned into steps.

    "Nearest" is on the logarithmic axis. The official code offers such a schedule, and compares the cubic rule on it.

    Raises ValueError for a base that is not above 1.

    >>> lr = power_of_two_lr(cosine_lr(0.8, 1000))
    >>> [lr(step) for step in (0, 500, 700)]
    [1.0, 0.5, 0.125]
    """
    warmup_steps, base = _whole("warmup_steps", warmup_steps, 0), _number("base", base)
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"base = {base}: expected a finite number above 1.")

    def lr(step: int) -> float:
        rate = lr_fn(step)
        if step < warmup_steps or rate <= 0:
            return rate
        return base ** round(math.log(rate, base))

    return lr


def _rates(peak: float, final: float) -> tuple[float, float]:
    peak, final = _number("peak", peak), _number("final", final)
    if not (math.isfinite(peak) and peak >= 0):
        raise ValueError(f"peak = {peak}: expected a finite learning rate >= 0.")
    if not (math.isfinite(final) and 0 <= final <= max(peak, 0)):
        raise ValueError(f"final = {final}: expected a finite learning rate from 0 to peak = {peak}.")
    return peak, final


def _with_warmup(
    decay: Callable[[float], float], peak: float, total_steps: int, warmup_steps: int, start: float
) -> LearningRate:
    """Warm-up, then `decay` over the share of the remaining steps that is past."""
    total = _whole("total_steps", total_steps, 1)
    warmup = _whole("warmup_steps", warmup_steps, 0)
    if warmup >= total and warmup > 0:
        raise ValueError(f"warmup_steps = {warmup}: expected fewer than total_steps = {total}.")
    start = _number("start", start)
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start = {start}: expected a finite learning rate >= 0.")

    def lr(step: int) -> float:
        if not 0 <= step <= total:
            raise ValueError(f"step {step} is outside this schedule: expected 0 to {total}.")
        if step < warmup:
            return start + (peak - start) * step / warmup
        return decay((step - warmup) / (total - warmup))

    return lr
