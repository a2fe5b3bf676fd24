"""When workers synchronise: schedules of local steps as plain objects, without torch.

In a local gradient method every worker makes H steps on its own and then all workers average their parameters. A schedule
says how long the next round is. The Quadratic Synchronization Rule (Gu et al., 2024, arXiv 2310.14423, section 2) lets H grow
as the learning rate falls:

    H = max(h_base, floor((alpha / eta)^2))          eta: the learning rate of the FIRST step of the round

Glossary
    step          t         steps that every worker has made before the round, from 0
    lr            eta_t     learning rate of step t
    length        H         local steps of a round, at least 1
    total_steps   T         steps of the whole run, for every worker
    warmup_steps  W         steps of learning-rate warm-up
    alpha         alpha     growth coefficient, in units of the learning rate
    h_base        H_base    the shortest round of the rule
    power         gamma     2 is QSR; 1 and 3 are the rules that the paper compares with

What people get wrong, and what is done here:

* During warm-up the formula is not used: eta is nearly 0 there, and one round would swallow the run. H is h_base while the
  round starts in the warm-up; such a round keeps its length even when it reaches beyond it (as in the official code).
* The last round is cut, so that the last step is always followed by an average.
* A quotient that is a whole number up to rounding counts as that number: (0.3 / 0.1)^2 is 8.999999999999998 in floating
  point and 9 here. The official code takes 8.
* A learning rate of exactly 0 stands for "as long as possible" where the rule's formula would divide by it: the round takes the
  remaining steps. Schedules that do not look at the rate keep their H: a warm-up may begin at 0.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["QSR", "SWAP", "ConstantH", "PiecewiseH", "PostLocal", "Round", "SyncSchedule"]

LearningRate = Callable[[int], float]

# Relative slack of the floor: more than the rounding of a division and a power, far less than any distance that matters.
_SLACK = 1e-12
# A first round that takes more than this share of a run is most likely a learning rate that starts near 0 without warm-up.
_LONG_FIRST_ROUND = 0.1


class Round(NamedTuple):
    """One round: `length` local steps from step `start` on, then one average."""

    start: int
    length: int


class SyncSchedule(ABC):
    """How many local steps to make before the next average. Subclasses say it in `_length`."""

    def next_h(self, step: int, lr: float, *, total_steps: int | None = None, warmup_steps: int = 0) -> int:
        """Length of the round that starts at `step`, at least 1.

        Args:
            step: steps made so far, >= 0.
            lr: learning rate of this step (the first of the round), finite and >= 0.
            total_steps: steps of the run; the round is cut to end there. None: not cut.
            warmup_steps: steps of warm-up of the learning rate, >= 0.

        Raises:
            ValueError: an argument is out of its range, `step` is not before `total_steps`, or lr is 0 and there is no
                `total_steps` to end the round.
            TypeError: a step count is no number.

        >>> QSR(alpha=0.2, h_base=2).next_h(50_000, 0.05, total_steps=62_400)
        16
        """
        step = _whole("step", step, 0)
        warmup_steps = _whole("warmup_steps", warmup_steps, 0)
        lr = _number("lr", lr)
        if math.isnan(lr) or lr < 0 or math.isinf(lr):
            raise ValueError(
                f"lr is {lr} at step {step}: H is undefined; expected a finite learning rate >= 0 at the start of a round."
            )
        if total_steps is None:
            return max(1, self._length(step, lr, None, warmup_steps))
        left = _whole("total_steps", total_steps, 1) - step
        if left < 1:
            raise ValueError(
                f"step {step} is not before total_steps = {total_steps}: no round can start there."
            )
        return min(max(1, self._length(step, lr, left, warmup_steps)), left)

    def rounds(self, lr_fn: LearningRate, total_steps: int, *, warmup_steps: int = 0) -> list[Round]:
        """All rounds of a run, in order; their lengths add up to `total_steps`.

        Args:
            lr_fn: step -> learning rate.
            total_steps: steps of the run, >= 1.
            warmup_steps: steps of warm-up, from 0 to total_steps.

        Raises:
            ValueError: a number is out of range, or lr_fn returns NaN, infinity or a negative rate where a round starts.
            TypeError: a step count is no number, or lr_fn cannot be called.

        >>> ConstantH(4).rounds(lambda step: 0.1, 10)
        [Round(start=0, length=4), Round(start=4, length=4), Round(start=8, length=2)]
        """
        if not callable(lr_fn):
            raise TypeError(
                f"lr_fn must be a function of the step, got {lr_fn!r}: for example cosine_lr(0.1, 1000)."
            )
        total_steps = _whole("total_steps", total_steps, 1)
        warmup_steps = _whole("warmup_steps", warmup_steps, 0)
        if warmup_steps > total_steps:
            raise ValueError(f"warmup_steps = {warmup_steps} is more than total_steps = {total_steps}.")
        out, step = [], 0
        while step < total_steps:
            length = self.next_h(step, lr_fn(step), total_steps=total_steps, warmup_steps=warmup_steps)
            out.append(Round(step, length))
            step += length
        return out

    @abstractmethod
    def _length(self, step: int, lr: float, left: int | None, warmup_steps: int) -> int:
        """Length before cutting; `left` is the number of steps to the end, if that is known."""


@dataclass(frozen=True)
class ConstantH(SyncSchedule):
    """H local steps in every round. `ConstantH(1)` averages after every step.

    Raises ValueError for h < 1 or 2.5, and TypeError for what is no number.
    """

    h: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "h", _whole("h", self.h, 1))

    def _length(self, step: int, lr: float, left: int | None, warmup_steps: int) -> int:
        return self.h


@dataclass(frozen=True)
class QSR(SyncSchedule):
    """The Quadratic Synchronization Rule and its relatives: H = max(h_base, floor((alpha / eta)^power)).

    Args:
        alpha: growth coefficient, >= 0; 0 means H = h_base throughout.
        h_base: the shortest round, and every round that starts during warm-up; >= 1.
        power: 2 for QSR, 1 for H ~ 1/eta (alpha is then the paper's beta), 3 for the cubic rule (rho); > 0.

    Raises:
        ValueError: a number out of its range, or an h_base such as 2.5. TypeError: an argument is no number.

    >>> rule = QSR(alpha=0.0175, h_base=4)
    >>> [rule.next_h(20_000, lr) for lr in (0.008, 0.004, 0.001)]
    [4, 19, 306]
    """

    alpha: float
    h_base: int
    power: float = 2.0

    def __init__(self, alpha: float, h_base: int, *, power: float = 2.0) -> None:
        alpha, power = _number("alpha", alpha), _number("power", power)
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha = {alpha}: expected a finite number >= 0 (0 keeps H at h_base).")
        if not (math.isfinite(power) and power > 0):
            raise ValueError(f"power = {power}: expected a finite number > 0 (2 is QSR).")
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "h_base", _whole("h_base", h_base, 1))
        object.__setattr__(self, "power", power)

    def _length(self, step: int, lr: float, left: int | None, warmup_steps: int) -> int:
        if step < warmup_steps or self.alpha == 0:
            return self.h_base
        if lr == 0:
            return _remaining(left, "lr is 0")
        # Logarithms decide whether the power can be written down: (0.02 / 1e-300)^2 cannot.
        if self.power * (math.log(self.alpha) - math.log(lr)) > 40:
            return _remaining(left, f"lr is {lr}")
        return max(self.h_base, math.floor((self.alpha / lr) ** self.power * (1 + _SLACK)))

    def rounds(self, lr_fn: LearningRate, total_steps: int, *, warmup_steps: int = 0) -> list[Round]:
        """As `SyncSchedule.rounds`; warns when the rate starts so low that the first round takes a tenth of the run."""
        out = super().rounds(lr_fn, total_steps, warmup_steps=warmup_steps)
        total = out[-1].start + out[-1].length
        long = out[0].length > max(self.h_base, _LONG_FIRST_ROUND * total)
        if long and lr_fn(0) < 0.1 * max(lr_fn(total * part // 20) for part in range(20)):
            warnings.warn(
                f"the first round would last {out[0].length} of {total_steps} steps: the learning rate starts low. "
                "Give warmup_steps, during which H stays at h_base.",
                stacklevel=2,
            )
        return out


@dataclass(frozen=True)
class PostLocal(SyncSchedule):
    """Post-local SGD (Lin et al., 2020): average after every step until `switch_step`, then rounds of h steps.

    Args:
        switch_step: the first step of the local phase, >= 0.
        h: length of the rounds after it, >= 1, or a schedule for them.
    """

    switch_step: int
    h: int | SyncSchedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "switch_step", _whole("switch_step", self.switch_step, 0))
        if not isinstance(self.h, SyncSchedule):
            object.__setattr__(self, "h", _whole("h", self.h, 1))

    def _length(self, step: int, lr: float, left: int | None, warmup_steps: int) -> int:
        if step < self.switch_step:
            return 1
        if isinstance(self.h, SyncSchedule):
            return self.h._length(step, lr, left, warmup_steps)
        return self.h


@dataclass(frozen=True)
class SWAP(SyncSchedule):
    """Stochastic weight averaging in parallel (Gupta et al., 2020): average every step until `switch_step`, then once, at the end."""

    switch_step: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "switch_step", _whole("switch_step", self.switch_step, 0))

    def _length(self, step: int, lr: float, left: int | None, warmup_steps: int) -> int:
        return 1 if step < self.switch_step else _remaining(left, "the phase after the switch has one round")


@dataclass(frozen=True)
class PiecewiseH(SyncSchedule):
    """H by intervals: `PiecewiseH([(0, 4), (1000, 16)])` is 4 before step 1000 and 16 from there on.

    A round ends where the next interval begins, so that a switch comes at the step that was named.

    Raises:
        ValueError: no interval, the first does not start at 0, or starts do not increase. TypeError: no number.
    """

    pieces: tuple[tuple[int, int], ...]

    def __init__(self, pieces: Iterable[Sequence[int]]) -> None:
        given = [tuple(piece) for piece in pieces]
        if not given or any(len(piece) != 2 for piece in given):
            raise ValueError(f"pieces must be pairs (first step, h), at least one; got {given}.")
        checked = tuple((_whole("first step", s, 0), _whole("h", h, 1)) for s, h in given)
        starts = [start for start, _ in checked]
        if starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"pieces must start at step 0 and go up, got first steps {starts}.")
        object.__setattr__(self, "pieces", checked)

    def _length(self, step: int, lr: float, left: int | None, warmup_steps: int) -> int:
        index = max(i for i, (start, _) in enumerate(self.pieces) if start <= step)
        h = self.pieces[index][1]
        if index + 1 < len(self.pieces):
            h = min(h, self.pieces[index + 1][0] - step)
        return h


def _remaining(left: int | None, why: str) -> int:
    if left is None:
        raise ValueError(
            f"H is undefined without total_steps ({why}): give total_steps, or set a lowest learning rate."
        )
    return left


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return float(value)


def _whole(name: str, value: float, least: int) -> int:
    """`value` as an int; 8.0 counts as whole, 8.5 and True do not."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        if isinstance(value, bool) or not isinstance(value, float):
            raise TypeError(f"{name} must be a whole number, got {value!r}.")
        if not value.is_integer():
            raise ValueError(f"{name} = {value!r}: expected a whole number >= {least}.")
    whole = int(value)
    if whole < least:
        raise ValueError(f"{name} = {value!r}: expected a whole number >= {least}.")
    return whole
