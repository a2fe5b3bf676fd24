"""The paper's rule: gradient descent on the logits of a relaxed mask. Equations, glossary: see `learning.py`.

Only S is stored for each entry. gamma, the rounded mask and the base mask are made for one tensor at a time, and what came
on in a step is kept as indices, so that nothing else of size N is alive.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from papercore.grafting.law import rate_for
from papercore.grafting.live import LiveWeights
from papercore.grafting.mask import Mask
from papercore.grafting.scoring import Best, Scorer, Step


class RelaxedMask:
    """S around a base mask: gamma(S), its rounding, and one step of descent."""

    def __init__(
        self, weights: LiveWeights, base: Mask | None, bias: float, generator: torch.Generator
    ) -> None:
        self.weights, self.base, self.bias = weights, base, bias
        self.logits: dict[str, Tensor] = {}
        for name, change in weights.change.items():
            drawn = torch.rand(change.shape, generator=generator, device=generator.device)
            self.logits[name] = drawn.to(change.device, change.dtype)
        self.dropped: dict[str, Tensor] = {}  # flat positions that the cap keeps off

    def start(self, name: str) -> Tensor | None:
        """The base mask, bool [n]; None for an empty one."""
        if self.base is None:
            return None
        dense = self.base[name].to(self.logits[name].device)
        index = self.weights.index
        return dense if index is None else dense.reshape(-1)[index[name]]

    def gamma(self, name: str) -> Tensor:
        """gamma(S), equation (2)."""
        return soft(self.logits[name], self.start(name), self.bias)

    def on(self, name: str) -> Tensor:
        """round(gamma(S)) without what the cap keeps off, bool [n]."""
        rounded = _rounded(self.logits[name], self.start(name), self.bias)
        if name in self.dropped:
            rounded.view(-1)[self.dropped[name]] = False
        return rounded

    def descend(self, grads: dict[str, Tensor], rate: float, *, cap: int | None) -> tuple[int, int]:
        """One update of S, in place; returns how many entries changed and how many are on. Destroys the gradients.

        With a cap, entries that came on in this update are dropped from the mask, those with the lowest logits first.
        """
        flips = count = 0
        fresh: dict[str, Tensor] = {}
        for name, s in self.logits.items():
            base = self.start(name)
            before = _rounded(s, base, self.bias)
            gate = torch.sigmoid(s - self.bias)
            push = grads[name].mul_(self.weights.change[name]).mul_(gate).mul_(gate.neg_().add_(1))
            if base is not None:
                push = torch.where(base, -push, push)
            s.sub_(push, alpha=rate)
            now = _rounded(s, base, self.bias)
            flips += int((now ^ before).sum())
            count += int(now.sum())
            if cap is not None:
                fresh[name] = (now & ~before).reshape(-1).nonzero().squeeze(1)
        if cap is not None and count > cap:
            self._drop(fresh, count - cap)
        return flips, count

    def _drop(self, fresh: dict[str, Tensor], surplus: int) -> None:
        device = next(iter(self.logits.values())).device
        values = torch.cat([self.logits[n].view(-1)[i].to(device) for n, i in fresh.items()])
        off = torch.zeros(len(values), dtype=torch.bool, device=device)
        off[values.argsort(stable=True)[:surplus]] = True
        parts = off.split([len(i) for i in fresh.values()])
        self.dropped = {n: i[part.to(i.device)] for (n, i), part in zip(fresh.items(), parts, strict=True)}


def soft(logits: Tensor, base: Tensor | None, bias: float) -> Tensor:
    """gamma(S), equation (2): the soft exclusive-or of the base mask (bool, None for empty) with sigmoid(S - b)."""
    gate = torch.sigmoid(logits - bias)
    return gate if base is None else torch.where(base, 1 - gate, gate)


def _rounded(logits: Tensor, base: Tensor | None, bias: float) -> Tensor:
    """round(gamma(S)): the base mask flipped where S > b."""
    return logits > bias if base is None else (logits > bias) ^ base


def auto_rate(mask: RelaxedMask, scorer: Scorer, cap: int, steps: int) -> float:
    """The rate at which law (3) fills the mask up to `cap`, from one gradient at theta_pre."""
    _, grads = scorer.gradient("theta_pre (for lr='auto')")
    for name in grads:  # c, in place of the gradient
        grads[name].mul_(mask.weights.change[name]).neg_()
        if (base := mask.start(name)) is not None:
            grads[name].masked_fill_(base, 0.0)
    room = cap - (0 if mask.base is None else mask.base.count)
    return rate_for(grads, mask.logits, max(1, room), steps, mask.bias)


def learn_by_descent(
    mask: RelaxedMask,
    scorer: Scorer,
    cap: int | None,
    steps: int,
    rate: float,
    callback: Callable[[Step], object] | None,
) -> tuple[Best, list[Step]]:
    """Descent on S; after each update the rounded mask is scored if it has changed, and the best one kept."""
    best, history = Best(), []
    for step in range(steps):
        scorer.weights.mix(mask.gamma)
        loss, grads = scorer.gradient(f"step {step}")
        flips, count = mask.descend(grads, rate, cap=cap)
        del grads  # the next backward pass must not find them alive
        full = cap is not None and count > cap
        record = Step(step, loss, count if cap is None else min(count, cap), flips)
        if flips or step == 0:
            scorer.rate(record, mask.on)
            best.offer(record, mask.on, list(mask.logits))
        history.append(record)
        if (callback is not None and callback(record) is False) or full:
            break
    total = sum(s.numel() for s in mask.logits.values())
    if not any(record.flips for record in history):
        warnings.warn(
            f"no entry changed in {len(history)} steps at lr={rate:g}: the mask is the base mask; raise lr or steps, or give a "
            "sparsity and lr='auto'",
            stacklevel=3,
        )
    elif cap is None and history[-1].count > 0.5 * total > 500:
        warnings.warn(
            f"the mask grew to {history[-1].count:,} entries, more than half of them, at lr={rate:g}: lower lr, or give a sparsity",
            stacklevel=3,
        )
    return best, history
