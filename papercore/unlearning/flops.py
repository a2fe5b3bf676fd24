"""Floating-point operations of unlearning, with the backbone and without it.

Two operations a multiply-add; a backward pass counts twice the forward (gradients of inputs and of weights), or once where only
weights need them. Comparisons, softmax and optimiser steps are left out: they are small beside these, for every method alike.

    projection   2 D C d_k       (0 unless projection="random")
    search       2 C K d_k       one score a pair: a product with the key, whose norm is ready
    read         C d_v           additions

Papers often print multiply-adds and call them FLOPs: halve before comparing. Shah et al., Table 2, counts the backbone in every
pass; with cached features, which anybody would use for a linear head, only `forward` and `backward` remain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.unlearning.bottleneck import KeyValueBottleneck

__all__ = ["Flops", "bottleneck_flops", "measured_flops"]


@dataclass(frozen=True)
class Flops:
    """Operations of a method: on top of the features (forward, backward), and in the backbone (forward alone: it is frozen)."""

    forward: int = 0
    backward: int = 0
    backbone: int = 0

    @property
    def head(self) -> int:
        """Without the backbone: the features are cached."""
        return self.forward + self.backward

    @property
    def total(self) -> int:
        """With the backbone in every pass."""
        return self.head + self.backbone

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward, self.backward + other.backward, self.backbone + other.backbone
        )


def bottleneck_flops(
    model: KeyValueBottleneck, examples: int = 1, *, read: bool = True, tokens: int = 1
) -> int:
    """Operations of a forward pass of the bottleneck over `examples`; read=False: of `lookup` alone.

    >>> model = KeyValueBottleneck(512, 256, 4096, dim_key=14, dim_value=10)
    >>> bottleneck_flops(model, read=False)         # 29.36 M for the search, 3.67 M for the projections
    33030144
    """
    books, width = model.num_codebooks, model.dim_key
    projection = 2 * model.dim * books * width if model.projection is not None else 0
    search = 2 * books * model.num_pairs * width
    return examples * tokens * (projection + search + (books * model.dim_value if read else 0))


def measured_flops(model: Callable[[Tensor], object], inputs: Tensor) -> int:
    """Operations of one forward pass of `model` over `inputs`, counted by torch at its matrix products and convolutions.

    >>> measured_flops(torch.nn.Linear(8, 3), torch.zeros(5, 8))
    240
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(inputs)
    return int(counter.get_total_flops())
