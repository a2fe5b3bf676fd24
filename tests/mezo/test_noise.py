"""The counter-based noise: known answers, an independent Philox, invariances, statistics, refusals."""

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
from scipy import stats

from papercore.mezo import _torch, philox
from papercore.mezo.noise import MissingBackend, add_noise_, noise, resolve_backend

# The package exports the function of the same name.
noise_module = importlib.import_module("papercore.mezo.noise")
DISTS = ["gaussian", "rademacher"]
SEEDS = st.integers(0, 2**64 - 1)


# Multipliers of words 0 and 2, steps of the key, by word width (Philox paper, table 2 and section 3.3).
CONSTANTS = {
    32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
    64: ((0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)),
}


def philox_in_python(counter: list[int], key: list[int], width: int = 32) -> list[int]:
    """The rounds with Python's whole numbers: shares nothing with the package."""
    multipliers, steps = CONSTANTS[width]
    modulus = 1 << width
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * multipliers[0], c[2] * multipliers[1]
        c = [(b >> width) ^ c[1] ^ k[0], b % modulus, (a >> width) ^ c[3] ^ k[1], a % modulus]
        k = [(k[0] + steps[0]) % modulus, (k[1] + steps[1]) % modulus]
    return c


def words_in_python(seed: int, block: int, stream: int) -> list[int]:
    return philox_in_python([block % 2**32, block >> 32, stream, 0], [seed % 2**32, seed >> 32])


def gaussian_in_python(seed: int, index: int) -> float:
    """One number by Box-Muller in double precision with the library's functions."""
    words = words_in_python(seed, index // 4, 0)
    radius_word, angle_word = words[index % 4 // 2 * 2], words[index % 4 // 2 * 2 + 1]
    u = ((radius_word >> 1) + 0.5) / 2**31
    place = (angle_word << 2) % 2**32
    place -= 2**32 if place >= 2**31 else 0
    angle = (angle_word >> 30) * math.pi / 2 + place / 2**32 * math.pi / 2
    return math.sqrt(-2 * math.log(u)) * (math.sin(angle) if index % 2 else math.cos(angle))


def sign_in_python(seed: int, index: int) -> float:
    word = words_in_python(seed, index // 128, 1)[index % 128 // 32]
    return 1.0 - 2.0 * (word >> index % 32 & 1)


# ---- Philox ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = philox.philox4x32(torch.tensor(counter).view(4, 1), key).view(-1).tolist()
    assert " ".join(f"{word:08x}" for word in words) == answer
    assert words == philox_in_python(list(counter), list(key))


def test_philox_agrees_with_plain_python_on_random_counters():
    draw = random.Random(0)
    counters = [[draw.getrandbits(32) for _ in range(4)] for _ in range(50)]
    key = (draw.getrandbits(32), draw.getrandbits(32))
    before = torch.tensor(counters).T.contiguous()
    words = philox.philox4x32(before, key)
    assert words.T.tolist() == [philox_in_python(counter, list(key)) for counter in counters]
    assert before.T.tolist() == counters


def test_the_python_philox_is_numpys_philox_at_64_bits():
    """numpy has the wide variant only: the same rounds, which ties the independent implementation to a third one."""
    # numpy adds one to the counter before it makes its first block.
    theirs = np.random.Philox(counter=[0, 2, 3, 4], key=[5, 6]).random_raw(4)
    assert [int(word) for word in theirs] == philox_in_python([1, 2, 3, 4], [5, 6], width=64)


# ---- what a number is ------------------------------------------------------------------------------------------------


@given(seed=SEEDS, index=st.integers(0, 2**63 - 2))
@settings(max_examples=60, deadline=None)
def test_each_number_is_the_stated_function_of_seed_and_index(seed, index):
    # Sine and cosine are good to about 1e-7, the radius is at most 6.66.
    assert float(noise(seed, index, 1)) == pytest.approx(gaussian_in_python(seed, index), rel=5e-7, abs=1e-6)
    assert float(noise(seed, index, 1, dist="rademacher")) == sign_in_python(seed, index)


def test_gaussian_numbers_are_within_4_ulp_of_double_precision():
    blocks = 50_000
    words = philox.philox4x32(
        torch.stack((torch.arange(blocks), *torch.zeros(3, blocks, dtype=torch.int64))), (9, 0)
    )
    radius_words, angle_words = words[0::2].T.reshape(-1), words[1::2].T.reshape(-1)
    # u itself is a float32 number; the error counted here is that of what is made of it.
    u = ((radius_words >> 1).float() + 0.5).double() / 2**31
    radius = torch.sqrt(-2 * torch.log(u))
    place = ((angle_words << 34) >> 32).double() / 2**32
    angle = ((angle_words >> 30).double() + place) * (math.pi / 2)
    exact = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), 1).view(-1)
    z = noise(9, 0, 4 * blocks).double()
    error = (z - exact).abs()
    # A cosine near its zero crossing keeps an absolute error, so the unit there is that of the radius.
    of_radius = torch.exp2(torch.floor(torch.log2(radius.repeat_interleave(2)))) * 2**-23
    assert float((error / of_radius).max()) < 4
    assert float((error / exact.abs()).mean()) < 2**-23


def test_extreme_words_give_finite_numbers():
    words = torch.tensor([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]).to(torch.int32)
    radius = philox._radius(words)
    assert float(radius[0]) == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)  # u = 2^-32, the smallest
    assert float(radius[-1]) == 0.0  # u rounds to 1
    assert bool(torch.isfinite(radius).all())
    cosine, sine = philox._cosine_sine(words)
    assert torch.allclose(cosine.square() + sine.square(), torch.ones(len(words)), atol=2e-7)


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
    monkeypatch.setattr(_torch, "CHUNK", dict.fromkeys(DISTS, chunk))
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


