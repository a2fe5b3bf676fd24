"""One master seed, many directions: the seed of every draw is a function of (master seed, step, draw).

The log of a run can therefore leave the seeds out: it keeps the master seed once and one scalar a draw.

Glossary
    master seed   the `seed` argument of the optimiser                        integer in [0, 2^64)
    draw          number of a direction within its step, 0 <= draw < n
    s             seed of one direction z(s), the paper's s (Algorithm 1)     integer in [0, 2^64)
"""

from __future__ import annotations

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, odd: consecutive multiples spread evenly


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), a bijection of 64-bit integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def draw_seed(master: int, step: int, draw: int = 0) -> int:
    """Seed of direction `draw` of step `step`: mix(mix(master + G (step + 1)) + G (draw + 1)) modulo 2^64.

    `mix` is SplitMix64's finaliser and G = 0x9E3779B97F4A7C15. Both maps are one to one, so the draws of a
    step have seeds of their own, and so have the steps at a fixed draw; any other two coincide with
    probability 2^-64.

    >>> hex(draw_seed(0, 0))
    '0xa706dd2f4d197e6f'
    >>> len({draw_seed(7, step, draw) for step in range(100) for draw in range(8)})
    800
    """
    return _mix((_mix((master + _GOLDEN * (step + 1)) & _MASK) + _GOLDEN * (draw + 1)) & _MASK)
