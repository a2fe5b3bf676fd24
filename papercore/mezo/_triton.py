"""The noise inside a Triton kernel: one launch for many CUDA tensors, every number made in the registers that use it.

Same numbers as the torch path, bit for bit: products and sums are kept apart (enable_fp_fusion=False) and the square root
is the correctly rounded one. A program owns `TILES` tiles of one tensor. In a tile each thread runs Philox for a few
counters and keeps the four normal numbers of each, which are neighbours in memory, so loads and stores stay wide; signs
come 128 to a counter, so a warp makes the words once and spreads their bits.

Glossary
    rows      a line per tensor: address of the old values, address of the new ones, start, numel, first program  int64
    owners    the tensor of each program                                                                          int32
    shift     start modulo the numbers of a counter: how far the first counter reaches back before the tensor
    keys      the two halves of a seed                                                                            int32
"""

# A kernel's arguments have no types of Python's.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from papercore.mezo import philox
from papercore.mezo._torch import Item, Term

TILE = {"gaussian": 2048, "rademacher": 4096}
PROGRAMS = 1 << 16  # more tiles than this share programs, so that the table of owners stays small
ALIGNMENT = 16  # bytes of an address, elements of a start and of a size: what wide loads need

M0 = tl.constexpr(philox.MULTIPLIERS[0])
M1 = tl.constexpr(philox.MULTIPLIERS[1])
STEP0 = tl.constexpr(philox.KEY_STEPS[0])
STEP1 = tl.constexpr(philox.KEY_STEPS[1])
GAUSSIAN_STREAM = tl.constexpr(philox.STREAMS["gaussian"])
SIGN_STREAM = tl.constexpr(philox.STREAMS["rademacher"])
SQRT_HALF_BITS = tl.constexpr(philox.SQRT_HALF_BITS)
MINUS_TWO_LN2 = tl.constexpr(philox.MINUS_TWO_LN2)
TWO_TO_MINUS_31 = tl.constexpr(2.0**-31)
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(c) for c in philox.LOG_TERMS)
S0, S1, S2, S3 = (tl.constexpr(c) for c in philox.SINE_TERMS)
C0, C1, C2, C3 = (tl.constexpr(c) for c in philox.COSINE_TERMS)


@triton.jit
def _philox(block, key0, key1, stream: tl.constexpr):
    """The four words of each counter. block: int64 [n]; keys: int32 scalars. Returns four uint32 [n]."""
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.full(block.shape, stream, tl.uint32)
    c3 = tl.full(block.shape, 0, tl.uint32)
    k0 = key0.to(tl.uint32, bitcast=True)
    k1 = key1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        # One wide multiplication instead of two for the halves.
        product0 = c0.to(tl.uint64) * M0
        product1 = c2.to(tl.uint64) * M1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + STEP0
        k1 = k1 + STEP1
    return c0, c1, c2, c3


@triton.jit
def _radius(word):
    """sqrt(-2 ln u), as in philox.py. uint32 -> float32."""
    u = ((word >> 1).to(tl.int32).to(tl.float32) + 0.5) * TWO_TO_MINUS_31
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    series = f * L7
    series = (series + L6) * f
    series = (series + L5) * f
    series = (series + L4) * f
    series = (series + L3) * f
    series = (series + L2) * f
    series = (series + L1) * f
    series = (series + L0) * (f * f) - (f + f)
    return tl.sqrt_rn(series + exponent.to(tl.float32) * MINUS_TWO_LN2)


@triton.jit
def _cosine_sine(word):
    """Cosine and sine of the word's angle, as in philox.py. uint32 -> float32, float32."""
    signed = word.to(tl.int32, bitcast=True)
    x = (signed << 2).to(tl.float32) * TWO_TO_MINUS_31
    y = x * x
    sine = y * S3
    sine = (sine + S2) * y
    sine = (sine + S1) * y
    sine = (sine + S0) * x
    cosine = y * C3
    cosine = (cosine + C2) * y
    cosine = (cosine + C1) * y
    cosine = cosine + C0
    odd = ((signed << 1) >> 31) != 0
    cosine_bits = tl.where(odd, sine, cosine).to(tl.int32, bitcast=True)
    sine_bits = tl.where(odd, cosine, sine).to(tl.int32, bitcast=True)
    # The sign bit alone: shifted down and up again, because its literal would not fit an int32.
    cosine_bits = cosine_bits ^ (((signed ^ (signed << 1)) >> 31) << 31)
    sine_bits = sine_bits ^ ((signed >> 31) << 31)
    return cosine_bits.to(tl.float32, bitcast=True), sine_bits.to(tl.float32, bitcast=True)