# ---- statistics: the seeds are fixed, so each holds for ever or never; limits are 4 to 5 standard errors --------------


def test_gaussian_moments_and_distribution():
    n = 1 << 20
    z = noise(2024, 0, n).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 4 * math.sqrt(variance / n), power
    assert stats.kstest(z[:200_000].numpy(), "norm").pvalue > 0.01
    for bound in (3.0, 4.0, 4.5):
        expected = n * 2 * stats.norm.sf(bound)
        assert abs(int((z.abs() > bound).sum()) - expected) < 5 * math.sqrt(expected) + 1
    # The numbers of one block come in pairs from the same words: they and their squares are uncorrelated.
    blocks = z.view(-1, 4).T.numpy()
    for sample in (blocks, blocks**2):
        assert np.abs(np.corrcoef(sample) - np.eye(4)).max() < 5 / math.sqrt(n / 4)


def test_rademacher_moments():
    n = 1 << 20
    z = noise(2024, 0, n, dist="rademacher")
    assert z.unique().tolist() == [-1.0, 1.0]
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    # Each of the 128 bits of a block is fair.
    assert float(z.view(-1, 128).mean(0).abs().max()) < 4.5 / math.sqrt(n / 128)


@pytest.mark.parametrize("dist", DISTS)
def test_autocorrelation(dist):
    n = 1 << 18
    z = noise(31, 0, n, dist=dist)
    for lag in (1, 2, 3, 4, 32, 64, 128, 512, 2048):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 4 / math.sqrt(n - lag), lag


@pytest.mark.parametrize("dist", DISTS)
def test_seeds_are_unrelated(dist):
    n = 1 << 16
    seeds = [0, 1, 2, 3, 1 << 31, 1 << 32, (1 << 32) + 1, (1 << 64) - 1]
    z = torch.stack([noise(seed, 0, n, dist=dist) for seed in seeds])
    correlations = z @ z.T / n
    assert float((correlations - torch.diag(correlations.diag())).abs().max()) < 4.5 / math.sqrt(n)


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
    small, large = torch.zeros(1 << 20, dtype=dtype), torch.zeros(1 << 22, dtype=dtype)
    terms = [(1, 0.1), (2, 0.2)]
    peaks = [
        peak_bytes(lambda t=t: add_noise_([t], [3], terms, dist=dist, backend="torch"))
        for t in (small, large)
    ]
    assert 0 < peaks[0] <= 8 * 2**20
    assert peaks[1] <= 1.01 * peaks[0]
    strided = torch.zeros(1 << 11, 1 << 11, dtype=dtype).T
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
