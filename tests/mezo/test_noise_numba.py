"""The compiled CPU path against the torch path: the same bits, whatever the shapes, dtypes, threads and disk."""

from __future__ import annotations

import importlib
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

numba = pytest.importorskip("numba")
_numba = importlib.import_module("papercore.mezo._numba")
from papercore.mezo import _torch, philox  # noqa: E402
from papercore.mezo.noise import FLOAT_DTYPES, add_noise_, noise, resolve_backend  # noqa: E402

DISTS = ["gaussian", "rademacher"]


def both(tensors, starts, terms, **options):
    """The same pass by torch and by numba, each on copies of the tensors."""
    results = []
    for backend in ("torch", "numba"):
        copies = [tensor.clone() for tensor in tensors]
        add_noise_(copies, starts, terms, backend=backend, **options)
        results.append(copies)
    return results


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(bits(a), bits(b))


def test_numba_is_what_auto_takes_on_the_cpu():
    assert resolve_backend("auto", "cpu") == resolve_backend("numba", "cpu") == "numba"


@given(
    seed=st.integers(0, 2**64 - 1),
    start=st.one_of(st.integers(0, 5000), st.integers(0, 2**63 - 20_001)),
    numel=st.one_of(st.integers(1, 300), st.integers(1, 20_000)),
    dist=st.sampled_from(DISTS),
)
@settings(max_examples=80, deadline=None)
def test_same_bits_as_torch_for_any_slice(seed, start, numel, dist):
    assert_same_bits(*both([torch.zeros(numel)], [start], [(seed, 1.0)], dist=dist))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.999, 0.0])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 6])
def test_same_bits_as_torch_for_any_sum(dist, dtype, scale, count):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (), (64, 129), (1, 1), (4096,), (0,), (7, 5, 3), (10_000,)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    starts = list(accumulate([t.numel() for t in tensors[:-1]], initial=5))
    terms = [(2**64 - 1 - j, 0.3 - 0.17 * j) for j in range(count)]
    assert_same_bits(*both(tensors, starts, terms, scale=scale, dist=dist))
    made = []
    for backend in ("torch", "numba"):
        out = [torch.full_like(t, float("nan")) for t in tensors]
        add_noise_(tensors, starts, terms, scale=scale, dist=dist, backend=backend, out=out)
        made.append(out)
    assert_same_bits(*made)


@pytest.mark.parametrize("dist", DISTS)
def test_same_bits_as_torch_for_special_values(dist):
    special = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-40, 3e38, float("inf"), -float("inf"), float("nan"), 1.0] * 30
    )
    for coefficient in (0.0, -0.0, 1e-45, 1e300, -1.0):
        for scale in (1.0, -1.0, 1e-20):
            ours, theirs = both([special], [3], [(1, coefficient)], scale=scale, dist=dist)
            # Which NaN comes out of inf - inf is not laid down; everything else is.
            assert torch.equal(ours[0].isnan(), theirs[0].isnan())
            assert_same_bits([ours[0].nan_to_num(7.0)], [theirs[0].nan_to_num(7.0)])


@pytest.mark.parametrize("dist", DISTS)
def test_scale_zero_does_not_read_the_old_values(dist):
    for backend in ("torch", "numba"):
        tensor = torch.full((1000,), float("nan"))
        add_noise_([tensor], [9], [(1, 1.0)], scale=0.0, dist=dist, backend=backend)
        assert torch.equal(tensor, noise(1, 9, 1000, dist=dist))


def test_mixed_dtypes_in_one_call():
    tensors = [torch.ones(300, dtype=dtype) for dtype in FLOAT_DTYPES]
    assert_same_bits(*both(tensors, [0, 300, 600, 900], [(1, 0.5)]))


