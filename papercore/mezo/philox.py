"""Philox4x32-10 and the numbers made of its words, in plain torch: the reference of all backends.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A counter and a key go in, four 32-bit words come
out, and nothing is remembered between calls: the noise at index i can be made anywhere, alone, in any order.

Glossary
    key       the 64-bit seed, low word first                                   two uint32
    counter   (block, low word; block, high word; stream; 0)                    four uint32
    block     i // 4 for Gaussian noise, i // 128 for Rademacher noise, i the index of the number in the whole model
    stream    0 Gaussian, 1 Rademacher: the two never share a counter
    words     w0 w1 w2 w3, Philox's output                                      int64 tensors that hold uint32 values
    u         uniform number in (0, 1] made of 31 bits of a word
    turn      angle: a quadrant (2 bits) and a place in it (30 bits), in quarter turns from its middle, in [-1/2, 1/2)
    radius    sqrt(-2 ln u)

Gaussian numbers come from Box-Muller: (w0, w1) give numbers 4b and 4b + 1, (w2, w3) give 4b + 2 and 4b + 3. Logarithm, sine
and cosine are short polynomials in float32, made of multiplications, additions and square roots that are each rounded on
their own. Such a chain has one right answer, so every device, thread count and slice gives the same bits; library
logarithms differ in the last bit even between the body and the tail of one vectorised loop. Bit j of word k of a
Rademacher block decides the sign of number 32k + j: 1 means minus.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
STREAMS = {"gaussian": 0, "rademacher": 1}
PER_BLOCK = {"gaussian": 4, "rademacher": 128}
LOW_WORD = 0xFFFFFFFF

# -2 ln(1 + f) = -2 f + f^2 Q(f) on sqrt(1/2) <= 1 + f < sqrt(2): relative error 3.5e-8. Constant term first.
LOG_TERMS = (
    0.9999998211860657,
    -0.6666790246963501,
    0.5000351071357727,
    -0.39924144744873047,
    0.33141016960144043,
    -0.2983594834804535,
    0.2861504554748535,
    -0.1746968924999237,
)
# The bits of float32 sqrt(1/2): subtracting them before the shift rounds the exponent so that the mantissa is centred on 1.
SQRT_HALF_BITS = 0x3F3504F3
MINUS_TWO_LN2 = -1.3862943649291992
# sin(x pi/4) = x S(x^2) (relative error 3e-9) and cos(x pi/4) = C(x^2) (error 4e-8) on -1 <= x <= 1.
SINE_TERMS = (0.7853981852531433, -0.08074543625116348, 0.00249000103212893, -3.59504520019982e-05)
COSINE_TERMS = (1.0, -0.3084244132041931, 0.01585020124912262, -0.00031902003684081137)


def split_words(value: int) -> tuple[int, int]:
    """The low and the high 32-bit word of a 64-bit number."""
    return value & LOW_WORD, (value >> 32) & LOW_WORD


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds of Philox4x32 (Salmon et al., section 3.3, figure 4).

    counter: int64 [4, n] with values in [0, 2^32), left unchanged; key: two numbers in [0, 2^32).
    Returns int64 [4, n], values in [0, 2^32). Scratch memory: 8 numbers per counter.

    >>> [f"{int(w):08x}" for w in philox4x32(torch.zeros(4, 1, dtype=torch.int64), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    multiplied, passed = _philox_rounds(counter[0::2].clone(), counter[1::2].clone(), key)
    words = torch.stack((multiplied[0], passed[0], multiplied[1], passed[1]))
    return words.bitwise_and_(LOW_WORD)


def _philox_rounds(multiplied: Tensor, passed: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rounds, in place. multiplied: words 0 and 2 [2, n]; passed: words 1 and 3 [2, n]. Both are overwritten.

    Returned: words 0 and 2, exact; words 1 and 3 with whatever stands above their 32 low bits.
    """
    # A round exchanges the roles of the two words. The rows stay where they are and the constants take turns instead:
    # row 0 holds word 2 after the first round, word 0 after the second.
    keys = [
        [(key[j] + r * KEY_STEPS[j]) & LOW_WORD for j in ((1, 0) if r % 2 == 0 else (0, 1))]
        for r in range(ROUNDS)
    ]
    columns = [list(MULTIPLIERS), list(MULTIPLIERS[::-1]), [LOW_WORD, 32], *keys]
    # Small counters are dominated by the cost of a call, so constants and views are made once, outside the loop.
    constants = torch.tensor(columns, dtype=torch.int64).to(multiplied.device)
    low_word, bits_of_a_word = constants[2].unbind()
    columns_of = constants.unsqueeze(2).unbind(0)
    multiplier_columns, key_columns = columns_of[:2], columns_of[3:]
    product = torch.empty_like(multiplied)
    row_0, row_1 = multiplied
    rows_passed, rows_product = passed.unbind(0), product.unbind(0)
    # A 64-bit product wraps in int64 without harm: its bits are those of the unsigned product.
    for r in range(ROUNDS):
        torch.mul(multiplied, multiplier_columns[r % 2], out=product)
        torch.bitwise_right_shift(product, bits_of_a_word, out=multiplied)
        row_0.bitwise_xor_(rows_passed[1])
        row_1.bitwise_xor_(rows_passed[0])
        multiplied.bitwise_xor_(key_columns[r])
        # Everything above the low word goes at once: the sign bits of the shift and the high words in `passed`,
        # which is the whole product because only its low word is ever used.
        multiplied.bitwise_and_(low_word)
        passed, product = product, passed
        rows_passed, rows_product = rows_product, rows_passed
    return multiplied, passed


