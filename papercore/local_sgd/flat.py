"""Many tensors as one vector, so that an average costs one all-reduce (QSR's `LocalOptimizer`, section 2 of arXiv 2310.14423).

An all-reduce has a price of its own, however short its vector: a network of 160 tensors pays it 160 times if every tensor is
reduced by itself. Here tensors of one dtype and device lie side by side in one vector that is made once and kept.

    vector = [ all elements of tensor 0 | tensor 1 | ... | notes of rank 0 | notes of rank 1 | ... ]
               payload                                     one byte an element

The notes are how the ranks tell each other where they stand (agreement.py). Every rank writes its own and leaves those of the
others at 0, so that the sum over ranks holds them all; a byte is exact in every floating dtype, and 0 + x = x. They ride in the
reduction that is made anyway, so that a check of every average costs no message of its own.

Glossary
    size       K    ranks that average
    payload    P    elements that are averaged, a rank's theta^(k)
    order           "all_reduce": the library's sum, whose order it chooses; "ordered": every rank's vector is gathered and summed
                    from rank 0 on, the same bits whatever the network
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["FlatVector", "FlatVectors", "Layout", "layout_of"]

# Elements that are gathered at a time in "ordered": bounds the extra memory by K times this.
_CHUNK = 1 << 22
_WORD = 8  # bytes of a note

Layout = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]


def layout_of(tensors: Sequence[Tensor]) -> Layout:
    """What decides where elements lie: shape, dtype and device of every tensor, in order."""
    return tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)


class FlatVector:
    """Tensors of one dtype and device side by side in one vector that is kept between averages.

    Args:
        layout: shape, dtype and device of at least one tensor, all of one floating dtype on one device.
        notes: 64-bit numbers that every rank adds behind the payload.
        size: ranks (K), for the room of their notes.
    """

    def __init__(self, layout: Layout, *, notes: int = 0, size: int = 1) -> None:
        _, dtype, device = layout[0]
        lengths = [math.prod(shape) for shape, _, _ in layout]
        self.numel = sum(lengths)
        self.notes, self.size = notes, size
        self.vector = torch.zeros(self.numel + notes * _WORD * size, dtype=dtype, device=device)
        self.payload, self._room = self.vector[: self.numel], self.vector[self.numel :]
        parts = self.payload.split(lengths)
        self.views = [part.view(shape) for part, (shape, _, _) in zip(parts, layout, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of the payload: P times the size of an element."""
        return self.numel * self.vector.element_size()

    @property
    def note_bytes(self) -> int:
        """Bytes of the notes of all ranks."""
        return self._room.numel() * self.vector.element_size()

    @torch.no_grad()
    def pack(self, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors into the vector."""
        torch._foreach_copy_(self.views, list(tensors))

    @torch.no_grad()
    def unpack(self, tensors: Sequence[Tensor]) -> None:
        """Copy the vector into the tensors: into their storages, so that views of them stay views."""
        torch._foreach_copy_(list(tensors), self.views)

    @torch.no_grad()
    def write_notes(self, rank: int, words: Sequence[int]) -> None:
        """This rank's notes, `notes` numbers in [0, 2^64); those of the others become 0."""
        if not self.notes:
            return
        own = b"".join(int(word).to_bytes(_WORD, "little") for word in words)
        self._room.zero_()
        bytes_ = torch.tensor(list(own), dtype=self.vector.dtype, device=self.vector.device)
        self._room[rank * len(own) : (rank + 1) * len(own)] = bytes_

    def read_notes(self) -> list[list[int]]:
        """Every rank's notes after a sum over ranks, in the order of the ranks."""
        if not self.notes:
            return []
        flat = bytes(int(value) for value in self._room.tolist())
        words = [int.from_bytes(flat[i : i + _WORD], "little") for i in range(0, len(flat), _WORD)]
        return [words[i : i + self.notes] for i in range(0, len(words), self.notes)]

    @torch.no_grad()
    def sum_over(self, group: Any, order: str = "all_reduce") -> None:
        """Replace the vector by its sum over the ranks of a process group."""
        if order == "all_reduce" or self.size <= 2:  # two numbers have the same sum in either order
            dist.all_reduce(self.vector, group=group)
            return
        for chunk in self.vector.split(_CHUNK):
            everyone = [torch.empty_like(chunk) for _ in range(self.size)]
            dist.all_gather(everyone, chunk, group=group)
            chunk.copy_(everyone[0])
            for part in everyone[1:]:
                chunk.add_(part)

    @torch.no_grad()
    def divide(self) -> None:
        """Turn the sum of the payload into a mean. (gloo has no mean; a division rounds as the virtual workers' does.)"""
        self.payload.div_(self.size)


class FlatVectors:
    """One `FlatVector` for every dtype and device that occurs among the tensors, the notes in the first of them."""

    def __init__(self, layout: Layout, *, notes: int = 0, size: int = 1) -> None:
        self.layout = layout
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, (_, dtype, device) in enumerate(layout):
            kinds.setdefault((dtype, device), []).append(index)
        self.places = list(kinds.values())
        self.vectors = [
            FlatVector(tuple(layout[i] for i in places), notes=notes if number == 0 else 0, size=size)
            for number, places in enumerate(self.places)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads."""
        return sum(vector.nbytes for vector in self.vectors)

    @property
    def note_bytes(self) -> int:
        """Bytes of the notes."""
        return sum(vector.note_bytes for vector in self.vectors)

    def exchange(
        self, tensors: Sequence[Tensor], *, rank: int, group: Any, order: str, words: Sequence[int] = ()
    ) -> list[list[int]]:
        """Sum the tensors over ranks inside the vectors and return every rank's notes. The tensors are only read."""
        for vector, places in zip(self.vectors, self.places, strict=True):
            vector.pack([tensors[i] for i in places])
            vector.write_notes(rank, words)
            vector.sum_over(group, order)
        return self.vectors[0].read_notes() if self.vectors else []

    def write_means(self, tensors: Sequence[Tensor]) -> None:
        """After `exchange`: write the means over ranks into the tensors."""
        for vector, places in zip(self.vectors, self.places, strict=True):
            vector.divide()
            vector.unpack([tensors[i] for i in places])
