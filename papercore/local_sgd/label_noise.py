"""Fresh label noise: every time a label is used, it is wrong with probability p.

Local SGD paper, arXiv 2303.01215, label-noise experiments (p = 0.1). Noise of this kind keeps the noise of the gradient
alive where the training loss is smallest, with a covariance proportional to the Hessian, which is what makes SGD drift.

Glossary
    p              probability that a label is replaced, by one of the OTHER classes, all equally likely
    num_classes    C
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.local_sgd.schedules import _number, _whole

__all__ = ["LabelNoise"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class LabelNoise:
    """LabelNoise(p, num_classes)(targets, generator) -> noisy targets; call it anew at every step.

    Args:
        p: probability of a wrong label, from 0 to below (C - 1) / C, where labels would carry no information.
        num_classes: C, at least 2.

    Raises:
        ValueError: p or num_classes is out of range. TypeError: p is no number, or num_classes is not whole.

    >>> noise = LabelNoise(0.5, num_classes=10)
    >>> clean = torch.zeros(1000, dtype=torch.int64)
    >>> noisy = noise(clean, torch.Generator().manual_seed(0))
    >>> 450 < int((noisy != clean).sum()) < 550, sorted(set(noisy.tolist())) == list(range(10))
    (True, True)
    """

    p: float
    num_classes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", _whole("num_classes", self.num_classes, 2))
        object.__setattr__(self, "p", _number("p", self.p))
        highest = (self.num_classes - 1) / self.num_classes
        if not 0 <= self.p < highest:
            raise ValueError(
                f"p = {self.p}: expected 0 <= p < (C - 1) / C = {highest:.4g} for C = {self.num_classes} classes; from there "
                "on the right label is no more likely than the others."
            )

    def __call__(self, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Targets of which each is, independently, replaced with probability p.

        Args:
            targets: integer tensor of any shape, classes 0 .. C - 1; left as it is.
            generator: source of the draws; on the device of the targets or on the CPU (the draws are then the same for
                every device).

        Returns:
            A new tensor of the same shape, dtype and device.

        Raises:
            ValueError: a class is out of range. TypeError: targets are no integers, or generator is no torch.Generator.
        """
        if not isinstance(targets, Tensor) or targets.dtype not in _INTEGERS:
            kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
            raise TypeError(f"targets must be a tensor of integer classes, got {kind}")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if targets.numel() == 0:
            return targets.clone()
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"targets must lie in 0 .. {self.num_classes - 1} for num_classes = {self.num_classes}, "
                f"got values from {low} to {high}"
            )
        device = generator.device
        # float64: a float32 draw is a multiple of 2^-24 and would round p.
        wrong = torch.rand(targets.shape, generator=generator, device=device, dtype=torch.float64) < self.p
        shift = torch.randint(1, self.num_classes, targets.shape, generator=generator, device=device)
        shift = torch.where(wrong, shift, torch.zeros_like(shift)).to(targets.device)
        return ((targets.long() + shift) % self.num_classes).to(targets.dtype)
