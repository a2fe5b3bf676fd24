"""Keys without labels: vector quantisation by moving averages, with dead keys put back among the data.

For every batch, with n_j the heads nearest to key j and s_j their sum (Traeuble et al., 2023; the codebook index is left out)

    size_j <- g size_j + (1 - g) n_j            total_j <- g total_j + (1 - g) s_j
    key_j  <- total_j / size'_j,                size'_j = (size_j + eps) / (sum size + K eps) * sum size
    size_j < threshold * rows / K               : key j is dead and becomes a random head of the batch

size and total start at 0, so sum_j size_j is (1 - g^t) times the batch.

Different from the official code
    total starts at 0, not at the first keys: with size = 0 those count for nothing, and total / size would throw keys far away;
    the dead-key threshold grows with the mass (1 - g^t) seen so far, else almost all keys are dead after the first batch;
    a replaced key gets a fair share of size and total = size * key, so that it is not replaced again at once;
    a key that was never fetched stays where it is, and counting makes no one-hot tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from papercore.unlearning.search import nearest_keys, search_table

__all__ = ["MovingAverage"]


class MovingAverage:
    """The state of the quantiser: keys [C, K, d], size [C, K], total [C, K, d]."""

    def __init__(
        self,
        keys: Tensor,
        *,
        decay: float = 0.95,
        dead_threshold: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        self.keys = keys.clone()
        self.size = keys.new_zeros(keys.shape[:2])
        self.total = torch.zeros_like(keys)
        self.decay, self.dead_threshold, self.eps = decay, dead_threshold, eps

    def step(self, heads: Tensor, generator: torch.Generator) -> Tensor:
        """One batch of heads [B, C, d]; returns which keys were replaced, BoolTensor [C, K].

        >>> vq = MovingAverage(torch.tensor([[[0.0], [4.0]]]), decay=0.5, dead_threshold=0.0, eps=0.0)
        >>> _ = vq.step(torch.tensor([[[1.0]], [[2.0]], [[6.0]]]), torch.Generator())
        >>> vq.size.tolist(), vq.keys.flatten().tolist()   # key 0 fetched 1 and 2, key 1 fetched 6
        ([[1.0, 0.5]], [1.5, 6.0])
        """
        codebooks, count, width = self.keys.shape
        none = torch.zeros(codebooks, count, dtype=torch.bool, device=heads.device)
        table, mean = search_table(self.keys, none)
        ones = heads.new_ones(*heads.shape[:2], 1)
        nearest = nearest_keys(torch.cat([heads - mean, ones], -1), table)
        flat = (nearest + torch.arange(codebooks, device=heads.device) * count).flatten()
        fresh = torch.bincount(flat, minlength=codebooks * count).view(codebooks, count).to(heads.dtype)
        sums = heads.new_zeros(codebooks * count, width)
        sums.index_add_(0, flat, heads.reshape(-1, width))
        self.size.mul_(self.decay).add_(fresh, alpha=1 - self.decay)
        self.total.mul_(self.decay).add_(sums.view_as(self.total), alpha=1 - self.decay)
        whole = self.size.sum(1, keepdim=True)
        smoothed = (self.size + self.eps) / (whole + count * self.eps) * whole
        fetched = (self.size > 0).unsqueeze(-1)
        self.keys = torch.where(fetched, self.total / smoothed.unsqueeze(-1), self.keys)
        return self._revive(heads, generator)

    def _revive(self, heads: Tensor, generator: torch.Generator) -> Tensor:
        codebooks, count, _ = self.keys.shape
        fair = len(heads) / count
        # The averages have seen only 1 - g^t of a batch, so the first steps must not call every key dead.
        dead = self.size < self.dead_threshold * fair * (self.size.sum(1, keepdim=True) / len(heads)).clamp(
            max=1
        )
        book, key = dead.nonzero(as_tuple=True)
        if len(book):
            drawn = torch.randint(len(heads), (len(book),), generator=generator).to(heads.device)
            self.keys[book, key] = heads[drawn, book]
            self.size[book, key] = fair * (self.size.sum(1)[book] / len(heads))
            self.total[book, key] = self.keys[book, key] * self.size[book, key].unsqueeze(-1)
        return dead
