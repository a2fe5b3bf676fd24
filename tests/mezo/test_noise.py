"""A pass of noise: slices, roundings, chunks, strides, threads; what it leaves alone and what it refuses."""

from __future__ import annotations

import importlib
import math
import random
import warnings
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papercore.mezo import _torch
from papercore.mezo.noise import MissingBackend, add_noise_, noise, resolve_backend

# The package exports the function of the same name.
noise_module = importlib.import_module("papercore.mezo.noise")
DISTS = ["gaussian", "rademacher"]

# ---- a slice depends on its indices alone ----------------------------------------------------------------------------

WHOLE = {dist: noise(123, 0, 3000, dist=dist) for dist in DISTS}


@pytest.mark.parametrize("dist", DISTS)
@given(start=st.integers(0, 2999), length=st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_a_slice_is_the_slice_of_the_whole(dist, start, length):
    length = min(length, 3000 - start)
    assert torch.equal(noise(123, start, length, dist=dist), WHOLE[dist][start : start + length])


@pytest.mark.parametrize("dist", DISTS)
def test_indices_beyond_32_bits(dist):
    for edge in (2**32, 2**34, 2**35, 2**39, 2**63 - 500):
        whole = noise(5, edge - 300, 600, dist=dist)
        assert torch.equal(noise(5, edge - 7, 100, dist=dist), whole[293:393])
        assert not torch.equal(whole[300:], noise(5, 0, 300, dist=dist))


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", noise_module.FLOAT_DTYPES)
def test_the_dtype_only_rounds(dist, dtype):
    assert torch.equal(noise(3, 11, 500, dist=dist, dtype=dtype), noise(3, 11, 500, dist=dist).to(dtype))


def test_the_two_distributions_are_unrelated():
    agree = (noise(1, 0, 40_000).sign() == noise(1, 0, 40_000, dist="rademacher")).float().mean()
    assert abs(float(agree) - 0.5) < 5 * 0.5 / math.sqrt(40_000)


# ---- one pass --------------------------------------------------------------------------------------------------------


def one_by_one(tensor, start, terms, scale, dist):
    """The documented order of roundings, one torch operation each."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    value = tensor.to(wide).reshape(-1) * scale
    for seed, coefficient in terms:
        value = value + noise(seed, start, tensor.numel(), dist=dist, dtype=wide) * coefficient
    return value.to(tensor.dtype).view(tensor.shape)


TERMS = [[], [(4, 0.25)], [(4, -1e-3), (2**64 - 1, 0.7)], [(i, 0.1 * i - 0.3) for i in range(5)]]


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", noise_module.FLOAT_DTYPES)
@pytest.mark.parametrize("terms", TERMS, ids=len)
@pytest.mark.parametrize("scale", [1.0, 0.9])
def test_a_pass_rounds_as_documented(dist, dtype, terms, scale):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator).to(dtype) for shape in [(5,), (), (17, 31), (0, 3), (700,)]
    ]
    starts = [0, 5, 6, 533, 2**33 + 1]
    expected = [one_by_one(t, s, terms, scale, dist) for t, s in zip(tensors, starts, strict=True)]
    kept, scratch = [t.clone() for t in tensors], [torch.full_like(t, math.nan) for t in tensors]
    add_noise_(tensors, starts, terms, scale=scale, dist=dist, backend="torch", out=scratch)
    for tensor, keep, made, want in zip(tensors, kept, scratch, expected, strict=True):
        assert torch.equal(tensor, keep)
        assert torch.equal(made, want)
    add_noise_(tensors, starts, terms, scale=scale, dist=dist, backend="torch")
    for tensor, want in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, want)


@pytest.mark.parametrize("dist", DISTS)
def test_chunks_splits_and_threads_change_no_bit(dist, monkeypatch):
    start = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    terms = [(8, 0.3), (9, -0.2)]

    def run(pieces, starts):
        add_noise_(pieces, starts, terms, scale=0.99, dist=dist, backend="torch")

    whole = start.clone()
    run([whole], [77])
    for chunk, length in [(1, 300), (7, 3000), (130, 20_000), (4096, 20_000), (1 << 20, 20_000)]:
        monkeypatch.setattr(_torch, "CHUNK", dict.fromkeys(DISTS, chunk))
        part = start[:length].clone()
        run([part], [77])
        assert torch.equal(part, whole[:length]), chunk
    monkeypatch.undo()
    for cuts in ([3, 5, 11_000], [1], [19_999], [4096, 8192]):
        split = start.clone()
        edges = [0, *cuts, 20_000]
        run([split[a:b] for a, b in pairwise(edges)][::-1], [77 + a for a in edges[:-1]][::-1])
        assert torch.equal(split, whole), cuts
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = start.clone()
            run([again], [77])
            assert torch.equal(again, whole), count
    finally:
        torch.set_num_threads(threads)


STRIDED = {
    "transposed": lambda: torch.zeros(30, 40).T,
    "every second column": lambda: torch.zeros(30, 80)[:, ::2],
    "permuted": lambda: torch.zeros(4, 5, 6).permute(2, 0, 1),
    "channels last": lambda: torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "narrow rows": lambda: torch.zeros(2, 3000).T,
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("chunk", [64, 1 << 18])
def test_strided_tensors_count_in_row_major_order(layout, chunk, monkeypatch):
    monkeypatch.setattr(_torch, "SCRATCH", chunk)
    tensor = STRIDED[layout]()
    assert not tensor.is_contiguous()
    expected = noise(6, 10, tensor.numel()).view(tensor.shape)
    for out in (torch.empty_like(tensor), torch.empty(tensor.shape)):  # with the same strides, and contiguous
        add_noise_([tensor], [10], [(6, 1.0)], out=[out])
        assert torch.equal(out, expected)
        assert not tensor.any()
    add_noise_([tensor], [10], [(6, 1.0)])
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_parameters_change_in_place_and_autograd_notices(backend):
    weight = torch.nn.Parameter(torch.zeros(10))
    loss = (weight * weight).sum()
    address = weight.data_ptr()
    add_noise_([weight], [0], [(1, 1.0)], backend=backend)
    assert weight.data_ptr() == address
    assert torch.equal(weight.detach(), noise(1, 0, 10))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_to_do_changes_nothing():
    tensor = torch.tensor([-0.0, math.nan, 1.0])
    bits = tensor.view(torch.int32).clone()
    add_noise_([tensor], [0], [])
    assert torch.equal(tensor.view(torch.int32), bits)
    add_noise_([], [], [(1, 1.0)])
    assert noise(1, 5, 0).shape == (0,)


# ---- good manners ----------------------------------------------------------------------------------------------------


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(0)
    first = noise(1, 0, 1000)
    torch.manual_seed(5)
    numpy_state = np.random.get_state
    states = torch.get_rng_state(), numpy_state()[1].copy(), random.getstate()
    assert torch.equal(noise(1, 0, 1000), first)
    for dist in DISTS:
        tensor = torch.zeros(1000)
        add_noise_([tensor], [0], [(1, 1.0), (2, 1.0)], dist=dist)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (numpy_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def peak_bytes(function) -> int:
    """Largest sum of live allocations made by torch while the function runs."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_memory_does_not_grow_with_the_tensor(dist, dtype):
    small, large = torch.zeros(1 << 20, dtype=dtype), torch.zeros(1 << 21, dtype=dtype)
    terms = [(1, 0.1), (2, 0.2)]
    peaks = [
        peak_bytes(lambda t=t: add_noise_([t], [3], terms, dist=dist, backend="torch"))
        for t in (small, large)
    ]
    assert 0 < peaks[0] <= 8 * 2**20
    assert peaks[1] <= 1.01 * peaks[0]
    strided = torch.zeros(1 << 10, 1 << 10, dtype=dtype).T
    assert peak_bytes(lambda: add_noise_([strided], [3], terms, dist=dist, backend="torch")) <= 8 * 2**20


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0, 4), ValueError, r"seed=-1: expected an integer in \[0, 2\*\*64\)"),
        ((2**64, 0, 4), ValueError, "seed=18446744073709551616"),
        ((1.0, 0, 4), TypeError, "seed=1.0: expected an integer, not float"),
        ((True, 0, 4), TypeError, "seed=True"),
        ((1, -2, 4), ValueError, "start=-2, numel=4"),
        ((1, 2**63 - 3, 4), ValueError, r"start \+ numel <= 2\*\*63"),
        ((1, 0, -4), ValueError, "numel=-4"),
        ((1, 0, "4"), TypeError, "numel='4': expected an integer, not str"),
    ],
)
def test_noise_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        noise(*arguments)


