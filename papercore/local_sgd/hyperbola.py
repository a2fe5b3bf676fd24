"""A problem with a curve of minimisers on which Local SGD can be followed exactly: L(u, v) = (u v - 1)^2 / 2.

Its minimisers are the hyperbola u v = 1. Training with label noise (worker's target 1 + delta, delta ~ N(0, s2)) makes
SGD and Local SGD drift along it, from sharp points to the flattest (1, 1). Local SGD paper, arXiv 2303.01215 (the
label-noise case of the Slow SDE); the recursions below are derived from these two exact identities, D = u^2 - v^2:

* one step with x = u v - 1, r = x - delta:   u <- u - eta r v, v <- v - eta r u   makes  D <- D (1 - eta^2 r^2);
* one average:   D(mean) = mean over workers of D - [Var(u) - Var(v)]   (population variances).

On the hyperbola the sharpness is lambda = u^2 + v^2 = sqrt(D^2 + 4), at least 2; D is also what gradient flow conserves,
so that sqrt(D^2 + 4) is the sharpness at Phi of ANY point, the end of the gradient flow that starts there.

Glossary (code name, symbol, unit)
    k             K                 workers
    label_noise   s2 = sigma^2/B_loc  VARIANCE of the label noise that one worker sees (not its standard deviation)
    lr            eta
    m             mean square of x on a worker; at a synchronisation, of the average
    w             variance between workers along (v, u), divided by 1 - 1/K
    q             (1 - eta lambda)^2, how much of m and w a step keeps
    slow time     sum of eta^2 over the steps
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from papercore.local_sgd.hyperbola_path import HyperbolaPath, phi_on_hyperbola
from papercore.local_sgd.schedules import Round, SyncSchedule, _number, _whole
from papercore.local_sgd.slow_sde import psi

__all__ = ["predict_hyperbola", "simulate_hyperbola"]

_NOISE_BLOCK = 1 << 19  # numbers drawn at once: large enough to amortise the call, small enough for the cache
_SYNC_BLOCK = 512  # synchronisations that wait before their statistics are taken


def simulate_hyperbola(
    schedule: SyncSchedule,
    lr_fn: Callable[[int], float],
    total_steps: int,
    *,
    k: int,
    label_noise: float,
    start: tuple[float, float] = (2.0, 0.5),
    replicas: int = 200,
    seed: int = 0,
    warmup_steps: int = 0,
) -> HyperbolaPath:
    """Local SGD on (u v - 1)^2 / 2 with fresh Gaussian label noise, many replicas at once, in float64 on the CPU.

    Args:
        schedule: when to average; ConstantH(1) is SGD with the batch of all k workers.
        lr_fn, total_steps, warmup_steps: as in `SyncSchedule.rounds`.
        k: workers, >= 1.
        label_noise: VARIANCE of the noise in one worker's target, sigma^2 / B_loc, >= 0.
        start: (u, v) of every worker.
        replicas: independent runs; the standard error comes from them.
        seed: of the generator; one seed gives the same noise under every schedule.

    Warns:
        RuntimeWarning: eta * sharpness reached 2, where the theory is void and runs may diverge (values are then NaN or inf).

    Raises:
        ValueError: a number out of range. TypeError: a count is not whole, or the schedule is none.

    >>> from papercore.local_sgd.schedules import ConstantH
    >>> path = simulate_hyperbola(ConstantH(50), lambda step: 0.02, 1000, k=8, label_noise=0.5, replicas=20, seed=1)
    >>> float(path.mean[0]), int(path.steps[-1]), 3.6 < float(path.mean[-1]) < 3.8
    (4.25, 1000, True)
    """
    rounds, lrs = _rounds(schedule, lr_fn, total_steps, warmup_steps)
    k, s2, (u0, v0) = _checked(k, label_noise, start)
    replicas = _whole("replicas", replicas, 1)
    average = _Points(1, replicas, (u0, v0))
    workers = _Points(k, replicas, (u0, v0))
    noise = _Targets(k, replicas, s2, torch.Generator().manual_seed(_whole("seed", seed, 0)))
    statistics = _Statistics(replicas, min(_SYNC_BLOCK, len(rounds) + 1))
    statistics.add(average)
    for begin, length in rounds:
        if length == 1:
            # Workers that average after one step make together the step of the mean of their targets: K times less work.
            average.descend(noise.take(1, pooled=True), lrs[begin : begin + 1])
        else:
            workers.set_to(average)
            done = 0
            while done < length:
                targets = noise.take(length - done)
                workers.descend(targets, lrs[begin + done : begin + done + len(targets)])
                done += len(targets)
            average.set_to_mean_of(workers)
        statistics.add(average)
    path = statistics.path(rounds, lrs)
    _warn_if_unstable(rounds, lrs, path.mean.tolist())
    return path


class _Points:
    """Points (u, v) of n workers in R replicas, [n, R] each, that move in place."""

    def __init__(self, n: int, replicas: int, start: tuple[float, float]) -> None:
        self.u, self.v = (torch.full((n, replicas), value, dtype=torch.float64) for value in start)
        self._r, self._new = torch.empty_like(self.u), torch.empty_like(self.u)

    def descend(self, targets: Tensor, lrs: list[float]) -> None:
        """One step for each of the targets 1 + delta, [steps, n, R], with the learning rate of that step."""
        u, v, r, new = self.u, self.v, self._r, self._new
        for target, lr in zip(targets.unbind(0), lrs, strict=True):
            torch.mul(u, v, out=r).sub_(target)
            torch.addcmul(u, r, v, value=-lr, out=new)
            v.addcmul_(r, u, value=-lr)
            u, new = new, u
        self.u, self._new = u, new

    def set_to(self, one: _Points) -> None:
        self.u.copy_(one.u.expand_as(self.u))
        self.v.copy_(one.v.expand_as(self.v))

    def set_to_mean_of(self, workers: _Points) -> None:
        torch.mean(workers.u, 0, keepdim=True, out=self.u)
        torch.mean(workers.v, 0, keepdim=True, out=self.v)


class _Targets:
    """Noisy targets 1 + delta, drawn a block of steps at a time; the stream does not depend on how it is taken."""

    def __init__(self, k: int, replicas: int, s2: float, generator: torch.Generator) -> None:
        steps = max(1, _NOISE_BLOCK // (k * replicas))
        self.block = torch.empty(steps, k, replicas, dtype=torch.float64)
        self.pooled: Tensor | None = None
        self.sd, self.generator, self.used = math.sqrt(s2), generator, steps

    def take(self, steps: int, *, pooled: bool = False) -> Tensor:
        """[at most `steps`, k, R], or their means over the workers, [..., 1, R]."""
        if self.used == len(self.block):
            self.block.normal_(1.0, self.sd, generator=self.generator)
            self.pooled, self.used = None, 0
        if pooled and self.pooled is None:
            self.pooled = self.block.mean(1, keepdim=True)
        source = self.pooled if pooled and self.pooled is not None else self.block
        out = source[self.used : self.used + steps]
        self.used += len(out)
        return out


class _Statistics:
    """Moments over replicas of the projected averages, taken a block of synchronisations at a time."""

    def __init__(self, replicas: int, block: int) -> None:
        self.u, self.v = torch.empty(2, block, replicas, dtype=torch.float64).unbind(0)
        self.filled = 0
        self.rows: list[Tensor] = []

    def add(self, average: _Points) -> None:
        self.u[self.filled] = average.u[0]
        self.v[self.filled] = average.v[0]
        self.filled += 1
        if self.filled == len(self.u):
            self._flush()

    def _flush(self) -> None:
        u, v = self.u[: self.filled], self.v[: self.filled]
        self.filled = 0
        replicas = u.shape[1]
        residual = (u * v - 1).square().mean(1)
        sharpness, pu, pv = phi_on_hyperbola(u, v)
        if replicas > 1:
            se = sharpness.std(1) / math.sqrt(replicas)
            variance = pu.var(1) + pv.var(1)
        else:
            se = variance = torch.full_like(residual, math.nan)
        self.rows.append(torch.stack((sharpness.mean(1), se, pu.mean(1), pv.mean(1), variance, residual)))

    def path(self, rounds: list[Round], lrs: list[float]) -> HyperbolaPath:
        if self.filled:
            self._flush()
        steps, slow_time = _time(rounds, lrs)
        return HyperbolaPath(steps, slow_time, *torch.cat(self.rows, 1).unbind(0))


def predict_hyperbola(
    schedule: SyncSchedule,
    lr_fn: Callable[[int], float],
    total_steps: int,
    *,
    k: int,
    label_noise: float,
    start: tuple[float, float] = (2.0, 0.5),
    mode: str = "discrete",
    warmup_steps: int = 0,
) -> HyperbolaPath:
    """The sharpness that theory predicts for `simulate_hyperbola`, with the same arguments; no randomness.

    mode="discrete": moments step by step, to order eta^2 a step, lambda followed within the round. A worker's step takes eta^2 (s2 + m) from log D and maps
        m to q m + eta^2 lambda^2 s2, w to q w + eta^2 s2; an average gives back (1 - 1/K) w and takes lambda^2 (1 - 1/K) w from m.
    mode="continuous": the Slow SDE, d log D / d(eta^2 step) = -s2 [1/K + (1 - 1/K) psi(2 lambda (sum of eta over the round))].
        It holds for eta -> 0 at fixed eta H: at H = 1 its psi term is an artefact, in truth nothing is gained there.

    Warns, raises: as `simulate_hyperbola`; ValueError also for another mode.

    >>> from papercore.local_sgd.schedules import ConstantH
    >>> sgd = predict_hyperbola(ConstantH(1), lambda step: 0.02, 2000, k=8, label_noise=0.5)
    >>> rate, _ = sgd.decay_rate()
    >>> round(8 * rate / 0.5, 2)
    1.04
    """
    rounds, lrs = _rounds(schedule, lr_fn, total_steps, warmup_steps)
    k, s2, (u, v) = _checked(k, label_noise, start)
    if mode not in ("discrete", "continuous"):
        raise ValueError(f"mode must be 'discrete' or 'continuous', got {mode!r}")
    d, m = u * u - v * v, (u * v - 1) ** 2
    ds, ms = [d], [m]
    for begin, length in rounds:
        etas = lrs[begin : begin + length]
        if mode == "discrete":
            d, m = _discrete_round(d, m, etas, k, s2)
        else:
            d, m = _continuous_round(d, etas, k, s2), math.nan
        ds.append(d)
        ms.append(m)
    gap = torch.tensor(ds, dtype=torch.float64)
    side = torch.full_like(gap, u if abs(u) >= abs(v) else v).sign()
    larger = side * torch.sqrt((torch.sqrt(gap.square() + 4) + gap.abs()) / 2)
    sharpness, pu, pv = phi_on_hyperbola(
        torch.where(gap >= 0, larger, 1 / larger), torch.where(gap >= 0, 1 / larger, larger)
    )
    zero = torch.zeros_like(gap)
    steps, slow_time = _time(rounds, lrs)
    path = HyperbolaPath(
        steps, slow_time, sharpness, zero, pu, pv, zero, torch.tensor(ms, dtype=torch.float64)
    )
    _warn_if_unstable(rounds, lrs, sharpness.tolist())
    return path


def _discrete_round(d: float, m: float, etas: list[float], k: int, s2: float) -> tuple[float, float]:
    log_d, w = 0.0, 0.0
    sharpness = math.sqrt(d * d + 4)
    for eta in etas:
        noise = eta * eta * s2
        log_d -= eta * eta * (s2 + m)
        q = (1 - eta * sharpness) ** 2
        m = q * m + sharpness * sharpness * noise
        w = q * w + noise
        # Of the worker as it now stands: over a long round it has drifted a long way (frozen, one round of 6,000 steps is off
        # by 0.4 % in the sharpness; followed, by less than the error of 2,000 replicas).
        sharpness = math.sqrt((d * math.exp(log_d)) ** 2 + 4)
    back = (1 - 1 / k) * w
    return d * math.exp(log_d + back), m - sharpness * sharpness * back


def _continuous_round(d: float, etas: list[float], k: int, s2: float) -> float:
    x, log_d = 2 * sum(etas), 0.0
    for eta in etas:
        sharpness = math.sqrt((d * math.exp(log_d)) ** 2 + 4)
        log_d -= eta * eta * s2 * (1 / k + (1 - 1 / k) * psi(x * sharpness))
    return d * math.exp(log_d)


def _rounds(
    schedule: SyncSchedule, lr_fn: Callable[[int], float], total_steps: int, warmup_steps: int
) -> tuple[list[Round], list[float]]:
    if not isinstance(schedule, SyncSchedule):
        raise TypeError(
            f"schedule must be a SyncSchedule such as ConstantH(16), got {type(schedule).__name__}"
        )
    rounds = schedule.rounds(lr_fn, total_steps, warmup_steps=warmup_steps)
    lrs = [float(lr_fn(step)) for step in range(rounds[-1].start + rounds[-1].length)]
    for step, lr in enumerate(lrs):
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr_fn({step}) is {lr}: expected a finite learning rate >= 0 at every step.")
    return rounds, lrs


def _checked(
    k: int, label_noise: float, start: tuple[float, float]
) -> tuple[int, float, tuple[float, float]]:
    k = _whole("k", k, 1)
    s2 = _number("label_noise", label_noise)
    if not 0 <= s2 < math.inf:
        raise ValueError(
            f"label_noise is the variance of a worker's label noise, a finite number >= 0; got {label_noise}."
        )
    point = tuple(_number("start", x) for x in start)
    if len(point) != 2 or not all(map(math.isfinite, point)):
        raise ValueError(f"start must be two finite numbers (u, v), got {start}.")
    return k, s2, point


def _time(rounds: list[Round], lrs: list[float]) -> tuple[Tensor, Tensor]:
    steps = torch.tensor([0] + [begin + length for begin, length in rounds])
    slow = torch.tensor([0.0] + lrs, dtype=torch.float64).square().cumsum(0)
    return steps, slow[steps]


def _warn_if_unstable(rounds: list[Round], lrs: list[float], sharpness: list[float]) -> None:
    for (begin, length), value in zip(rounds, sharpness, strict=False):
        lr = max(lrs[begin : begin + length])
        if not lr * value < 2:
            warnings.warn(
                f"eta * sharpness is {lr * value:.3g} in the round that starts at step {begin} (eta = {lr:.3g}): from 2 on "
                "gradient descent is unstable and the theory void. Lower the learning rate.",
                RuntimeWarning,
                stacklevel=3,
            )
            return
