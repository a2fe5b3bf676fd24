"""What a schedule costs on the network: rounds, bytes and hours, from one object and without running anything.

Data parallel training reduces one gradient of P numbers a step; a local method reduces one parameter vector of P numbers a
round. So the share of communication is rounds / steps, whatever the network and the reduction's algorithm (QSR's "communication
volume", tables 1 and 2). Bytes need the algorithm, hours need two measured times.

Glossary
    rounds        R         averages in the run
    steps         T         local steps of every worker
    fraction      R / T     share of data parallel
    k             K         workers
    t_step        t_comp    seconds of one local step without communication
    t_sync                  seconds of one average
    hours         (T t_comp + R t_sync) / 3600

A blocking all-reduce cannot be timed on one rank, since waiting for slower ranks is mixed in. The cost model is therefore fitted
on the total times of whole runs (paper's appendix on wall-clock time): with H = 1 a run takes T t_comp + T t_sync, with
constant H it takes T t_comp + (T / H) t_sync.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from papercore.local_sgd.schedules import Round, SyncSchedule, _number, _whole

__all__ = ["CommReport", "CostModel", "communication_volume"]

_ALGORITHMS = ("ring", "payload")


@dataclass(frozen=True)
class CommReport:
    """Communication of one run. Made by `communication_volume`.

    Attributes:
        schedule: the rounds themselves, in order.
        steps: T, local steps of every worker.
    """

    schedule: tuple[Round, ...]
    steps: int

    @property
    def rounds(self) -> int:
        """Averages in the run (R)."""
        return len(self.schedule)

    @property
    def fraction(self) -> float:
        """Share of what data parallel training communicates: R / T, in (0, 1]."""
        return self.rounds / self.steps

    @property
    def longest(self) -> int:
        """Steps of the longest round."""
        return max(length for _, length in self.schedule)

    @property
    def last(self) -> int:
        """Steps of the last round, which may have been cut."""
        return self.schedule[-1].length

    def bytes_per_rank(self, num_params: int, *, k: int, itemsize: int = 4, algorithm: str = "ring") -> int:
        """Bytes that one rank sends in the whole run.

        Args:
            num_params: numbers that are averaged (P).
            k: workers.
            itemsize: bytes of a number.
            algorithm: "ring": 2 (K - 1) / K of the vector a round, the least that an all-reduce can do;
                "payload": the vector once a round, which is what `LocalOptimizer.bytes_sent` counts.

        Raises:
            ValueError: a count below 1, or an unknown algorithm.
        """
        if algorithm not in _ALGORITHMS:
            raise ValueError(f"algorithm {algorithm!r}: expected one of {', '.join(_ALGORITHMS)}.")
        num_params, itemsize = _whole("num_params", num_params, 1), _whole("itemsize", itemsize, 1)
        k = _whole("k", k, 1)
        payload = self.rounds * num_params * itemsize
        return payload if algorithm == "payload" else 2 * (k - 1) * payload // k

    def hours(self, t_step: float, t_sync: float) -> float:
        """Hours of the run, from seconds of a local step and seconds of an average.

        Raises ValueError for a negative or infinite time.
        """
        t_step, t_sync = _seconds("t_step", t_step), _seconds("t_sync", t_sync)
        return (self.steps * t_step + self.rounds * t_sync) / 3600


def communication_volume(
    schedule: SyncSchedule, lr_fn: Callable[[int], float], total_steps: int, *, warmup_steps: int = 0
) -> CommReport:
    """Count what `schedule` communicates under the learning rate `lr_fn`.

    Args:
        schedule: when to average.
        lr_fn: step -> learning rate; the rate of the first step of a round decides its length.
        total_steps: T.
        warmup_steps: steps of warm-up; a step is never counted by the rule's formula there.

    Raises:
        ValueError, TypeError: as `SyncSchedule.rounds`.

    >>> from papercore.local_sgd import QSR, cosine_lr
    >>> lr = cosine_lr(0.008, 93_600, warmup_steps=10_000)      # ViT-B of the paper
    >>> report = communication_volume(QSR(0.0175, 4), lr, 93_600, warmup_steps=10_000)
    >>> report.rounds, f"{report.fraction:.1%}"
    (9711, '10.4%')
    """
    if not isinstance(schedule, SyncSchedule):
        raise TypeError(
            f"schedule must be a SyncSchedule such as ConstantH(4) or QSR(0.2, 2), got {schedule!r}."
        )
    rounds = schedule.rounds(lr_fn, total_steps, warmup_steps=warmup_steps)
    return CommReport(tuple(rounds), int(total_steps))


@dataclass(frozen=True)
class CostModel:
    """Seconds of a local step and of an average; predicts the duration of any schedule.

    Attributes:
        t_step: seconds of a local step, >= 0.
        t_sync: seconds of an average, >= 0.
    """

    t_step: float
    t_sync: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "t_step", _seconds("t_step", self.t_step))
        object.__setattr__(self, "t_sync", _seconds("t_sync", self.t_sync))

    @classmethod
    def fit(cls, runs: Sequence[tuple[int, int, float]]) -> CostModel:
        """The model that fits whole runs best (least squares, exact for two).

        Args:
            runs: (steps, rounds, seconds) of at least two runs whose rounds per step differ, for example H = 1 and H = 4.

        Raises:
            ValueError: fewer than two runs, all with the same rounds per step, or times in which more averages took less time
                (t_sync or t_step would be negative): the runs were too short or too noisy to tell.

        >>> CostModel.fit([(100, 100, 30.0), (100, 25, 15.0)])
        CostModel(t_step=0.1, t_sync=0.2)
        """
        checked = [
            (_whole("steps", t, 1), _whole("rounds", r, 1), _seconds("seconds", s)) for t, r, s in runs
        ]
        if len(checked) < 2 or len({r / t for t, r, _ in checked}) < 2:
            raise ValueError(
                f"a cost model needs at least two runs with different rounds per step, got {checked}: for example H = 1 and H = 4."
            )
        tt = sum(t * t for t, _, _ in checked)
        tr = sum(t * r for t, r, _ in checked)
        rr = sum(r * r for _, r, _ in checked)
        ts = sum(t * s for t, _, s in checked)
        rs = sum(r * s for _, r, s in checked)
        determinant = tt * rr - tr * tr
        t_step, t_sync = (ts * rr - rs * tr) / determinant, (rs * tt - ts * tr) / determinant
        if t_step < 0 or t_sync < 0:
            raise ValueError(
                f"these runs give {t_step:.3g} s a step and {t_sync:.3g} s an average, one of them negative: time longer runs, "
                "or on a quieter machine."
            )
        return cls(round(t_step, 12), round(t_sync, 12))

    def seconds(self, report: CommReport) -> float:
        """Predicted seconds of a run."""
        return report.steps * self.t_step + report.rounds * self.t_sync

    def share(self, report: CommReport) -> float:
        """Share of a run's time that goes into averages."""
        total = self.seconds(report)
        return report.rounds * self.t_sync / total if total else math.nan


def _seconds(name: str, value: float) -> float:
    value = _number(name, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} = {value}: expected a finite number of seconds >= 0.")
    return value
