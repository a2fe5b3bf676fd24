"""The noise on the CPU by numba: loops that LLVM turns into vector instructions, one compiled call for many tensors.

Same numbers as philox.py, bit for bit. Work goes in runs of counters whose scratch stays in the first-level cache. The
steps from words to numbers are separate short loops over scratch arrays, without calls, without branches and with every
constant of the right width: each of the three would stop the compiler from using vectors.

Glossary
    table     one row per tensor: address of the old values, address of the new ones, start, numel    int64 [tensors, 4]
    joined    two words in one: word 0 below word 2 (radii), word 1 below word 3 (angles)             uint64
    run       COUNTERS counters: 2,048 Gaussian numbers, or SIGN_COUNTERS: 4,096 signs
    offset    local index of a run's first number in its tensor, negative where the run starts before it

Multiplications and additions are rounded one by one: numba fuses them only under fastmath, which is off.
"""

# Compiled functions take their types from their arguments, and an intrinsic is called without its first one.
# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"

from __future__ import annotations

import importlib
import sys
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from papercore.mezo import philox

if getattr(numba.config, "DISABLE_JIT", 0) or sys.byteorder != "little":
    raise ImportError("these loops need numba's compiler (NUMBA_DISABLE_JIT is set?) and little-endian words")

COUNTERS = 512
SIGN_COUNTERS = 32

