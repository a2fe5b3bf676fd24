"""The noise by plain torch, on any device: the path that the fast ones are checked against.

A pass goes over windows of consecutive indices, so that a row of small tensors shares one call of each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from papercore.mezo import philox

Term = tuple[int, float]  # seed, coefficient
Item = tuple[Tensor, Tensor, int]  # source and target, contiguous, of one shape; index of their first element
Runner = Callable[[list[Item], list[Term], float, str], None]

# Elements in flight on the CPU. Signs come 128 to a counter, so a larger window makes each torch call worth its cost.
CHUNK = {"gaussian": 1 << 18, "rademacher": 1 << 20}
PIECE = (
    1 << 16
)  # elements whose noise is made at a time, so that its dozen arrays stay in a second-level cache
CHUNK_CUDA = 1 << 22  # a kernel launch costs about as much as a million elements


def run(items: list[Item], terms: list[Term], scale: float, dist: str) -> None:
    """target <- scale * source + sum of coefficient * z for every item; all of them lie on one device."""
    add_term = _add_gaussian if dist == "gaussian" else _add_rademacher

    def add_terms(total: Tensor, start: int) -> None:
        for seed, coefficient in terms:
            add_term(total, start, seed, coefficient)

    by_windows(items, scale, add_terms, CHUNK_CUDA if items[0][0].is_cuda else CHUNK[dist])


def by_windows(items: list[Item], scale: float, add_terms: Callable[[Tensor, int], None], chunk: int) -> None:
    """The frame of a pass: sums made window by window in the wide dtype, rounded once into the targets.

    add_terms(total, start) adds the noise of indices start, start + 1, ... to the numbers in total, in place.
    """
    for start, pieces in _windows(items, chunk):
        _sum_window(start, pieces, scale, add_terms)


def _sum_window(
    start: int, pieces: list[tuple[Tensor, Tensor]], scale: float, add_terms: Callable[[Tensor, int], None]
) -> None:
    """One window: (source, target) pieces that hold consecutive indices from `start` on."""
    first, target = pieces[0]
    wide = wide_dtype(first)
    sizes = [source.numel() for source, _ in pieces]
    # The sum is built where it will stand if it can be, else beside it: many small tensors in a row share a window,
    # half-precision numbers are summed in float32.
    in_place = len(pieces) == 1 and target.dtype == wide
    total = target if in_place else torch.empty(sum(sizes), dtype=wide, device=first.device)
    parts = total.split(sizes)
    if scale == 0.0:
        total.zero_()
    else:
        for part, (source, _) in zip(parts, pieces, strict=True):
            if part.data_ptr() != source.data_ptr():
                part.copy_(source)
        if scale != 1.0:
            total *= scale
    add_terms(total, start)
    if not in_place:
        for part, (_, target) in zip(parts, pieces, strict=True):
            target.copy_(part)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that sums are made in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _windows(items: list[Item], chunk: int) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
    """Cuts the tensors into windows of at most one chunk of consecutive indices: (first index, pieces that fill it)."""
    start = stop = 0
    pieces: list[tuple[Tensor, Tensor]] = []
    for source, target, offset in sorted(items, key=lambda item: item[2]):
        source, target = source.view(-1), target.view(-1)
        if pieces and (offset != stop or wide_dtype(source) != wide_dtype(pieces[0][0])):
            yield start, pieces
            pieces = []
        at = 0
        while at < source.numel():
            if not pieces:
                start = stop = offset + at
            length = min(source.numel() - at, start + chunk - stop)
            pieces.append((source[at : at + length], target[at : at + length]))
            at += length
            stop += length
            if stop == start + chunk:
                yield start, pieces
                pieces = []
    if pieces:
        yield start, pieces


def _add_gaussian(total: Tensor, start: int, seed: int, coefficient: float) -> None:
    """total [m] += coefficient * z[start : start + m]."""
    step = CHUNK_CUDA if total.is_cuda else PIECE
    for at in range(0, total.numel(), step):
        part = total[at : at + step]
        first, count, skip = _blocks(start + at, part.numel(), "gaussian")
        z = philox.gaussian_blocks(seed, first, count, total.device)[skip : skip + part.numel()]
        part += z.to(total.dtype).mul_(coefficient)


def _add_rademacher(total: Tensor, start: int, seed: int, coefficient: float) -> None:
    """The same for signs: eight at a time are looked up in a table that holds them times the coefficient."""
    step = CHUNK_CUDA if total.is_cuda else PIECE
    first, count, skip = _blocks(start, total.numel(), "rademacher")
    packed = philox.sign_bytes(seed, first, count, total.device)
    table = philox.sign_table(total.device, total.dtype).mul_(coefficient)
    for at in range(0, total.numel(), step):
        part = total[at : at + step]
        low, offset = divmod(skip + at, 8)
        high = (skip + at + part.numel() + 7) // 8
        part += table.index_select(0, packed[low:high]).view(-1)[offset : offset + part.numel()]


def _blocks(start: int, numel: int, dist: str) -> tuple[int, int, int]:
    """First block, number of blocks, and numbers to skip in the first one, for a range of indices."""
    size = philox.PER_BLOCK[dist]
    first = start // size
    return first, -(-(start + numel) // size) - first, start - first * size
