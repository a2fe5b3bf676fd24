"""What the ranks of a local gradient method have to agree on, and how a disagreement is found before it becomes a deadlock.

Two checks:

    at the start      the same parameters bit for bit, in the same order, under the same schedule and policies; a few numbers of
                      every rank are gathered
    at every average  the same step, round and learning rate; seven numbers of every rank ride in the all-reduce (flat.py). Ranks
                      whose rounds have different lengths still meet in a reduction of the same size, since every reduction of a
                      run has that size, also the one that `finish()` makes; they meet at different steps, read that in the
                      notes and stop, all of them, with the parameters untouched.

Glossary
    step       t     steps that the rank has attempted
    position         steps of them that belong to the round in progress
    h          H     length that the round was given at its start
    lr         eta   learning rate at the round's start
    digest           56 bits of a SHA-256
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "Whereabouts", "check_parameters", "check_same_place", "digest_of", "fingerprint"]

_REASONS = ("the end of a round", "a call of sync()", "a call of finish()")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Whereabouts:
    """Where one rank stands when it averages: what travels in the notes."""

    reason: int  # index of _REASONS
    step: int
    position: int
    h: int
    lr_bits: int
    layout: int
    state: int

    @classmethod
    def of(
        cls, reason: int, step: int, position: int, h: int, lr: float, layout: int, state: int
    ) -> Whereabouts:
        return cls(reason, step, position, h, struct.unpack("<Q", struct.pack("<d", lr))[0], layout, state)

    @property
    def lr(self) -> float:
        """Learning rate at the start of the round."""
        return float(struct.unpack("<d", struct.pack("<Q", self.lr_bits))[0])

    @property
    def words(self) -> tuple[int, ...]:
        """The numbers to send."""
        return astuple(self)


WORDS = 7


def check_same_place(everyone: Sequence[Whereabouts]) -> None:
    """RuntimeError that says who stands where if the ranks' notes differ in anything but the layouts."""
    first = everyone[0]
    if all(place.words[:5] == first.words[:5] for place in everyone):
        return
    places: dict[Whereabouts, list[int]] = {}
    for rank, place in enumerate(everyone):
        places.setdefault(place, []).append(rank)
    table = "; ".join(
        f"{_named(ranks)}: {_REASONS[p.reason]} after step {p.step} ({p.position} of H = {p.h}, lr {p.lr:g})"
        for p, ranks in places.items()
    )
    if any(place.reason != first.reason for place in everyone):
        advice = (
            "Every rank must make the same number of steps and the same calls: give all ranks equally many batches "
            "(DistributedSampler with drop_last=True), and call sync() and finish() on all of them at the same step."
        )
    elif any(place.lr_bits != first.lr_bits for place in everyone):
        advice = "The learning rate at the start of a round must be the same on all ranks: it decides the round's length."
    else:
        advice = (
            "Every rank must count the same steps: attempt a step for every batch on all ranks, also where a gradient "
            "scaler skips the update, and resume all ranks from the same checkpoint."
        )
    raise RuntimeError(f"the ranks met at different places, so nothing was averaged ({table}). {advice}")


def _named(ranks: Sequence[int]) -> str:
    many = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {many}" if len(ranks) == 1 else f"ranks {many}"