def test_noise_refuses_unknown_distributions_and_dtypes():
    with pytest.raises(ValueError, match=r"dist='normal': expected one of 'gaussian', 'rademacher'"):
        noise(1, 0, 4, dist="normal")
    with pytest.raises(
        TypeError, match=r"dtype=torch.int32: noise comes in float32, float64, float16, bfloat16"
    ):
        noise(1, 0, 4, dtype=torch.int32)


def test_numpy_integers_are_integers():
    assert torch.equal(noise(np.uint64(2**63), np.int64(3), np.int32(4)), noise(2**63, 3, 4))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"tensors\[0\] has dtype torch.int64"),
        (torch.zeros(3, dtype=torch.complex64), "dtype torch.complex64"),
        (torch.zeros(3, device="meta"), "meta device"),
        (torch.zeros(3, 3).to_sparse(), "layout torch.sparse_coo"),
        (torch.zeros(3, 1).expand(3, 4), r"share memory \(shape \(3, 4\), strides \(1, 0\)\)"),
        (torch.zeros(10).as_strided((4, 4), (2, 1)), "share memory"),
        ([1.0], r"tensors\[0\] is a list"),
    ],
)
def test_add_noise_refuses_tensors(tensor, message):
    with pytest.raises(TypeError, match=message):
        add_noise_([tensor], [0], [(1, 1.0)])


