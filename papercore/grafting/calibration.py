"""Are the probabilities right? Expected calibration error, reliability, and the controls that belong beside it.

The paper's claim is that a graft is better calibrated than the fine-tuned model it comes from (section 4; bins as in
Guo et al., 2017). A smaller error at a smaller accuracy proves little, so temperature scaling is here as a control.

Glossary
    conf     largest probability of a row                                        [n], in [0, 1]
    acc      1 where the label with the largest probability is the true one      [n]
    bins     M intervals ((m - 1) / M, m / M], left open and right closed; or M groups of equal size by conf
    ece      sum_m |B_m| / n * |mean acc(B_m) - mean conf(B_m)|                   a share, not a percentage
    T        temperature: softmax(logits / T)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from papercore.grafting.arguments import check_choice, check_generator, check_integer, check_number


@dataclass(frozen=True)
class Reliability:
    """One row per bin. lower, upper: its edges; count; accuracy and confidence: means in the bin (NaN if empty)."""

    lower: Tensor
    upper: Tensor
    count: Tensor
    accuracy: Tensor
    confidence: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error over the bins."""
        gaps = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return float((self.count * gaps).sum() / self.count.sum())

    @property
    def mce(self) -> float:
        """The largest gap of a bin that is not empty."""
        return float((self.accuracy - self.confidence).abs().nan_to_num(0.0).max())


def expected_calibration_error(
    probs: Any, labels: Any, *, bins: int = 15, strategy: str = "uniform"
) -> float:
    """Expected calibration error of the most probable label, a share in [0, 1].

    probs: [n, C] probabilities whose rows sum to 1, or [n] probabilities of label 1. labels: integers [n]. bins: M.
    strategy: "uniform", M intervals of equal width; "quantile", M groups of equal size. The error of a perfect
    model is above 0 for finite n, about sqrt(M / n): see `calibration_interval`.

    Raises ValueError for rows that do not sum to 1 within 1e-3 (logits, for instance), labels out of range, other shapes.

    >>> import torch
    >>> probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    >>> round(expected_calibration_error(probs, torch.tensor([0, 1, 1])), 4)
    0.4
    """
    return reliability(probs, labels, bins=bins, strategy=strategy).ece


def reliability(probs: Any, labels: Any, *, bins: int = 15, strategy: str = "uniform") -> Reliability:
    """Counts, accuracy and confidence per bin: what a reliability diagram draws. Arguments as for the error itself."""
    check_integer("bins", bins)
    check_choice("strategy", strategy, ("uniform", "quantile"))
    conf, right = _confidence(probs, labels)
    return _binned(conf, right, bins, strategy)


def _binned(conf: Tensor, right: Tensor, bins: int, strategy: str) -> Reliability:
    if strategy == "uniform":
        # Edges in the dtype of the probabilities: 0.2 is on the edge in each dtype.
        edges = (torch.arange(bins + 1, dtype=torch.float64) / bins).to(conf.dtype)
        slot = torch.bucketize(conf, edges[1:-1].contiguous(), right=False)
        lower, upper = edges[:-1].double(), edges[1:].double()
    else:
        order = conf.argsort(stable=True)
        # Equal confidences stay together: a bin's members must not depend on the order of the samples.
        rank = torch.searchsorted(conf[order].contiguous(), conf.contiguous(), right=False)
        slot = (rank * bins).div(len(conf), rounding_mode="floor")
        lower = upper = torch.zeros(bins, dtype=torch.float64)
    count = torch.bincount(slot, minlength=bins).double()
    accuracy = torch.zeros(bins, dtype=torch.float64).index_add_(0, slot, right.double()) / count
    confidence = torch.zeros(bins, dtype=torch.float64).index_add_(0, slot, conf.double()) / count
    if strategy == "quantile":
        low = torch.full((bins,), torch.inf, dtype=torch.float64).scatter_reduce_(
            0, slot, conf.double(), "amin"
        )
        high = torch.full((bins,), -torch.inf, dtype=torch.float64).scatter_reduce_(
            0, slot, conf.double(), "amax"
        )
        filled = count > 0
        lower, upper = low.where(filled, torch.nan), high.where(filled, torch.nan)
    return Reliability(lower, upper, count, accuracy, confidence)


