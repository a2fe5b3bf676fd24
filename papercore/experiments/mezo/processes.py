"""One process or several under torchrun: who computes what, and how results meet.

MeZO needs one number from each process at each step (spelled out in papercore.mezo); what is here concerns the rest: sharing the
test questions, averaging Adam's gradients, and agreeing on which parts of a run are finished.

Glossary
    rank, world   number of this process, and of all processes
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from papercore.lab.stages import Stages

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of this run and the device of this one."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """The processes that torchrun started (it sets WORLD_SIZE), or this one alone.

        A CUDA device becomes the one of this process's local rank.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if device.type == "cuda" and world > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if world == 1:
            return cls(0, 1, device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """For MeZO's `process_group`; None for a single process."""
        return dist.group.WORLD if self.world > 1 else None

    def share(self, items: Sequence[T], what: str) -> Sequence[T]:
        """This process's part of a batch, of the same size on every process.

        Raises:
            ValueError: the batch does not divide evenly, so that a mean of means would not be the batch's mean.
        """
        if len(items) % self.world:
            raise ValueError(
                f"{what} of {len(items)} examples does not divide over {self.world} processes: choose a number of processes that divides it."
            )
        return items[self.rank :: self.world]

    def spread(self, count: int, work: Callable[[list[int]], list[T]]) -> list[T]:
        """`work(indices)` over 0 .. count - 1, each process doing its part; every process gets all results in order."""
        mine = list(range(self.rank, count, self.world))
        results = work(mine)
        if self.world == 1:
            return results
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, results)
        merged: list[Any] = [None] * count
        for rank, part in enumerate(parts):
            merged[rank :: self.world] = part
        return merged

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over the processes, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.world

    def mean_of(self, numbers: Sequence[float]) -> list[float]:
        """Element by element, the mean over the processes of equally long lists."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        self.mean_([tensor])
        return tensor.tolist()

    def stage(self, stages: Stages, name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A finished part from disk, or computed by all processes together; the first alone reads and writes the disk."""
        if self.world == 1:
            return stages.get(name, part)
        if self.rank:
            message = self._from_first(None)
            if message == "compute":
                part()
                message = self._from_first(None)
            return message

        def announced() -> dict[str, Any]:
            self._from_first("compute")
            return part()

        value = stages.get(name, announced)
        self._from_first(value)
        return value

    def _from_first(self, message: Any) -> Any:
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]