def test_add_noise_refuses_quantised_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what we refuse
        tensor = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"dtype torch\.qint8"):
        add_noise_([tensor], [0], [(1, 1.0)])


def test_nothing_is_changed_when_a_later_tensor_is_refused():
    good = torch.zeros(4)
    with pytest.raises(TypeError, match=r"tensors\[1\]"):
        add_noise_([good, torch.zeros(3, dtype=torch.int8)], [0, 4], [(1, 1.0)])
    assert not good.any()


def test_add_noise_refuses_arguments_that_do_not_fit():
    tensor = torch.zeros(4)
    with pytest.raises(ValueError, match="1 tensors but 2 starts"):
        add_noise_([tensor], [0, 4], [(1, 1.0)])
    with pytest.raises(ValueError, match="1 tensors but 0 in out"):
        add_noise_([tensor], [0], [(1, 1.0)], out=[])
    with pytest.raises(ValueError, match=r"out\[0\] has shape .*5"):
        add_noise_([tensor], [0], [(1, 1.0)], out=[torch.zeros(5)])
    with pytest.raises(TypeError, match=r"out\[0\] has dtype torch.float64: expected torch.float32"):
        add_noise_([tensor], [0], [(1, 1.0)], out=[torch.zeros(4, dtype=torch.float64)])
    with pytest.raises(ValueError, match="dist='sphere'"):
        add_noise_([tensor], [0], [(1, 1.0)], dist="sphere")
    with pytest.raises(ValueError, match="backend='cpp': expected one of 'auto', 'torch', 'numba', 'triton'"):
        add_noise_([tensor], [0], [(1, 1.0)], backend="cpp")
    assert not tensor.any()


# ---- backends --------------------------------------------------------------------------------------------------------


def test_backends_are_resolved_by_device(monkeypatch):
    modules = {"numba": SimpleNamespace(), "triton": SimpleNamespace(works=lambda: True)}
    monkeypatch.setattr(noise_module, "_load", modules.get)
    assert resolve_backend("auto", "cuda:1") == "triton"
    assert resolve_backend("auto", torch.device("cpu")) == "numba"
    assert resolve_backend("auto", "mps") == "torch"
    assert resolve_backend("torch", "cuda") == "torch"
    modules["triton"].works = lambda: False
    assert resolve_backend("auto", "cuda") == "torch"
    with pytest.raises(MissingBackend, match="backend='numba' works on the CPU, the tensors are on 'cuda'"):
        resolve_backend("numba", "cuda")


def test_missing_libraries_fall_back_or_say_what_to_install(monkeypatch):
    monkeypatch.setattr(noise_module, "_load", lambda name: None)
    assert resolve_backend("auto", "cpu") == resolve_backend("auto", "cuda") == "torch"
    with pytest.raises(ValueError, match=r"pip install 'papercore\[fast\]'"):
        resolve_backend("numba", "cpu")
    with pytest.raises(ValueError, match="pip install triton"):
        resolve_backend("triton", "cuda")
    with pytest.raises(ValueError, match="backend='cuda': expected one of"):
        resolve_backend("cuda", "cpu")
    tensor = torch.zeros(4)
    add_noise_([tensor], [0], [(1, 1.0)])
    assert torch.equal(tensor, noise(1, 0, 4))
