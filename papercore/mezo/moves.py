"""The additions that a step makes to the weights. Training and replay both go through here: their bits agree.

A step with n draws visits theta + eps z_j and theta - eps z_j for each draw, then returns and updates
(algorithms 1 and 2 of the paper). From the minus side, theta_- = theta - eps z, the return and the update are
one pass:

    theta' = c theta_- + (c eps - lr pg / n) z - the other draws' lr pg / n z,    c = 1 - lr weight_decay

and a return that is followed by another perturbation takes that one along. Passes over theta: 2 n + 1 a step,
2 n when pipelined, where the update waits for the next step's first perturbation. Algorithm 1 as printed
makes 4 n.

mode "exact": a copy of the weights stays at the centre and theta +- eps z is written from it, so nothing
accumulates and only the update rounds. Extra memory: as much again as the trained weights.

Glossary
    way back   (scale, terms) of what brings theta from where it stands to the centre, and through a waiting
               update
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from papercore.mezo.history import (
    ScalarSecondMoment,
    adam_direction,
    adam_is_one_pass,
    momentum_terms,
    scalar_adam_terms,
)
from papercore.mezo.log import ZOLog
from papercore.mezo.noise import add_noise_
from papercore.mezo.seeds import draw_seed
from papercore.mezo.settings import GroupSettings, Settings
from papercore.mezo.weights import Bucket, Terms, Weights


def decay_factor(bucket: Bucket, group: GroupSettings) -> float:
    """c = 1 - lr weight_decay, 1 for tensors that are exempt."""
    return 1.0 - group.lr * group.weight_decay if bucket.decays else 1.0


def merged(terms: Terms) -> Terms:
    """Coefficients of the same seed added up, in order of first appearance: one stream of noise each."""
    total: dict[int, float] = {}
    for seed, coefficient in terms:
        total[seed] = total.get(seed, 0.0) + coefficient
    return list(total.items())


class Moves:
    """Where the weights stand between two additions, and the additions themselves."""

    def __init__(self, weights: Weights, log: ZOLog, backend: str) -> None:
        self.weights, self.log, self.backend = weights, log, backend
        self.exact = log.rule.mode == "exact"
        self._second = ScalarSecondMoment(log)
        self._centre: list[Tensor] | None = None  # exact mode: the copy that stays at the centre
        self._offset: tuple[int, float, Settings] | None = None  # theta stands at centre + sign eps z(seed)
        self._update: tuple[int, dict[int, Terms]] | None = (
            None  # step and terms per group of the waiting update
        )

    @property
    def away(self) -> bool:
        """True while the weights are perturbed."""
        return self._offset is not None

    def _add(
        self, terms_of: Callable[[Bucket], tuple[float, Terms]], source: list[Tensor] | None = None
    ) -> None:
        self.weights.add(terms_of, dist=self.log.rule.dist, backend=self.backend, source=source)

    def visit(self, step: int, draw: int, sign: float, settings: Settings) -> None:
        """Puts theta at centre + sign eps z of a draw; its plus side comes before its minus side."""
        seed = draw_seed(self.log.rule.seed, step, draw)
        if self.exact:
            if self._centre is None:
                self._centre = self.weights.like()
            if not self.away:
                for copy, tensor in zip(self._centre, self.weights.tensors, strict=True):
                    copy.copy_(tensor)
            self._add(lambda b: (1.0, [(seed, sign * settings.groups[b.group].eps)]), source=self._centre)
        else:

            def terms_of(bucket: Bucket) -> tuple[float, Terms]:
                scale, terms = self._way_back(bucket)
                return scale, merged([*terms, (seed, sign * settings.groups[bucket.group].eps)])

            self._add(terms_of)
        self._offset, self._update = (seed, sign, settings), None

    def _way_back(self, bucket: Bucket) -> tuple[float, Terms]:
        terms: Terms = []
        scale = 1.0
        if self._update is not None:
            step, updates = self._update
            scale = decay_factor(bucket, self.log.settings(step).groups[bucket.group])
            terms = updates[bucket.group]
        if self._offset is not None:
            seed, sign, settings = self._offset
            terms = [(seed, -sign * scale * settings.groups[bucket.group].eps), *terms]
        return scale, merged(terms)

    def back(self) -> None:
        """Puts theta at the centre; a waiting update is made on the way. Does nothing there."""
        if self.exact:
            if self.away:
                assert self._centre is not None
                self.weights.copy_from(self._centre)
        elif self._offset is not None or self._update is not None:
            self._add(self._way_back)
        self._offset = self._update = None

    def finish(self, step: int) -> None:
        """The update of a step that is in the log. Pipelined, it waits for `back` or the next `visit`."""
        rule, groups = self.log.rule, range(len(self.log.settings(step).groups))
        if self.log.is_skipped(step):
            self.back()
            return
        if rule.betas is None:
            updates = {g: momentum_terms(self.log, step, g) for g in groups}
        elif adam_is_one_pass(self.log, step):
            updates = {g: scalar_adam_terms(self.log, step, g, self._second) for g in groups}
        else:
            self._finish_by_chunks(step)
            return
        self._update = (step, updates)
        if self.exact:
            self._finish_exactly()
        elif not rule.pipelined:
            self.back()

    def _finish_exactly(self) -> None:
        # The way back starts at the centre: the perturbed values are overwritten, not undone.
        source = self._centre if self.away else None
        self._offset = None
        self._add(self._way_back, source=source)
        self._update = None

    def _finish_by_chunks(self, step: int) -> None:
        """Adam's update, whose denominator needs all of a chunk's history first. It rounds once."""
        source = self._centre if self.exact and self.away else None
        if self.exact:
            self._offset = None
        settings = self.log.settings(step)
        for bucket, rows in zip(self.weights.buckets, self.weights.members, strict=True):
            _, terms = self._way_back(bucket)
            scale = decay_factor(bucket, settings.groups[bucket.group])
            terms = [(seed, scale * coefficient) for seed, coefficient in terms]
            reads = None if source is None else [source[i] for i in rows]
            dtype = torch.float64 if bucket.tensors[0].dtype == torch.float64 else torch.float32
            for parts, targets, start in self.weights.chunks(bucket, reads):
                new = torch.cat([part.reshape(-1).to(dtype) for part in parts])
                direction = adam_direction(self.log, step, bucket.group, new, start, self.backend)
                add_noise_([new], [start], terms, scale=scale, dist=self.log.rule.dist, backend=self.backend)
                for target, value in zip(
                    targets, new.add_(direction).split([t.numel() for t in targets]), strict=True
                ):
                    target.copy_(value.view(target.shape))
        self._offset = None