@pytest.mark.parametrize("dist", DISTS)
def test_threads_share_the_work_without_changing_a_bit(dist, monkeypatch):
    monkeypatch.setattr(_numba, "PARALLEL_FROM", 100)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator) for n in (1, 50, 7001, 3, 20_000, 999)]
    starts = list(accumulate([len(t) for t in tensors[:-1]], initial=1))
    terms = [(3, 0.1), (4, 0.2)]
    expected, _ = both(tensors, starts, terms, dist=dist)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            copies = [tensor.clone() for tensor in tensors]
            add_noise_(copies, starts, terms, dist=dist, backend="numba")
            assert_same_bits(copies, expected)
    finally:
        torch.set_num_threads(before)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_shares_cover_every_byte_once(sizes, threads):
    ends = list(accumulate(sizes))
    table = [(4 * (end - n), 10**9 + 4 * (end - n), end - n, n) for n, end in zip(sizes, ends, strict=True)]
    monkey, _numba.PARALLEL_FROM = _numba.PARALLEL_FROM, 1
    try:
        shares = _numba._shares(table, 4, threads, 1)
    finally:
        _numba.PARALLEL_FROM = monkey
    assert len(shares) <= threads
    rows = sorted(tuple(row) for share in shares for row in share.tolist())
    at = 0
    for old, new, start, numel in rows:
        assert (old, new, start) == (4 * at, 10**9 + 4 * at, at)
        at += numel
    assert at == ends[-1]
    assert max(sum(share[:, 3]) for share in shares) <= -(-ends[-1] // threads) + 1


def test_small_calls_do_not_start_threads():
    assert len(_numba._shares([(0, 0, 0, 1000)], 4, 8, 2)) == 1


def test_strided_and_half_tensors_need_one_chunk(monkeypatch):
    monkeypatch.setattr(_torch, "SCRATCH", 4096)
    tensors = [torch.ones(200, 301).T, torch.ones(50_000, dtype=torch.bfloat16)]
    ours, theirs = both(tensors, [1, 60_201], [(1, 0.5), (2, 0.25)], scale=0.5)
    assert_same_bits([t.contiguous() for t in ours], [t.contiguous() for t in theirs])


def test_inference_tensors_are_written():
    with torch.inference_mode():
        tensor = torch.zeros(10)
        add_noise_([tensor], [0], [(1, 1.0)], backend="numba")
        assert torch.equal(tensor, noise(1, 0, 10))


# ---- the cache of compiled code on disk, and numba itself -------------------------------------------------------------


def test_compiled_code_is_kept_on_disk_and_no_disk_is_needed(tmp_path, monkeypatch):
    def compile_and_run() -> list[float]:
        monkeypatch.setattr(_numba, "_compiled", _numba._compiled.__wrapped__)
        tensor = torch.zeros(6)
        add_noise_([tensor], [2], [(5, 1.0)], dist="rademacher", backend="numba")
        monkeypatch.undo()
        return tensor.tolist()

    def cached_in(folder: Path) -> None:
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))

    expected = noise(5, 2, 6, dist="rademacher").tolist()
    cached_in(tmp_path / "cache")
    assert compile_and_run() == expected
    kept = list((tmp_path / "cache").rglob("*.nbc"))
    assert len(kept) == 1
    kept[0].write_bytes(b"damaged")
    cached_in(tmp_path / "cache")
    assert compile_and_run() == expected
    # A file where the folder should be: it can be neither made nor written to.
    (tmp_path / "file").write_text("")
    cached_in(tmp_path / "file" / "cache")
    assert compile_and_run() == expected


def test_a_switched_off_compiler_leaves_torch(monkeypatch):
    for name in ("_numba", "_numba_loops"):
        monkeypatch.delitem(sys.modules, f"papercore.mezo.{name}")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    load = importlib.import_module("papercore.mezo.noise")._load
    assert load.__wrapped__("numba") is None


def test_the_comparisons_have_teeth(monkeypatch):
    """Another stream number in the torch path alone is noticed."""
    monkeypatch.setitem(philox.STREAMS, "gaussian", 5)
    ours, theirs = both([torch.zeros(100)], [0], [(1, 1.0)])
    assert not torch.equal(ours[0], theirs[0])