@triton.jit
def _in_order(a, b, c, d):
    """a[0] b[0] c[0] d[0] a[1] ...: four [n] -> [4 n]. No data moves: each thread holds all four."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(4 * a.shape[0])


@triton.jit
def _gaussian(block, key0, key1):
    """Four normal numbers for each counter: int64 [n] -> float32 [4 n]."""
    w0, w1, w2, w3 = _philox(block, key0, key1, GAUSSIAN_STREAM)
    r0 = _radius(w0)
    r1 = _radius(w2)
    cosine0, sine0 = _cosine_sine(w1)
    cosine1, sine1 = _cosine_sine(w3)
    return _in_order(r0 * cosine0, r0 * sine0, r1 * cosine1, r1 * sine1)


@triton.jit
def _signs(block, key0, key1):
    """128 signs for each counter: int64 [n] -> float32 [128 n]."""
    w0, w1, w2, w3 = _philox(block, key0, key1, SIGN_STREAM)
    words = _in_order(w0, w1, w2, w3)
    bits = (words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    return tl.where(bits == 0, 1.0, -1.0).reshape(32 * words.shape[0])


@triton.jit
def _noise(block, key0, key1, gaussian: tl.constexpr):
    if gaussian:
        return _gaussian(block, key0, key1)
    else:
        return _signs(block, key0, key1)


@triton.jit(do_not_specialize=["low0", "high0", "low1", "high1", "count"])
def _sum_kernel(
    rows,
    owners,
    low0,  # keys and coefficients of the first and second term
    high0,
    coefficient0,
    low1,
    high1,
    coefficient1,
    scale,
    keys,  # those of any number of terms, in memory: int32 [count, 2], and coefficients [count] followed by the scale
    coefficients,
    count,
    TERMS: tl.constexpr,  # 0, 1 or 2: by value; -1: in memory
    SCALING: tl.constexpr,  # 0: the old values are not read; 1: they are taken as they are; 2: times scale
    GAUSSIAN: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,  # dtype of the sums
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """new <- scale * old + sum of coefficient * z for the tiles of one program."""
    PER_COUNTER: tl.constexpr = 4 if GAUSSIAN else 128
    program = tl.program_id(0)
    row = rows + 5 * tl.load(owners + program).to(tl.int64)
    old = tl.load(row).to(tl.pointer_type(DTYPE))
    new = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    start = tl.load(row + 2)
    numel = tl.load(row + 3)
    shift = start % PER_COUNTER
    if ALIGNED:
        old = tl.multiple_of(old, 16)
        new = tl.multiple_of(new, 16)
        numel = tl.multiple_of(numel, 16)
        shift = tl.multiple_of(shift, 16)
    first_tile = (program - tl.load(row + 4)) * TILES
    for t in range(TILES):
        at = (first_tile + t) * TILE - shift
        if at < numel:
            i = at + tl.arange(0, TILE)
            inside = (i >= 0) & (i < numel)
            block = (start + at) // PER_COUNTER + tl.arange(0, TILE // PER_COUNTER)
            if SCALING == 0:
                x = tl.full([TILE], 0, WIDE)
            else:
                x = tl.load(old + i, mask=inside, other=0).to(WIDE)
            if SCALING == 2:
                if TERMS < 0:
                    x = x * tl.load(coefficients + count)
                else:
                    x = x * scale
            if TERMS >= 1:
                x = x + _noise(block, low0, high0, GAUSSIAN) * coefficient0
            if TERMS >= 2:
                x = x + _noise(block, low1, high1, GAUSSIAN) * coefficient1
            if TERMS < 0:
                for j in range(count):
                    z = _noise(block, tl.load(keys + 2 * j), tl.load(keys + 2 * j + 1), GAUSSIAN)
                    x = x + z.to(WIDE) * tl.load(coefficients + j)
            tl.store(new + i, x.to(DTYPE), mask=inside)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors too (TRITON_INTERPRET=1 at import)."""
    return not isinstance(_sum_kernel, triton.runtime.JITFunction)


