"""How long an average over two processes takes, as a multiple of LocalOptimizer's, side by side with per-tensor reductions,
torch's PeriodicModelAverager and accelerate's LocalSGD.

    python tests/benchmarks/test_local_sgd_sync.py [OUT.json]        the table, and a file for the book's page
    pytest tests/benchmarks/test_local_sgd_sync.py                   the same with the targets as tests

Two gloo processes on one machine, started with torchrun, one thread each; transformer blocks of 148 tensors, of width 64 (0.7
million float32 parameters, where the count of messages decides) and 256 (10 million, where the bytes do). In every round each
candidate averages once between two averages of LocalOptimizer, so that what else the machine does hits both; wall-clock time from a
barrier to the end, that of the slower rank. Reported: the median of the rounds' ratios and their quartiles.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from papercore.lab.benchmarks import save_benchmark

ROUNDS = int(os.environ.get("PAPERCORE_BENCH_ROUNDS", "25"))
WIDTHS = (64, 256)
Average = Callable[[], object]


def blocks(width: int, layers: int = 12) -> nn.Module:
    """The parameters of a decoder: 12 a block and 4 besides."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Embedding(1024, width), nn.Embedding(64, width), nn.LayerNorm(width)]
    for _ in range(layers):
        parts += [nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)]
        parts += [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]
    return nn.ModuleList(parts)


# ---- candidates: each makes a function that averages a model of its own over the ranks -------------------------------


def ours(model: nn.Module) -> tuple[Average, Average]:
    from papercore.local_sgd import ConstantH, LocalOptimizer

    inner = torch.optim.SGD(model.parameters(), lr=0.0)  # no gradients: its step does nothing
    optimizer = LocalOptimizer(inner, ConstantH(10**6), total_steps=None)
    return optimizer.step, optimizer.sync


def one_vector(model: nn.Module) -> tuple[Average, Average]:
    """The reduction alone: one vector, nothing copied into it or out of it."""
    vector = torch.cat([p.detach().flatten() for p in model.parameters()])
    return (lambda: None), lambda: dist.all_reduce(vector)


def per_tensor(model: nn.Module) -> tuple[Average, Average]:
    params = [p.detach() for p in model.parameters()]

    def average() -> None:
        for p in params:
            dist.all_reduce(p)
            p.div_(dist.get_world_size())

    return (lambda: None), average


def per_tensor_at_once(model: nn.Module) -> tuple[Average, Average]:
    """All reductions posted before the first is waited for."""
    params = [p.detach() for p in model.parameters()]

    def average() -> None:
        for work in [dist.all_reduce(p, async_op=True) for p in params]:
            work.wait()
        for p in params:
            p.div_(dist.get_world_size())

    return (lambda: None), average


def of_torch(model: nn.Module) -> tuple[Average, Average]:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # parameters without a gradient are skipped
    averager = PeriodicModelAverager(period=2)

    def rewind() -> None:
        averager.step = 0

    return rewind, lambda: averager.average_parameters(model.parameters())


def of_accelerate(model: nn.Module) -> tuple[Average, Average]:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    local = LocalSGD(accelerator=accelerator, model=accelerator.prepare(model), local_sgd_steps=1)
    return (lambda: None), local.step


@dataclass(frozen=True)
class Candidate:
    name: str
    make: Callable[[nn.Module], tuple[Average, Average]]
    package: str
    targets: tuple[float, float] | None = None  # lowest multiple of ours at either width


CANDIDATES = [
    Candidate("all_reduce of one vector, no copies", one_vector, "torch"),
    Candidate("all_reduce tensor by tensor", per_tensor, "torch", (2.0, 1.0)),
    Candidate("all_reduce tensor by tensor, all at once", per_tensor_at_once, "torch"),
    Candidate("PeriodicModelAverager", of_torch, "torch"),
    Candidate("accelerate LocalSGD", of_accelerate, "accelerate", (2.0, 1.0)),
]


