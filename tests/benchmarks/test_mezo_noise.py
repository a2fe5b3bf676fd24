"""How long a pass of noise over the weights takes, as ratios to a bare read-and-write pass (mul_) and to torch's own
generator (normal_).

    python tests/benchmarks/test_mezo_noise.py                  the table
    pytest tests/benchmarks/test_mezo_noise.py                  the table, with the targets as tests

One thread, one flat array of 5.8 million float32 numbers, in place; and 100 tensors of 256 numbers. In every round each
candidate runs between two timings of the yardsticks, so that what else the machine does hits both; CPU time, not wall
time. Reported: medians over the rounds.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from papercore.mezo import add_noise_

NUMEL = 5_800_000
SMALL, SMALL_COUNT = 256, 100
ROUNDS = int(os.environ.get("PAPERCORE_BENCH_ROUNDS", "15"))
Pass = Callable[[torch.Tensor], object]


def ours(dist: str, backend: str, terms: int) -> Pass:
    pairs = [(seed, 1e-9) for seed in range(terms)]
    return lambda x: add_noise_([x], [0], pairs, dist=dist, backend=backend)


def normal_then_add(x: torch.Tensor) -> None:
    """Noise as a reseeded generator makes it, a chunk at a time."""
    generator = torch.Generator().manual_seed(0)
    z = torch.empty(1 << 18)
    for part in x.split(len(z)):
        part.add_(z[: len(part)].normal_(generator=generator), alpha=1e-9)


@dataclass(frozen=True)
class Candidate:
    name: str
    run: Pass
    needs: str = "torch"
    to_mul: float | None = None  # highest ratio to mul_
    to_normal: float | None = None  # highest ratio to normal_


CANDIDATES = [
    Candidate("rademacher, numba, 1 term", ours("rademacher", "numba", 1), "numba", to_mul=2.0),
    Candidate("rademacher, numba, 2 terms", ours("rademacher", "numba", 2), "numba", to_mul=3.0),
    Candidate("gaussian, numba, 1 term", ours("gaussian", "numba", 1), "numba", to_normal=0.5),
    Candidate("gaussian, numba, 2 terms", ours("gaussian", "numba", 2), "numba", to_normal=1.0),
    Candidate("rademacher, torch, 1 term", ours("rademacher", "torch", 1), to_normal=0.5),
    Candidate("rademacher, torch, 2 terms", ours("rademacher", "torch", 2), to_normal=1.0),
    Candidate("gaussian, torch, 1 term", ours("gaussian", "torch", 1)),
    Candidate("normal_ and add_, by chunks", normal_then_add),
]


@dataclass
class Row:
    """Medians. ns: nanoseconds a number; the ratios are to one mul_ and to one normal_ over the same array."""

    name: str
    ns: float
    to_mul: float
    to_normal: float


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(rounds: int = ROUNDS) -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
        z, generator = torch.empty(NUMEL), torch.Generator()
        yardsticks: list[Callable[[], object]] = [
            lambda: x.mul_(1.0000001),
            lambda: z.normal_(generator=generator),
        ]
        present = [c for c in CANDIDATES if importlib.util.find_spec(c.needs)]
        for run in (*yardsticks, *(lambda c=c: c.run(x) for c in present)):
            run()  # compilation, first touch of the memory
        samples: list[list[tuple[float, float, float]]] = [[] for _ in present]
        for number in range(rounds):
            for i in [(j + number) % len(present) for j in range(len(present))]:
                mul, normal = (cpu_seconds(y) for y in yardsticks)
                taken = cpu_seconds(lambda c=present[i]: c.run(x))
                mul_after, normal_after = (cpu_seconds(y) for y in yardsticks)
                samples[i].append((taken, 2 * taken / (mul + mul_after), 2 * taken / (normal + normal_after)))
        rows = []
        for candidate, values in zip(present, samples, strict=True):
            taken, to_mul, to_normal = (statistics.median(column) for column in zip(*values, strict=True))
            rows.append(Row(candidate.name, taken / NUMEL * 1e9, to_mul, to_normal))
        return rows
    finally:
        torch.set_num_threads(threads)


def microseconds_for_a_small_tensor(backend: str, dist: str) -> float:
    """One call over 100 tensors of 256 numbers, divided by 100: the best of 50."""
    tensors = [torch.nn.Parameter(torch.zeros(SMALL)) for _ in range(SMALL_COUNT)]
    starts = [SMALL * i for i in range(SMALL_COUNT)]

    def call() -> None:
        add_noise_(tensors, starts, [(1, 1e-3)], dist=dist, backend=backend)

    call()
    return min(cpu_seconds(call) for _ in range(50)) / SMALL_COUNT * 1e6


def table(rows: list[Row]) -> str:
    lines = [f"{'pass':32} {'ns a number':>12} {'x mul_':>8} {'x normal_':>10}"]
    lines += [f"{row.name:32} {row.ns:12.3f} {row.to_mul:8.2f} {row.to_normal:10.2f}" for row in rows]
    return "\n".join(lines)


# ---- as tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    measured = measure()
    print("\n" + table(measured))
    return {row.name: row for row in measured}


@pytest.mark.parametrize(
    "candidate", [c for c in CANDIDATES if c.to_mul or c.to_normal], ids=lambda c: c.name
)
def test_a_pass_reaches_its_target(rows: dict[str, Row], candidate: Candidate) -> None:
    if candidate.name not in rows:
        pytest.skip(f"needs {candidate.needs}")
    row = rows[candidate.name]
    assert candidate.to_mul is None or row.to_mul <= candidate.to_mul, row
    assert candidate.to_normal is None or row.to_normal <= candidate.to_normal, row


@pytest.mark.parametrize("dist", ["rademacher", "gaussian"])
@pytest.mark.parametrize(("backend", "limit"), [("numba", 10.0), ("torch", 50.0)])
def test_a_small_tensor_costs_microseconds(backend: str, limit: float, dist: str) -> None:
    if not importlib.util.find_spec(backend):
        pytest.skip(f"needs {backend}")
    taken = microseconds_for_a_small_tensor(backend, dist)
    print(f"\n{dist}, {backend}: {taken:.1f} microseconds for a tensor of {SMALL} numbers")
    assert taken <= limit


if __name__ == "__main__":
    print(table(measure()))
