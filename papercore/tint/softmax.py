"""Softmax heads that act as linear attention, to any accuracy (Panigrahi et al., 2024, section 2.2, the theorem on softmax attention).

Scale the scores s_j = <query, key_j> down by epsilon and give one more key, a dummy with value 0, a logit of log M, so that it takes
nearly all the weight. The K other weights are then nearly linear in the scores:

    w_j(epsilon) = exp(epsilon s_j) / (M + sum over i of exp(epsilon s_i))
    forward   (M + K) / epsilon        * sum over j of (w_j(epsilon) - w_j(0)) v_j            = sum of s_j v_j + O(epsilon) + O(1 / M)
    central   (M + K) / (2 epsilon)    * sum over j of (w_j(epsilon) - w_j(-epsilon)) v_j     = sum of s_j v_j + O(epsilon^2) + O(1 / M)

Two softmax heads and one subtraction in place of one linear head. A dummy of the same weight as the others does not do: the sum of the
scores in the denominator leaves an error that no epsilon removes, hence the heavy one. "central" is ours. M may be as large as one
likes, epsilon may not be as small in float32: the weights are 1 / M times 1 + epsilon s, rounded to about 1e-6, and 1e-6 / epsilon
overtakes the error near epsilon = 1e-3 (forward) or 1e-2 (central).

Glossary
    epsilon   scale of the scores
    mass      M, the weight of the dummy key
    K         number of other keys that may be attended to
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from papercore.tint.finite_difference import chosen

__all__ = ["SoftmaxAttention"]


class SoftmaxAttention:
    """An `attention` for the literal backend, as `linear_attention`, made of two softmax heads with a heavy dummy key.

    Args:
        epsilon: scale of the scores, positive.
        mass: M, at least 1.
        difference: "forward" (the paper) or "central".

    Calling it with (query [..., N_q, d], key [..., N_k, d], value [..., N_k, d_v], allowed=None) returns (output [..., N_q, d_v],
    scores [..., N_q, N_k]): the weights' difference, scaled up, which stands for the linear scores.

    >>> query, key, value = torch.tensor([[2.0]]), torch.tensor([[1.0], [3.0]]), torch.tensor([[10.0], [1.0]])
    >>> exact = 26.0
    >>> for epsilon in (1e-1, 1e-2, 1e-3):
    ...     output, _ = SoftmaxAttention(epsilon, 1e8)(query.double(), key.double(), value.double())
    ...     print(f"{abs(float(output) - exact):.4f}")
    4.3615
    0.3850
    0.0380
    """

    def __init__(self, epsilon: float = 1e-3, mass: float = 1e8, difference: str = "forward") -> None:
        if not (math.isfinite(epsilon) and epsilon > 0):
            raise ValueError(f"epsilon = {epsilon}: expected a positive finite number.")
        if not (math.isfinite(mass) and mass >= 1):
            raise ValueError(f"mass = {mass}: expected at least 1, the weight of one ordinary key.")
        self.epsilon, self.mass = epsilon, mass
        self.difference = chosen("difference", difference, ("forward", "central"))

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scores = query @ key.mT
        if allowed is None:
            allowed = torch.ones((), dtype=torch.bool, device=scores.device)
        upper = self._weights(self.epsilon * scores, allowed)
        central = self.difference == "central"
        lower = self._weights((-self.epsilon if central else 0.0) * scores, allowed)
        # K counts the keys that take part: the weight of each at epsilon = 0 is 1 / (M + K).
        keys = allowed.expand_as(scores).sum(-1, keepdim=True)
        linear = (self.mass + keys) * (upper - lower) / ((1 + central) * self.epsilon)
        return linear @ value, linear

    def _weights(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """softmax with the dummy as one more key, whose weight is dropped: its value is 0."""
        logits = logits.masked_fill(~allowed, -math.inf)
        dummy = logits.new_full((*logits.shape[:-1], 1), math.log(self.mass))
        return torch.cat([logits, dummy], -1).softmax(-1)[..., :-1]
