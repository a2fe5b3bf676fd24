"""The noise on the CPU by numba: tables of addresses handed to compiled loops, one call for many tensors.

The same numbers as the torch path, bit for bit, whatever the number of threads. Half-precision tensors go through float32
scratch of one chunk.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import numba
import numpy as np
import torch
from numba.core import types
from torch import Tensor

from papercore.mezo import _torch
from papercore.mezo._numba_loops import PASSES
from papercore.mezo._torch import Item, Term

PARALLEL_FROM = 1 << 20  # numbers of noise for each thread: with fewer, starting it costs as much as it saves
Row = tuple[int, int, int, int]  # address of the old values, of the new ones, start, numel
NUMPY_DTYPES: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


@functools.cache
def _compiled(dist: str, dtype: np.dtype) -> Callable[..., None]:
    """A pass for one dtype, from the cache on disk if it is there; without that cache if it cannot be used.

    The cache is renewed when _numba_loops.py changes; after a change of the constants in philox.py alone, remove it.
    """
    real = numba.from_dtype(dtype)
    signature = types.void(types.int64[:, ::1], real[::1], types.uint64[::1], real[::1], real)
    try:
        return numba.njit([signature], cache=True, nogil=True)(PASSES[dist])
    except Exception:  # no folder to write to, a full disk, a damaged file: none of them is a reason to stop
        return numba.njit([signature], nogil=True)(PASSES[dist])


def run(items: list[Item], terms: list[Term], scale: float, dist: str) -> None:
    """target <- scale * source + sum of coefficient * z for every item; all of them lie on the CPU."""
    halves = []
    direct: dict[torch.dtype, list[Item]] = {}
    for item in items:
        if item[0].dtype in NUMPY_DTYPES:
            direct.setdefault(item[0].dtype, []).append(item)
        else:
            halves.append(item)
    for kind, group in direct.items():
        table = [
            (source.data_ptr(), target.data_ptr(), start, source.numel()) for source, target, start in group
        ]
        _run_table(table, kind, terms, scale, dist)
        # Writing behind torch's back: autograd is told that saved values are stale. Inference tensors keep no count.
        torch.autograd.graph.increment_version(
            [target for _, target, _ in group if not target.is_inference()]
        )

    def add_terms(sums: list[Tensor], start: int) -> None:
        table = []
        for part in sums:
            table.append((part.data_ptr(), part.data_ptr(), start, part.numel()))
            start += part.numel()
        _run_table(table, sums[0].dtype, terms, 1.0, dist)

    if halves:
        _torch.by_windows(halves, scale, add_terms, _torch.SCRATCH)


def _run_table(table: list[Row], kind: torch.dtype, terms: list[Term], scale: float, dist: str) -> None:
    dtype = NUMPY_DTYPES[kind]
    with np.errstate(over="ignore"):  # a coefficient beyond float32 becomes infinite, as in torch
        coefficients = np.array([c for _, c in terms], dtype)
        factor = dtype.type(scale)
    seeds = np.array([seed for seed, _ in terms], np.uint64)
    like = np.empty(0, dtype)
    kernel = _compiled(dist, dtype)
    shares = _shares(table, dtype.itemsize, torch.get_num_threads(), max(1, len(terms)))
    if len(shares) == 1:
        kernel(shares[0], like, seeds, coefficients, factor)
        return
    workers = [
        threading.Thread(target=kernel, args=(share, like, seeds, coefficients, factor))
        for share in shares[1:]
    ]
    for worker in workers:
        worker.start()
    try:
        kernel(shares[0], like, seeds, coefficients, factor)
    finally:
        # Also when interrupted: a thread must not write to a tensor that may be gone.
        for worker in workers:
            worker.join()


def _shares(table: list[Row], itemsize: int, threads: int, terms: int) -> list[np.ndarray]:
    """The table cut into one part for each thread, in bytes that do not overlap; no part is too small to be worth one."""
    total = sum(numel for *_, numel in table)
    threads = max(1, min(threads, total * terms // PARALLEL_FROM))
    if threads == 1:
        return [np.array(table, np.int64)]
    share = -(-total // threads)
    parts: list[list[Row]] = [[] for _ in range(threads)]
    done = 0
    for old, new, start, numel in table:
        at = 0
        while at < numel:
            length = min(numel - at, (done // share + 1) * share - done)
            parts[done // share].append((old + at * itemsize, new + at * itemsize, start + at, length))
            at += length
            done += length
    return [np.array(part, np.int64) for part in parts if part]
