"""How fast the key-value bottleneck is beside its peers, and what forgetting costs beside SCRUB and retraining.

    python tests/benchmarks/test_unlearning.py [OUT.json]     the table, and a file for the book's page
    pytest tests/benchmarks/test_unlearning.py                the same with the targets as tests

One thread, one process, CPU time, float32. Every candidate is warmed up once and then timed in turn, round by round; reported
are the median and the quartiles of its time over that of ours in the same round. Peers

    torch.cdist, einsum     the search alone: torch.cdist(...).argmin, and squared distances by einsum as in the official code
    lucidrains              discrete-key-value-bottleneck-pytorch in eval mode with codebook_dim=dim_key, without which it trains a random
                            layer of its own; the batch as documented (one token an image) and, kinder, as the tokens of one image
    official-style          the architecture of the papers' code, written anew: distances by einsum for all codebooks at once,
                            values fetched by indexing

Modules run forward, and forward plus backward of a cross-entropy. Forgetting: one of ten Gaussian classes of 5,000 examples, 64
features, cached; C = 64, K = 128, d_k = 8; SCRUB on a linear head with one setting, without the search for it, and both
retrained. FLOP ratios without a backbone, and with one of 4.4 G multiply-adds (ViT-B/32) in every pass.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from papercore.lab.benchmarks import save_benchmark
from papercore.unlearning import (
    KeyValueBottleneck,
    fine_tune,
    look_up,
    retrain,
    scrub,
    train_values,
    unlearn_by_activations,
)
from papercore.unlearning.search import nearest_keys, search_table

SIZES = ((64, 256, 1024, 8), (256, 64, 4096, 14))  # C, B, K, d_k
DIM, CLASSES = 512, 10
VIT_B32 = 2 * 4_400_000_000  # operations of a pass; the commonly quoted multiply-adds, doubled
ROUNDS = int(os.environ.get("PAPERCORE_BENCH_ROUNDS", "3"))
PACKAGE = "discrete-key-value-bottleneck-pytorch"
Run = Callable[[], object]


@dataclass
class Row:
    """One line of the table: median and quartiles of the time (or operations) over ours, and milliseconds of it."""

    task: str
    name: str
    ratio: float
    low: float
    high: float
    milliseconds: float
    target: float | None
    package: str


def installed(name: str) -> bool:
    return importlib.util.find_spec(name.replace("-", "_")) is not None


def cpu_seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


class OfficialStyle(nn.Module):
    """All C x B x K squared distances by einsum, values by indexing."""

    def __init__(self, model: KeyValueBottleneck) -> None:
        super().__init__()
        self.projection, self.keys = model.projection, model.keys
        self.values = nn.Parameter(model.values.detach().clone())

    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            heads = torch.einsum("bd,cdk->cbk", z, self.projection)
            found = einsum_search(heads, self.keys)
        return self.values[torch.arange(len(found)).unsqueeze(1), found].mean(0)


def einsum_search(heads: Tensor, keys: Tensor) -> Tensor:
    """[C, B] from heads [C, B, d] and keys [C, K, d]."""
    squares = heads.square().sum(-1, keepdim=True) + keys.square().sum(-1).unsqueeze(1)
    return (squares - 2 * torch.einsum("cbd,ckd->cbk", heads, keys)).argmin(-1)


def measure(rounds: int = ROUNDS) -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            row for size in SIZES for row in (*_search(*size, rounds), *_modules(*size, rounds))
        ] + _forgetting()
    finally:
        torch.set_num_threads(threads)


def _search(books: int, rows: int, pairs: int, width: int, rounds: int) -> list[Row]:
    g = torch.Generator().manual_seed(0)
    heads, keys = torch.randn(books, rows, width, generator=g), torch.randn(books, pairs, width, generator=g)
    table, mean = search_table(keys, torch.zeros(books, pairs, dtype=torch.bool))

    def ours() -> Tensor:
        shifted = heads.transpose(0, 1) - mean
        return nearest_keys(torch.cat([shifted, shifted.new_ones(rows, books, 1)], -1), table)

    exact = torch.cdist(heads, keys, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    assert torch.equal(ours().t(), exact)
    others: dict[str, tuple[Run, str, float | None]] = {
        "torch.cdist, argmin": (lambda: torch.cdist(heads, keys).argmin(-1), "torch", 2.0),
        "einsum, argmin": (lambda: einsum_search(heads, keys), "torch", None),
    }
    return _compare(f"search C={books} B={rows} K={pairs}", ours, others, rounds)


def _modules(books: int, rows: int, pairs: int, width: int, rounds: int) -> list[Row]:
    g = torch.Generator().manual_seed(1)
    z, labels = torch.randn(rows, DIM, generator=g), torch.randint(CLASSES, (rows,), generator=g)
    model = KeyValueBottleneck(DIM, books, pairs, dim_key=width, dim_value=CLASSES)
    model.keys.copy_(torch.randn(model.keys.shape, generator=g))
    model.values.data.normal_(generator=g)
    model.keys_ready = True
    official = OfficialStyle(model)
    assert torch.allclose(official(z), model(z), atol=1e-5)
    peers: dict[str, tuple[Callable[[], Tensor], nn.Module, str, float | None]] = {
        "official-style module": (lambda: official(z), official, "plain re-implementation", None)
    }
    if installed(PACKAGE):
        from discrete_key_value_bottleneck_pytorch import DiscreteKeyValueBottleneck

        theirs = DiscreteKeyValueBottleneck(
            dim=width, num_memories=pairs, dim_embed=DIM, num_memory_codebooks=books, dim_memory=CLASSES, codebook_dim=width
        ).eval()  # fmt: skip
        # One table an image: at the larger size its gradient takes B x C x K x d_v numbers, 2.7 GB.
        if rows * books * pairs * CLASSES * 4 < 2**30:
            peers["lucidrains, one token an image"] = (
                lambda: theirs(z.unsqueeze(1))[:, 0],
                theirs,
                PACKAGE,
                8.0,
            )
        peers["lucidrains, batch as tokens"] = (lambda: theirs(z.unsqueeze(0))[0], theirs, PACKAGE, None)

    def trained(forward: Callable[[], Tensor], module: nn.Module) -> Run:
        def run() -> None:
            module.zero_grad(set_to_none=True)
            functional.cross_entropy(forward(), labels).backward()

        return run

    size = f"C={books} B={rows} K={pairs}"
    forward = {name: (f, package, None) for name, (f, _, package, _) in peers.items()}
    both = {
        name: (trained(f, module), package, target) for name, (f, module, package, target) in peers.items()
    }
    with torch.no_grad():
        result = _compare(f"forward {size}", lambda: model(z), forward, rounds)
    return result + _compare(f"forward+backward {size}", trained(lambda: model(z), model), both, rounds)


def _forgetting() -> list[Row]:
    g = torch.Generator().manual_seed(2)
    centres = 2 * torch.randn(CLASSES, 64, generator=g)
    labels = torch.arange(5000) % CLASSES
    z = centres[labels] + torch.randn(5000, 64, generator=g)
    gone = labels == 0
    forget, retain = (z[gone], labels[gone]), (z[~gone], labels[~gone])
    model = KeyValueBottleneck(64, 64, 128, dim_key=8, dim_value=CLASSES).init_keys(z, epochs=2)
    log = train_values(model, (z, labels), epochs=10).log

    def head() -> nn.Linear:
        layer = nn.utils.skip_init(nn.Linear, 64, CLASSES)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    linear = fine_tune(head(), (z, labels), epochs=5, lr=0.01).model
    accuracy = lambda m, data: float((m(data[0]).argmax(1) == data[1]).double().mean())  # noqa: E731
    start = time.process_time()
    free = unlearn_by_activations(model, log.of_class(0), share=0.8)
    logged = time.process_time() - start
    model.unmask()
    start = time.process_time()
    report = unlearn_by_activations(model, forget, share=0.8)
    ours = time.process_time() - start
    assert accuracy(model, forget) <= 0.01 and free.flops == 0
    start = time.process_time()
    scrubbed = scrub(
        linear,
        forget,
        retain,
        epochs=8,
        msteps=3,
        alpha=0.001,
        gamma=1.0,
        temperature=2.0,
        lr=4e-3,
        backbone_flops=VIT_B32,
    )
    to_scrub = time.process_time() - start
    start = time.process_time()
    again = retrain(head, retain, epochs=5, lr=0.01, backbone_flops=VIT_B32)
    to_retrain = time.process_time() - start
    start = time.process_time()
    values = KeyValueBottleneck(64, 64, 128, dim_key=8, dim_value=CLASSES)
    values.load_state_dict(model.state_dict())
    values.unmask()
    values.values.data.zero_()
    train_values(values, look_up(values, retain), epochs=10)
    to_values = time.process_time() - start
    once = report.flops + VIT_B32 * report.examples

    def row(task: str, name: str, ratio: float, seconds: float, target: float | None = None) -> Row:
        return Row(task, name, ratio, ratio, ratio, 1e3 * seconds, target, "papercore")

    rows = [
        row("forgetting, seconds", "masking, one pass over the forget set", 1.0, ours),
        row("forgetting, seconds", "masking, look-ups logged", logged / ours, logged),
        row("forgetting, seconds", "SCRUB on a linear head, one setting", to_scrub / ours, to_scrub, 1.0),
        row("forgetting, seconds", "linear head retrained", to_retrain / ours, to_retrain),
        row("forgetting, seconds", "values retrained", to_values / ours, to_values),
        row(
            "forgetting, FLOP with backbone",
            "SCRUB on a linear head, one setting",
            scrubbed.flops.total / once,
            0,
            20.0,
        ),
        row("forgetting, FLOP with backbone", "linear head retrained", again.flops.total / once, 0),
        row(
            "forgetting, FLOP of the head",
            "SCRUB on a linear head, one setting",
            scrubbed.flops.head / report.flops,
            0,
        ),
        row("forgetting, FLOP of the head", "linear head retrained", again.flops.head / report.flops, 0),
        row("forgetting, accuracy left", "masking: forget", accuracy(model, forget), 0),
        row("forgetting, accuracy left", "masking: retain", accuracy(model, retain), 0),
        row("forgetting, accuracy left", "SCRUB: forget", accuracy(linear, forget), 0),
        row("forgetting, accuracy left", "SCRUB: retain", accuracy(linear, retain), 0),
    ]
    return rows


def _compare(
    task: str, ours: Run, others: dict[str, tuple[Run, str, float | None]], rounds: int
) -> list[Row]:
    for run in (ours, *(run for run, _, _ in others.values())):
        run()
    mine: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in others}
    seconds: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds):
        before = cpu_seconds(ours)
        mine.append(before)
        for name, (run, _, _) in others.items():
            taken = cpu_seconds(run)
            after = cpu_seconds(ours)
            mine.append(after)
            seconds[name].append(taken)
            ratios[name].append(2 * taken / (before + after))
            before = after
    rows = [Row(task, "papercore", 1.0, 1.0, 1.0, 1e3 * statistics.median(mine), None, "papercore")]
    for name, (_, package, target) in others.items():
        low, middle, high = _quartiles(ratios[name])
        rows.append(
            Row(task, name, middle, low, high, 1e3 * statistics.median(seconds[name]), target, package)
        )
    return rows


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def record(rows: list[Row]) -> dict[str, object]:
    """What the book's page reads."""
    packages = [p for p in ("torch", "papercore", PACKAGE, "vector-quantize-pytorch") if installed(p)]
    return {
        "what": "CPU time over that of papercore's bottleneck; median and quartiles over interleaved rounds; 1 thread",
        "model": f"dim {DIM}, {CLASSES} classes, float32; sizes in the rows",
        "rounds": ROUNDS,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rows": [asdict(row) for row in rows],
    }