@dataclass
class Row:
    """One line: median and quartiles of the candidate's time over LocalOptimizer's; medians of both in milliseconds."""

    name: str
    width: int
    tensors: int
    parameters: int
    ratio: float
    low: float
    high: float
    target: float | None
    milliseconds: float
    milliseconds_ours: float
    package: str
    version: str


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def seconds(parts: tuple[Average, Average]) -> float:
    """Time of one average, that of the slower rank."""
    before, average = parts
    before()
    dist.barrier()
    start = time.perf_counter()
    average()
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def measure(width: int, rounds: int) -> list[Row]:
    """All candidates on one size, interleaved; the same rows on both ranks."""
    present = [c for c in CANDIDATES if installed(c.package)]
    reference = ours(blocks(width))
    parts = [c.make(blocks(width)) for c in present]
    for part in [reference, *parts, reference]:  # vectors, first connections
        seconds(part)
    ratios: list[list[float]] = [[] for _ in present]
    times: list[list[float]] = [[] for _ in present]
    own = []
    for number in range(rounds):
        before = seconds(reference)
        for i in ((k + number) % len(present) for k in range(len(present))):
            taken = seconds(parts[i])
            after = seconds(reference)
            ratios[i].append(2 * taken / (before + after))
            times[i].append(taken)
            own.append(after)
            before = after
    model = blocks(width)
    return [
        Row(
            candidate.name,
            width,
            len(list(model.parameters())),
            sum(p.numel() for p in model.parameters()),
            *(round(q, 3) for q in _quartiles(ratios[i])),
            candidate.targets[WIDTHS.index(width)] if candidate.targets else None,
            round(1e3 * statistics.median(times[i]), 3),
            round(1e3 * statistics.median(own), 3),
            candidate.package,
            importlib.metadata.version(candidate.package),
        )
        for i, candidate in enumerate(present)
    ]


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def on_a_rank(out: Path) -> None:
    """What each process runs; rank 0 writes the rows."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [row for width in WIDTHS for row in measure(width, ROUNDS)]
    if dist.get_rank() == 0:
        out.write_text(json.dumps([asdict(row) for row in rows]))
    dist.barrier()
    # LocalOptimizer and LocalSGD are left where they are: all averages were made by hand.
    dist.destroy_process_group()


def measured_rows() -> list[Row]:
    """The rows of two processes under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "--rdzv-backend",
                "c10d",
            ),
            *("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", __file__, "--rank", str(out)),
        ]
        quiet = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return [Row(**row) for row in json.loads(out.read_text())]


def record(rows: list[Row]) -> dict[str, object]:
    """What the book's page reads."""
    packages = [p for p in ("torch", "accelerate", "papercore") if installed(p)]
    return {
        "what": "wall-clock time of one average over 2 gloo processes over that of LocalOptimizer.sync; median and quartiles over "
        "interleaved rounds",
        "model": "parameters of a 12-block decoder, 148 float32 tensors, width 64 and 256; 1 thread a process",
        "rounds": ROUNDS,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rows": [asdict(row) for row in rows],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write(path: Path, rows: list[Row]) -> None:
    save_benchmark(path, record(rows))


# ---- as tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[tuple[str, int], Row]]:
    measured = measured_rows()
    folder = Path(os.environ.get("PAPERCORE_BENCHMARKS", "_build/benchmarks"))
    write(folder / "local_sgd_sync.json", measured)
    yield {(row.name, row.width): row for row in measured}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("candidate", [c for c in CANDIDATES if c.targets], ids=lambda c: c.name)
def test_one_vector_is_faster(rows: dict[tuple[str, int], Row], candidate: Candidate, width: int) -> None:
    if not installed(candidate.package):
        pytest.skip(f"needs {candidate.package}")
    row = rows[candidate.name, width]
    assert row.target is not None and row.ratio >= row.target, row


@pytest.mark.parametrize("width", WIDTHS)
def test_the_copies_and_the_notes_cost_less_than_torchs(rows: dict[tuple[str, int], Row], width: int) -> None:
    """PeriodicModelAverager also reduces one vector, made anew every time and without any check."""
    assert rows["PeriodicModelAverager", width].ratio >= 0.8


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        on_a_rank(Path(sys.argv[2]))
        return
    measured = measured_rows()
    for row in measured:
        print(
            f"{row.tensors} tensors {row.parameters / 1e6:5.1f} M  {row.name:42s} {row.ratio:6.2f} ({row.low:.2f} .. {row.high:.2f})"
            f"  {row.milliseconds:8.2f} ms, ours {row.milliseconds_ours:.2f} ms  {row.package} {row.version}"
        )
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), measured)


if __name__ == "__main__":
    main()