ir = importlib.import_module("llvmlite.ir")  # numba's own library, which has no type information
U64 = np.uint64
LOW = U64(philox.LOW_WORD)
WORD = U64(32)
M0, M1 = (U64(m) for m in philox.MULTIPLIERS)
STEP0, STEP1 = (U64(k) for k in philox.KEY_STEPS)
SIGN_STREAM = U64(philox.STREAMS["rademacher"])
GAUSSIAN_STREAM = U64(philox.STREAMS["gaussian"])
F32, I32, U32 = np.float32, np.int32, np.uint32
L0, L1, L2, L3, L4, L5, L6, L7 = (F32(c) for c in philox.LOG_TERMS)
S0, S1, S2, S3 = (F32(c) for c in philox.SINE_TERMS)
C0, C1, C2, C3 = (F32(c) for c in philox.COSINE_TERMS)
MINUS_TWO_LN2 = F32(philox.MINUS_TWO_LN2)
SQRT_HALF_BITS = I32(philox.SQRT_HALF_BITS)
SIGN_BIT = I32(-(2**31))
HALF, ONE, TWO_TO_MINUS_31 = F32(0.5), F32(1.0), F32(2.0**-31)


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """The address as a pointer that carray takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic
def _float(typing_context: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@intrinsic
def _add_word(typing_context: Any, address: Any, c: Any, word: Any) -> Any:
    """Adds c, or -c where the word has a 1, to the 32 numbers at an address.

    Spelt out with vectors, because whether the compiler finds them in a loop over the bits is a matter of luck.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        at, plus, bits = arguments
        numbers = ir.VectorType(plus.type, 32)
        pointer = builder.inttoptr(at, numbers.as_pointer())
        element = signature.args[1].bitwidth // 8
        no_vector = ir.Constant(numbers, ir.Undefined)
        every = ir.Constant(ir.VectorType(ir.IntType(32), 32), [0] * 32)

        def repeated(value: Any) -> Any:
            first = builder.insert_element(no_vector, value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(first, no_vector, every)

        is_minus = builder.bitcast(bits, ir.VectorType(ir.IntType(1), 32))
        change = builder.select(is_minus, repeated(builder.fneg(plus)), repeated(plus))
        builder.store(builder.fadd(builder.load(pointer, align=element), change), pointer, align=element)

    return types.void(types.int64, c, types.uint32), generate


@numba.njit
def _philox(seed, first, count, stream, even, odd):
    """Blocks first .. first + count - 1: words (0, 2) joined in even[:count], words (1, 3) in odd[:count].

    Ten rounds are one long chain of waiting, so two blocks half a run apart go side by side (c and d): a quarter less time.
    An odd count makes one block more than asked, which the scratch has room for.
    """
    key0 = seed & LOW
    key1 = seed >> WORD
    half = (count + 1) >> 1
    for j in range(half):
        block = first + U64(j)
        c0 = block & LOW
        c1 = block >> WORD
        c2 = stream
        c3 = U64(0)
        block += U64(half)
        d0 = block & LOW
        d1 = block >> WORD
        d2 = stream
        d3 = U64(0)
        k0 = key0
        k1 = key1
        for _ in range(10):
            # Factors below 2^32 in 64-bit lanes: one vector instruction gives the whole product.
            p0 = c0 * M0
            q0 = d0 * M0
            p1 = c2 * M1
            q1 = d2 * M1
            c0 = (p1 >> WORD) ^ c1 ^ k0
            d0 = (q1 >> WORD) ^ d1 ^ k0
            c1 = p1 & LOW
            d1 = q1 & LOW
            c2 = (p0 >> WORD) ^ c3 ^ k1
            d2 = (q0 >> WORD) ^ d3 ^ k1
            c3 = p0 & LOW
            d3 = q0 & LOW
            k0 = (k0 + STEP0) & LOW
            k1 = (k1 + STEP1) & LOW
        even[j] = c0 | (c2 << WORD)
        odd[j] = c1 | (c3 << WORD)
        even[half + j] = d0 | (d2 << WORD)
        odd[half + j] = d1 | (d3 << WORD)


@numba.njit
def _box_muller(count, even, odd, radius, z):
    """Four numbers for each of `count` blocks: joined words -> z[: 4 * count]. radius: scratch, 2 * COUNTERS."""
    radius_words = even.view(np.int32)
    angle_words = odd.view(np.int32)
    for i in range(2 * count):
        word = radius_words[i]
        u = (F32(I32((word >> 1) & 0x7FFFFFFF)) + HALF) * TWO_TO_MINUS_31
        bits = _bits(u)
        exponent = I32(I32(bits - SQRT_HALF_BITS) >> 23)
        f = _float(I32(bits - (exponent << 23))) - ONE
        series = f * L7
        series = (series + L6) * f
        series = (series + L5) * f
        series = (series + L4) * f
        series = (series + L3) * f
        series = (series + L2) * f
        series = (series + L1) * f
        series = (series + L0) * (f * f) - (f + f)
        radius[i] = np.sqrt(series + F32(exponent) * MINUS_TWO_LN2)
    for i in range(2 * count):
        word = angle_words[i]
        x = F32(I32(word << 2)) * TWO_TO_MINUS_31
        y = x * x
        sine = y * S3
        cosine = y * C3
        sine = (sine + S2) * y
        cosine = (cosine + C2) * y
        sine = (sine + S1) * y
        cosine = (cosine + C1) * y
        sine_bits = _bits((sine + S0) * x)
        cosine_bits = _bits(cosine + C0)
        # numba computes with 64 bits unless every result is cut at once, and then half of each vector is wasted.
        doubled = I32(word << 1)
        difference = I32(I32(sine_bits ^ cosine_bits) & I32(doubled >> 31))
        cosine_bits = I32(I32(cosine_bits ^ difference) ^ I32(I32(word ^ doubled) & SIGN_BIT))
        sine_bits = I32(I32(sine_bits ^ difference) ^ I32(word & SIGN_BIT))
        z[2 * i] = radius[i] * _float(cosine_bits)
        z[2 * i + 1] = radius[i] * _float(sine_bits)


@numba.njit
def _array(table, row, column, like):
    """A row's old (column 0) or new (column 1) values."""
    return numba.carray(_pointer(table[row, column]), (table[row, 3],), like.dtype)


@numba.njit
def _copy(into, values):
    for i in range(len(into)):
        into[i] = values[i]


@numba.njit
def _scale(x, scale):
    for i in range(len(x)):
        x[i] = scale * x[i]


@numba.njit
def _start(x, old, scale):
    """x <- scale * old, x and old being the same memory or disjoint.

    The copy comes before the product and not with it: a loop over two names of the same memory would run without vectors.
    A factor of 0 means that the old value is not read.
    """
    if scale == 0:
        x[:] = 0
    else:
        if x.ctypes.data != old.ctypes.data:
            _copy(x, old)
        if scale != 1:
            _scale(x, scale)


@numba.njit
def _add(x, c, z):
    for i in range(len(x)):
        x[i] += c * z[i]


@numba.njit
def _add_signs(x, c, words):
    """x <- x + c * signs, as many whole words as x holds."""
    for w in range(len(x) >> 5):
        _add_word(x.ctypes.data + 32 * w * x.itemsize, c, words[w])


def _gaussian_pass(table, like, seeds, coefficients, scale):
    """new <- scale * old + sum of coefficients * z, tensor by tensor. like: an empty array of the tensors' dtype."""
    even = np.empty(COUNTERS, np.uint64)
    odd = np.empty(COUNTERS, np.uint64)
    radius = np.empty(2 * COUNTERS, np.float32)
    z = np.empty(4 * COUNTERS, np.float32)
    for row in range(len(table)):
        old, new = _array(table, row, 0, like), _array(table, row, 1, like)
        block = table[row, 2] >> 2
        offset = -(table[row, 2] & 3)
        while offset < len(new):
            low, high = max(offset, 0), min(offset + 4 * COUNTERS, len(new))
            count = (high - offset + 3) >> 2
            x = new[low:high]
            _start(x, old[low:high], scale)
            for t in range(len(seeds)):
                _philox(seeds[t], U64(block), count, GAUSSIAN_STREAM, even, odd)
                _box_muller(count, even, odd, radius, z)
                _add(x, coefficients[t], z[low - offset :])
            block += COUNTERS
            offset += 4 * COUNTERS


def _sign_pass(table, like, seeds, coefficients, scale):
    """The same for signs. Numbers that do not fill whole blocks are summed in scratch that does."""
    even = np.empty(SIGN_COUNTERS, np.uint64)
    odd = np.empty(SIGN_COUNTERS, np.uint64)
    words = np.empty(4 * SIGN_COUNTERS, np.uint32)
    scratch = np.zeros(128 * SIGN_COUNTERS, like.dtype)
    for row in range(len(table)):
        old, new = _array(table, row, 0, like), _array(table, row, 1, like)
        block = table[row, 2] >> 7
        offset = -(table[row, 2] & 127)
        while offset < len(new):
            low, high = max(offset, 0), min(offset + 128 * SIGN_COUNTERS, len(new))
            count = (high - offset + 127) >> 7
            x = new[low:high]
            _start(x, old[low:high], scale)
            whole = len(x) == 128 * count
            if not whole:
                _copy(scratch[low - offset : high - offset], x)
            sums = x if whole else scratch[: 128 * count]
            for t in range(len(seeds)):
                _philox(seeds[t], U64(block), count, SIGN_STREAM, even, odd)
                for j in range(count):
                    words[4 * j] = U32(even[j] & LOW)
                    words[4 * j + 1] = U32(odd[j] & LOW)
                    words[4 * j + 2] = U32(even[j] >> WORD)
                    words[4 * j + 3] = U32(odd[j] >> WORD)
                _add_signs(sums, coefficients[t], words)
            if not whole:
                _copy(x, scratch[low - offset : high - offset])
            block += SIGN_COUNTERS
            offset += 128 * SIGN_COUNTERS


PASSES = {"gaussian": _gaussian_pass, "rademacher": _sign_pass}