def write(path: Path, rows: list[Row]) -> None:
    save_benchmark(path, record(rows))


# ---- as tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    measured = measure()
    write(Path(os.environ.get("PAPERCORE_BENCHMARKS", "_build/benchmarks")) / "unlearning.json", measured)
    yield {f"{row.task}: {row.name}": row for row in measured}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("size", ["C=64 B=256 K=1024", "C=256 B=64 K=4096"])
def test_the_search_is_twice_as_fast_as_cdist(rows: dict[str, Row], size: str) -> None:
    assert rows[f"search {size}: torch.cdist, argmin"].ratio >= 2


def test_training_is_8_times_as_fast_as_lucidrains(rows: dict[str, Row]) -> None:
    if not installed(PACKAGE):
        pytest.skip(f"needs {PACKAGE}")
    assert rows["forward+backward C=64 B=256 K=1024: lucidrains, one token an image"].ratio >= 8


def test_masking_is_cheaper_than_scrub(rows: dict[str, Row]) -> None:
    assert rows["forgetting, FLOP with backbone: SCRUB on a linear head, one setting"].ratio >= 20
    assert rows["forgetting, seconds: SCRUB on a linear head, one setting"].ratio > 1


def main() -> None:
    measured = measure()
    for row in measured:
        print(
            f"{row.task:36s} {row.name:38s} {row.ratio:9.3f}  ({row.low:.2f} .. {row.high:.2f})  {row.milliseconds:9.2f} ms  {row.package}"
        )
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), measured)


if __name__ == "__main__":
    main()