@functools.cache
def works() -> bool:
    """Whether a kernel can be compiled and launched here: some versions of Triton want a C compiler for that."""
    if not torch.cuda.is_available():
        return False
    probe = torch.zeros(4, device="cuda")
    try:
        run([(probe, probe, 0)], [(0, 1.0)], 1.0, "rademacher")
    except Exception as error:  # whatever a toolchain raises
        warnings.warn(
            f"Triton is installed but cannot run ({error}): noise on CUDA is made by torch", stacklevel=2
        )
        return False
    return True


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def run(items: list[Item], terms: list[Term], scale: float, dist: str) -> None:
    """target <- scale * source + sum of coefficient * z for every item; all of them lie on one device."""
    device = items[0][0].device
    groups: dict[tuple[torch.dtype, bool], list[tuple[int, int, int, int]]] = {}
    for source, target, start in items:
        row = (source.data_ptr(), target.data_ptr(), start, source.numel())
        groups.setdefault((source.dtype, not any(value % ALIGNMENT for value in row)), []).append(row)
    for (dtype, aligned), rows in groups.items():
        arguments, options = launch(tuple(rows), dtype, aligned, terms, scale, dist, device)
        programs = arguments["owners"].numel()
        if device.type == "cuda":
            with torch.cuda.device(device):
                _sum_kernel[(programs,)](**arguments, **options)
        else:
            _sum_kernel[(programs,)](**arguments, **options)
    # Writing behind torch's back: autograd is told that saved values are stale. Inference tensors keep no count.
    torch.autograd.graph.increment_version([target for _, target, _ in items if not target.is_inference()])


def launch(
    rows: tuple[tuple[int, int, int, int], ...],
    dtype: torch.dtype,
    aligned: bool,
    terms: list[Term],
    scale: float,
    dist: str,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's arguments and the compiler's options for one group of tensors."""
    table, owners, tiles = _tables(rows, dist, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # A Python float reaches the kernel as a float32, so float64 coefficients travel in memory; so do many.
    by_value = len(terms) <= 2 and wide == torch.float32
    (low0, high0, coefficient0), (low1, high1, coefficient1) = (
        [(*_keys(seed), coefficient) for seed, coefficient in terms[:2]] + [(0, 0, 0.0)] * 2
    )[:2]
    keys, coefficients = table, table  # not read
    if not by_value:
        keys = torch.tensor([_keys(seed) for seed, _ in terms] or [(0, 0)], dtype=torch.int32)
        coefficients = torch.tensor([c for _, c in terms] + [scale], dtype=torch.float64).to(wide)
        keys, coefficients = (t.to(device, non_blocking=True) for t in (keys, coefficients))
    arguments = {
        "rows": table,
        "owners": owners,
        "low0": low0,
        "high0": high0,
        "coefficient0": coefficient0,
        "low1": low1,
        "high1": high1,
        "coefficient1": coefficient1,
        "scale": scale,
        "keys": keys,
        "coefficients": coefficients,
        "count": len(terms),
        "TERMS": len(terms) if by_value else -1,
        "SCALING": 0 if scale == 0.0 else 1 if scale == 1.0 else 2,
        "GAUSSIAN": dist == "gaussian",
        "DTYPE": TRITON_DTYPES[dtype],
        "WIDE": TRITON_DTYPES[wide],
        "TILE": TILE[dist],
        "TILES": tiles,
        "ALIGNED": aligned,
    }
    return arguments, {"num_warps": 4, "enable_fp_fusion": False}


def _keys(seed: int) -> tuple[int, int]:
    """The halves of a seed as signed numbers: Triton would compile anew for a value beyond int32."""
    low, high = philox.split_words(seed)
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


@functools.lru_cache(maxsize=16)
def _tables(
    rows: tuple[tuple[int, int, int, int], ...], dist: str, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """rows and owners on the device, and the tiles of a program. Kept, because an optimiser asks for the same each step."""
    tile, period = TILE[dist], philox.PER_BLOCK[dist]
    counts = [-(-(start % period + numel) // tile) for _, _, start, numel in rows]
    tiles = 1
    while sum(counts) > PROGRAMS * tiles:
        tiles *= 4
    programs = torch.tensor([-(-count // tiles) for count in counts])
    first = programs.cumsum(0) - programs
    table = torch.cat((torch.tensor(rows), first.view(-1, 1)), dim=1)
    owners = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), programs)
    return table.to(device, non_blocking=True), owners.to(device, non_blocking=True), tiles
