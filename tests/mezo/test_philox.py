"""What a number of the noise is: Philox against published and independent answers, Box-Muller against double precision,
and the statistics of both distributions."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from papercore.mezo import noise, philox

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