def digest_of(*things: object) -> int:
    """56 bits that depend on the repr of the arguments."""
    return int.from_bytes(hashlib.sha256(repr(things).encode()).digest()[:7], "big")


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A signed 64-bit number that depends on every bit of the tensors and its place; computed where they lie."""
    total = 0
    for number, tensor in enumerate(tensors):
        bits = tensor.detach().contiguous().view(-1).view(_INTEGER[tensor.element_size()])
        place = torch.arange(1, min(_CHUNK, bits.numel()) + 1, device=bits.device)
        # Odd weights, products that wrap around: a change of one bit always shows.
        weights = (place * -7046029254386353131) | 1
        for index, chunk in enumerate(bits.split(_CHUNK)):
            wide = chunk.to(torch.int64) + 1
            # The top bit times an odd number is the top bit: without the fold two signs that change would cancel.
            wide = wide ^ ((wide >> 32) & 0xFFFFFFFF)
            part = int((wide * weights[: chunk.numel()]).sum())
            total = (total * 6364136223846793005 + part * (2 * (number + index) + 1)) & (2**64 - 1)
    return total - 2**64 if total >> 63 else total


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_parameters(params: Sequence[Tensor]) -> None:
    """Refuse what a plain average of whole tensors would get wrong.

    Raises:
        ValueError: a parameter is sharded (FSDP, DTensor), without data (lazy, meta), sparse, or not of a floating dtype; or
            there is none to train.
    """
    for number, p in enumerate(params):
        who = f"parameter {number} of the optimizer (shape {_shape(p)})"
        names = {cls.__name__ for cls in type(p).__mro__}
        if (
            names & {"DTensor", "ShardedTensor", "FlatParameter"}
            or getattr(p, "_is_flat_param", False)
            or getattr(p, "_fsdp_flattened", False)
        ):
            raise ValueError(
                f"{who} is sharded: every rank holds a part of it, so there is no local copy to train alone. Use a plain "
                "module on every rank instead of FSDP, fully_shard or DTensor."
            )
        if "UninitializedTensorMixin" in names or p.is_meta:
            raise ValueError(
                f"{who} holds no data yet: make one forward pass (lazy modules) or move it off the meta device first."
            )
        if p.layout != torch.strided:
            raise ValueError(f"{who} has layout {p.layout}: only dense (strided) parameters are averaged.")
        if not p.dtype.is_floating_point or p.element_size() < 2:
            raise ValueError(
                f"{who} has dtype {p.dtype}: only float64, float32, float16 and bfloat16 have a mean over ranks. Leave it "
                "out of the optimizer, or keep complex parameters as real pairs."
            )
    if not any(p.requires_grad for p in params):
        raise ValueError(
            "no parameter of the optimizer requires a gradient: there is nothing to train and average."
        )


def _shape(p: Tensor) -> object:
    try:
        return tuple(p.shape)
    except RuntimeError:  # lazy parameters have none
        return "unknown"


class Ranks:
    """The processes that average with each other.

    Args:
        group: a torch.distributed process group; None: all processes.
        device: where the numbers that are gathered lie if the backend needs an accelerator.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError: `group` is no process group. ValueError: this process does not belong to it.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "torch.distributed is not initialised: call torch.distributed.init_process_group('gloo') (CPU) or ('nccl') "
                "(GPUs) first and start the program with torchrun, or use VirtualWorkers for workers inside one process."
            )
        group = dist.group.WORLD if group is None else group
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "this process is not a member of process_group: make the optimizer only on its members."
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group must be a torch.distributed process group or None (all processes), got {group!r}."
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                "this process is not a member of process_group: make the optimizer only on its members."
            )
        needs_accelerator = str(dist.get_backend(group)) == "nccl"
        if needs_accelerator and device.type == "cpu":
            raise ValueError(
                "the parameters are on the CPU and the process group's backend is nccl, which reduces on GPUs only: move the "
                "model to this rank's GPU before making its optimizer, or use the gloo backend."
            )
        self.device = device if needs_accelerator else torch.device("cpu")
        self.bytes_gathered = 0

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's numbers (signed 64-bit), in the order of the ranks."""
        own = torch.tensor(list(values), dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        self.bytes_gathered += own.numel() * own.element_size()
        return [part.tolist() for part in everyone]

    def check_equal(self, values: dict[str, tuple[int, str]]) -> None:
        """{what: (number, advice)}: ValueError for the first number that is not the same on all ranks."""
        rows = self.gather([number for number, _ in values.values()])
        for column, (what, (_, advice)) in enumerate(values.items()):
            different = [rank for rank, row in enumerate(rows) if row[column] != rows[0][column]]
            if different:
                raise ValueError(f"{what} differ between rank 0 and {_named(different)}: {advice}")
