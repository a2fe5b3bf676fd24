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

# Numbers of one window, whose noise is made at once: enough to make each torch call worth its cost, few enough for its
# arrays (a dozen for Gaussian numbers) to stay in a cache.
CHUNK = {"gaussian": 1 << 17, "rademacher": 7 << 17}
CHUNK_CUDA = 1 << 22  # a kernel launch costs about as much as a million elements
SCRATCH = (
    1 << 18
)  # numbers that are copied together where a tensor has gaps, or is in half precision under numba


def run(items: list[Item], terms: list[Term], scale: float, dist: str) -> None:
    """target <- scale * source + sum of coefficient * z for every item; all of them lie on one device."""
    scaled_noise = _gaussian if dist == "gaussian" else _rademacher

    def add(sums: list[Tensor], change: Tensor) -> None:
        for part, its_change in zip(sums, change.split([part.numel() for part in sums]), strict=True):
            part += its_change

    def add_terms(sums: list[Tensor], start: int) -> None:
        numel = sum(part.numel() for part in sums)
        for seed, coefficient in terms:
            # No name holds the change, so that it is gone before the next one is made.
            add(sums, scaled_noise(start, numel, seed, coefficient, sums[0]))

    chunk = CHUNK_CUDA if items[0][0].is_cuda else CHUNK[dist]
    if any(source.dtype == torch.float64 for source, _, _ in items):
        chunk = max(1, chunk // 2)  # numbers of twice the size
    by_windows(items, scale, add_terms, chunk)


def by_windows(
    items: list[Item], scale: float, add_terms: Callable[[list[Tensor], int], None], chunk: int
) -> None:
    """The frame of a pass: sums made window by window in the wide dtype, rounded once into the targets.

    add_terms(sums, start) adds the noise of indices start, start + 1, ... to the numbers in sums, in place; these are
    flat tensors that follow one another.
    """
    for start, pieces in _windows(items, chunk):
        # A sum is built where it will stand if it can be, else beside it: half-precision numbers are summed in float32.
        wide = wide_dtype(pieces[0][0])
        sums = [
            target if target.dtype == wide else torch.empty_like(target, dtype=wide) for _, target in pieces
        ]
        for total, (source, _) in zip(sums, pieces, strict=True):
            if scale == 0.0:
                total.zero_()
                continue
            if total.data_ptr() != source.data_ptr():
                total.copy_(source)
            if scale != 1.0:
                total *= scale
        add_terms(sums, start)
        for total, (_, target) in zip(sums, pieces, strict=True):
            if total is not target:
                target.copy_(total)


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


def _gaussian(start: int, numel: int, seed: int, coefficient: float, like: Tensor) -> Tensor:
    """coefficient * z[start : start + numel] in the dtype and on the device of `like`."""
    first, count, skip = _blocks(start, numel, "gaussian")
    z = philox.gaussian_blocks(seed, first, count, like.device)[skip : skip + numel]
    return z.to(like.dtype).mul_(coefficient)


def _rademacher(start: int, numel: int, seed: int, coefficient: float, like: Tensor) -> Tensor:
    """The same for signs: the coefficient's bits, the first one turned over where the sign is minus."""
    first, count, skip = _blocks(start, numel, "rademacher")
    signs = philox.sign_bits(seed, first, count, like.device)
    if like.dtype == torch.float64:
        one = int(torch.ones(1).view(torch.int32))
        z = signs.bitwise_xor_(one).view(torch.float32)[skip : skip + numel]
        return z.to(torch.float64).mul_(coefficient)
    # A product with +1 or -1 rounds nothing.
    plus = int(torch.tensor(coefficient, dtype=torch.float64).to(torch.float32).view(torch.int32))
    return signs.bitwise_xor_(plus).view(torch.float32)[skip : skip + numel]


def _blocks(start: int, numel: int, dist: str) -> tuple[int, int, int]:
    """First block, number of blocks, and numbers to skip in the first one, for a range of indices."""
    size = philox.PER_BLOCK[dist]
    first = start // size
    return first, -(-(start + numel) // size) - first, start - first * size
