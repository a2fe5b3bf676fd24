"""Data-parallel MeZO: the ranks exchange one scalar a draw, whatever the size of the model.

All ranks hold the same weights and draw the same noise, so the scalar decides the whole update. Two ways to
share the work:

    batch        every rank evaluates the same directions on its own share of the batch; the mean of the slopes
                 over ranks is the slope of the joined batch if the shares are equal and the loss is a mean
    directions   every rank evaluates n directions of its own on the same batch; all slopes go to all ranks, so
                 that W ranks make n-SPSA with W n draws

The scalars are gathered and summed in the order of the ranks, so that every rank computes with the same bits;
a reduction's order is up to the library, and a last bit of difference would let the replicas drift apart.
Bytes sent by a rank in a step: 8 a draw (float64).
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
import torch.distributed as dist

from papercore.mezo.weights import Weights

_CHECKED_ELEMENTS = 4096  # of each tensor, in the regular comparison


class Ranks:
    """The other processes of a group, as far as MeZO has to do with them.

    Raises ValueError if torch.distributed is not initialised, this process is not in the group, or the ranks
    start from different weights.
    """

    def __init__(self, group: Any, weights: Weights) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "process_group was given but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group first, or leave process_group out"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group must be a torch.distributed process group (torch.distributed.group.WORLD for all "
                f"processes), got {group!r}"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not a member of process_group")
        backend = dist.get_backend(group)
        self.device = weights.tensors[0].device if backend == "nccl" else torch.device("cpu")
        self.bytes_sent = 0
        layout = repr([(row.shape, row.dtype, row.group, row.decays, row.trained) for row in weights.table])
        digest = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:7], "big")
        self._same("the shapes, dtypes or order of the parameters", digest, ValueError)
        self._same("the starting weights", weights.checksum() >> 1, ValueError)

    def _gather(self, values: list[Any], dtype: torch.dtype) -> list[list[Any]]:
        """Every rank's values, in the order of the ranks."""
        own = torch.tensor(values, dtype=dtype, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        self.bytes_sent += own.numel() * own.element_size()
        return [part.tolist() for part in everyone]

    def _same(self, what: str, value: int, error: type[Exception]) -> None:
        values = [part[0] for part in self._gather([value], torch.int64)]
        different = [rank for rank, other in enumerate(values) if other != values[0]]
        if different:
            raise error(
                f"{what} differ between rank 0 and ranks {different}: broadcast them from rank 0 before making the optimizer"
            )

    def agree_on_seed(self, seed: int) -> int:
        """Rank 0's seed, with a warning on the ranks that were given another one."""
        words = self._gather([seed & 0xFFFFFFFF, seed >> 32], torch.int64)
        first = words[0][0] | (words[0][1] << 32)
        if first != seed:
            warnings.warn(
                f"rank {self.rank} was given seed {seed} and rank 0 seed {first}: all ranks use rank 0's",
                stacklevel=4,
            )
        return first

    def combine(self, differences: list[float], split: str) -> list[float]:
        """The half differences (l+ - l-) / 2 to go on with: means over ranks, or all of them side by side."""
        parts = self._gather(differences, torch.float64)
        if split == "directions":
            return [value for part in parts for value in part]
        return [sum(values) / self.size for values in zip(*parts, strict=True)]

    def check_same_weights(self, weights: Weights, step: int) -> None:
        """Compares a checksum of every tensor's leading elements. RuntimeError if replicas drifted apart."""
        value = weights.checksum(limit=_CHECKED_ELEMENTS) >> 1
        values = [part[0] for part in self._gather([value], torch.int64)]
        if any(other != values[0] for other in values):
            raise RuntimeError(
                f"the weights of the ranks differ after step {step}: something else than the optimizer changed them, or the "
                "ranks' learning rates differ"
            )
