"""Self-attention of the auxiliary by attention heads of the simulator (Panigrahi et al., 2024, section 2.5 and its appendix).

An ordinary token holds q, k and v in its three memories and, on the way back, do as its signal. Heads of the simulator, one for each
head of the auxiliary, copy from there. Prefix tokens take no part: their columns get the weight 0, and what they would receive is dropped.

    forward   head h   softmax(<q, k> scale) of the ordinary tokens                    value  v      -> o
    backward  head h   the same weights, the other way about: t asks, all j >= t answer  value  do_j   -> dv_t

Those two are the paper's. The gradients of q and k need products of three activations, A (<do, v> - delta), which no plain head has.
We write them as "product heads", whose score is the weight of one head times the score of another; delta is their mean:

    query     head h   A[t, j] (<do_t, v_j> - delta_t) scale                            value  k_j    -> dq_t
    key       head h   the same, the other way about                                    value  q_j    -> dk_t

Glossary: as attention.py and literal.py; heads H, groups G, d numbers a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from papercore.tint.layout import Layout
from papercore.tint.literal import ORDINARY, Reading, Trace

__all__ = ["AttentionHeads"]


class AttentionHeads:
    """The heads over one sequence.

    Args:
        layout: with stack >= 3, for three memories.
        q [B, T, H d], k, v [B, T, G d]: as the heads compare them (rotary positions applied).
        allowed: bool, broadcasts to [B, 1, T, T].
        scale: on the scores.
        heads, groups: H, G.
        signal: do [B, T, H d], on the way back.
        restrict: False: prefix tokens stand in the sequence too, and are masked.
    """

    def __init__(
        self,
        layout: Layout,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        allowed: Tensor,
        scale: float,
        heads: int,
        groups: int,
        *,
        signal: Tensor | None = None,
        restrict: bool = True,
    ) -> None:
        self.layout, self.scale, self.width = layout, scale, q.shape[-1]
        tokens = layout.tokens(torch.zeros_like(q) if signal is None else signal, q, k, v)
        self.before = 0 if restrict else layout.n_prefix
        # Empty prefix tokens before the ordinary ones: what a prefix holds is of no account where it takes no part.
        self.state = F.pad(tokens, (0, 0, self.before, 0))
        batch, count = q.shape[:2]
        self.allowed = F.pad(allowed.expand(batch, 1, count, count), (self.before, 0, self.before, 0))
        d = q.shape[-1] // heads
        own = torch.arange(heads * d).view(heads, d)
        # Heads of one group read, and write, the same numbers.
        shared = torch.arange(groups * d).view(groups, d).repeat_interleave(heads // groups, 0)
        slots = [layout.memory(i, 3).start for i in range(3)]
        self.query, self.signal = Reading(own + slots[0]), Reading(own)
        self.key, self.value = Reading(shared + slots[1]), Reading(shared + slots[2])
        self.own, self.shared = own, shared

    def weights(self) -> Tensor:
        """A, [B, H, N, N]; a row without an allowed key is zero."""
        scores = (self.query(self.state) * self.scale) @ self.key(self.state).mT
        scores = scores.masked_fill(~self.allowed, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).masked_fill(~self.allowed, 0.0)

    def product(self) -> Tensor:
        """A (<do, v> - delta) scale, [B, H, N, N]."""
        weights = self.weights()
        other = self.signal(self.state) @ self.value(self.state).mT
        return weights * (other - (weights * other).sum(-1, keepdim=True)) * self.scale

    def forward(self) -> tuple[Tensor, Trace]:
        """o [B, T, H d]."""
        return self._attend("attention forward", self.weights(), self.query, self.key, self.value, self.own)

    def backward_value(self) -> tuple[Tensor, Trace]:
        """dv [B, T, G d]."""
        weights = self.weights().mT
        return self._attend("attention backward", weights, self.key, self.query, self.signal, self.shared)

    def backward_query(self) -> tuple[Tensor, Trace]:
        """dq [B, T, H d], by product heads."""
        return self._attend("query backward", self.product(), self.signal, self.value, self.key, self.own)

    def backward_key(self) -> tuple[Tensor, Trace]:
        """dk [B, T, G d], by product heads."""
        product = self.product().mT
        return self._attend("key backward", product, self.value, self.signal, self.query, self.shared)

    def _attend(
        self, name: str, scores: Tensor, query: Reading, key: Reading, value: Reading, write: Tensor
    ) -> tuple[Tensor, Trace]:
        values = value(self.state)
        written = torch.zeros_like(self.state)
        where = write.to(self.state.device).flatten()
        written.index_add_(-1, where, (scores @ values).transpose(1, 2).flatten(2))
        who = "all" if self.before else ORDINARY
        trace = Trace(name, query(self.state), key(self.state), values, scores, written, who, who)
        return written[:, self.before :, : int(write.max()) + 1], trace