def calibration_interval(
    probs: Any,
    labels: Any,
    *,
    bins: int = 15,
    strategy: str = "uniform",
    level: float = 0.95,
    resamples: int = 1000,
    generator: torch.Generator | int | None = None,
) -> tuple[float, float]:
    """Bootstrap interval of the calibration error: percentiles over resampled examples.

    level: coverage in (0, 1). generator: for the resampling (None: seed 0). The error is biased upwards for small n, and
    the bootstrap adds to that: compare two models on the same examples rather than with 0.
    """
    check_integer("bins", bins)
    check_integer("resamples", resamples)
    check_choice("strategy", strategy, ("uniform", "quantile"))
    if not 0 < check_number("level", level) < 1:
        raise ValueError(f"level={level:g} must be between 0 and 1")
    generator = check_generator(generator)
    conf, right = _confidence(probs, labels)
    n = len(conf)
    values = []
    for _ in range(resamples):
        pick = torch.randint(n, (n,), generator=generator, device=generator.device).cpu()
        values.append(_binned(conf[pick], right[pick], bins, strategy).ece)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(values, dtype=torch.float64), ends).tolist()
    return low, high


def fit_temperature(logits: Any, labels: Any) -> float:
    """The temperature T that minimises the log loss of softmax(logits / T): one number, fitted on held-out examples.

    logits: [n, C]. labels: integers [n]. Accuracy does not change. The log loss is convex in 1 / T: Newton's method with
    bisection as a guard, in float64, within [1e-3, 1e3].

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    >>> t = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))
    >>> round(float(torch.softmax(logits[0] / t, 0)[0]), 4)      # as confident as it is right
    0.75
    """
    scores = torch.as_tensor(logits).detach().cpu().double()
    if scores.dim() != 2 or not len(scores):
        raise ValueError(f"logits must have shape [n, C] with n >= 1, got {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("logits have NaN or infinite entries")
    truth = _labels(labels, len(scores), scores.shape[1])
    aim = scores.gather(1, truth[:, None]).mean()
    low, high = 1e-3, 1e3  # of 1 / T

    def slope(inverse: float) -> tuple[float, float]:
        """First and second derivative of the log loss with respect to 1 / T."""
        p = torch.softmax(scores * inverse, dim=1)
        mean = (p * scores).sum(1)
        return float(mean.mean() - aim), float(((p * scores**2).sum(1) - mean**2).mean())

    inverse = 1.0
    for _ in range(200):
        first, second = slope(inverse)
        low, high = (low, inverse) if first > 0 else (inverse, high)
        step = inverse - first / second if second > 0 else inverse
        updated = step if low < step < high else (low * high) ** 0.5
        if abs(updated - inverse) < 1e-12 * inverse:
            break
        inverse = updated
    return 1 / inverse


def _confidence(probs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Largest probability of each row and whether it is the label's, on the CPU."""
    p = torch.as_tensor(probs).detach().cpu()
    if not p.is_floating_point():
        raise TypeError(f"probs must be floating-point probabilities, got dtype {p.dtype}")
    if p.dtype in (torch.float16, torch.bfloat16):
        p = p.float()
    if p.dim() == 1:
        p = torch.stack([1 - p, p], dim=1)
    if p.dim() != 2 or not len(p) or p.shape[1] < 2:
        raise ValueError(f"probs must have shape [n, C] with n >= 1 and C >= 2, or [n], got {tuple(p.shape)}")
    if not bool(torch.isfinite(p).all()):
        raise ValueError("probs have NaN or infinite entries")
    sums = p.sum(1)
    worst = int((sums - 1).abs().argmax())
    if float((sums[worst] - 1).abs()) > 1e-3 or float(p.min()) < -1e-6:
        raise ValueError(
            f"probs must be probabilities whose rows sum to 1; row {worst} sums to {float(sums[worst]):.4g}, the smallest entry is "
            f"{float(p.min()):.4g}: apply softmax to logits first"
        )
    truth = _labels(labels, len(p), p.shape[1])
    conf, guess = p.max(dim=1)
    return conf.clamp(max=1.0), guess == truth


def _labels(labels: Any, n: int, classes: int) -> Tensor:
    truth = torch.as_tensor(labels).detach().cpu()
    if truth.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), one per row, got {tuple(truth.shape)}")
    if truth.is_floating_point() and not bool((truth == truth.round()).all()):
        raise ValueError(f"labels must be integers, got dtype {truth.dtype} with fractions")
    truth = truth.long()
    if int(truth.min()) < 0 or int(truth.max()) >= classes:
        raise ValueError(
            f"labels must be in 0 .. {classes - 1}, got {int(truth.min())} .. {int(truth.max())}"
        )
    return truth