def _block_words(
    seed: int, first: int, count: int, stream: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Words (0, 2) [2, count] and words (1, 3) [2, count] of `count` blocks from block `first` on."""
    block = torch.arange(first, first + count, dtype=torch.int64, device=device)
    multiplied = torch.empty(2, count, dtype=torch.int64, device=device)
    passed = torch.zeros(2, count, dtype=torch.int64, device=device)
    torch.bitwise_and(block, LOW_WORD, out=multiplied[0])
    multiplied[1] = stream
    torch.bitwise_right_shift(block, 32, out=passed[0])
    return _philox_rounds(multiplied, passed, split_words(seed))


def _join(low: Tensor, high: Tensor) -> Tensor:
    """Two words in one: 32 bits of `low` below 32 bits of `high`. int64 [n], int64 [n] -> int64 [n]."""
    return (high << 32).bitwise_or_(low & LOW_WORD)


def _halves(joined: Tensor) -> Tensor:
    """The low and the high words in turn, as joined. int64 [n] -> int32 [2n]."""
    halves = joined.view(torch.int32)
    return halves if sys.byteorder == "little" else halves.view(-1, 2).flip(1).reshape(-1)


def gaussian_blocks(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Standard normal numbers 4 first .. 4 (first + count) - 1 of a seed. Returns float32 [4 count]."""
    multiplied, passed = _block_words(seed, first, count, STREAMS["gaussian"], device)
    radius = _radius(_halves(_join(multiplied[0], multiplied[1])))
    cosine, sine = _cosine_sine(_halves(_join(passed[0], passed[1])))
    pairs = torch.empty(2 * count, 2, dtype=torch.float32, device=device)
    torch.mul(radius, cosine, out=pairs[:, 0])
    torch.mul(radius, sine, out=pairs[:, 1])
    return pairs.view(-1)


def _radius(words: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = (31 high bits + 1/2) / 2^31, never 0: at most sqrt(64 ln 2) = 6.66. int32 [m] -> float32 [m]."""
    u = (words >> 1).bitwise_and_(0x7FFFFFFF).to(torch.float32)
    u.add_(0.5).mul_(2.0**-31)
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS).bitwise_right_shift_(23)
    bits -= exponent << 23
    f = u.sub_(1.0)
    series = f * LOG_TERMS[-1]
    for term in LOG_TERMS[-2:0:-1]:
        series.add_(term).mul_(f)
    series.add_(LOG_TERMS[0])
    series.mul_(f * f).sub_(f.add_(f))
    series += exponent.to(torch.float32).mul_(MINUS_TWO_LN2)
    # torch.sqrt is not correctly rounded on every CPU (one result in seven was seen an ulp off). In double precision
    # an ulp is too little to move a float32's root across the middle between two float32 numbers.
    return series.to(torch.float64).sqrt_().to(torch.float32)


def _cosine_sine(words: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle that a word stands for. int32 [m] -> float32 [m], float32 [m]."""
    x = (words << 2).to(torch.float32).mul_(2.0**-31)
    y = x * x
    sine = y * SINE_TERMS[3]
    cosine = y * COSINE_TERMS[3]
    for j in (2, 1):
        sine.add_(SINE_TERMS[j]).mul_(y)
        cosine.add_(COSINE_TERMS[j]).mul_(y)
    sine.add_(SINE_TERMS[0]).mul_(x)
    cosine.add_(COSINE_TERMS[0])
    # Quadrant q adds q quarter turns: odd q exchanges the two; the cosine is negative in 1 and 2, the sine in 2 and 3.
    # On the bits, because torch.where costs five times as much.
    sine_bits, cosine_bits = sine.view(torch.int32), cosine.view(torch.int32)
    if_odd = (words << 1).bitwise_right_shift_(31)
    difference = (sine_bits ^ cosine_bits).bitwise_and_(if_odd)
    cosine_sign = (words ^ (words << 1)).bitwise_and_(-(2**31))
    cosine_bits.bitwise_xor_(difference).bitwise_xor_(cosine_sign)
    sine_bits.bitwise_xor_(difference).bitwise_xor_(words & -(2**31))
    return cosine, sine


def sign_bits(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """The sign of each number of `count` blocks as the top bit of a word, all other bits 0. Returns int32 [128 count]."""
    multiplied, passed = _block_words(seed, first, count, STREAMS["rademacher"], device)
    words = torch.empty(count, 2, dtype=torch.int64, device=device)
    for pair in (0, 1):
        torch.bitwise_or(passed[pair] << 32, multiplied[pair], out=words[:, pair])
    # Bit j goes up to the top.
    places = torch.arange(31, -1, -1, dtype=torch.int32, device=device)
    return (_halves(words.view(-1)).view(-1, 1) << places).bitwise_and_(-(2**31)).view(-1)
