"""How fast inside-outside is, beside its peers and beside the matrix products that it cannot do without.

    python tests/benchmarks/test_parsing.py [OUT.json]        the table, and a file for the book's page
    pytest tests/benchmarks/test_parsing.py                   the same with the targets as tests

One thread, one process, CPU time. A random dense grammar of 30 in-terminals and 45 pre-terminals, 16 sentences of 20 words,
float32. Every candidate is warmed up once and then timed in turn, round by round; reported are the median and the quartiles of
its time over that of our marginals in the same round. The limit is the time that this thread's matrix product of 2048 x 2048
takes for the floating-point operations of a dense chart: inside, and twice the outer products plus the rule products outside.
NLTK's parsers are timed on sentences of the book's English-like grammar, all marginals of ours against one tree of theirs.
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

from papercore.lab.benchmarks import save_benchmark
from papercore.parsing import PCFG, english, inside_outside, to_nltk
from papercore.parsing.chart import inside

WORDS, INNER, OUTER, BATCH = 20, 30, 45, 16
ROUNDS = int(os.environ.get("PAPERCORE_BENCH_ROUNDS", "5"))
Run = Callable[[], object]


@dataclass
class Row:
    """One line of the table: median and quartiles of the time over that of our marginals, and tokens a second."""

    name: str
    task: str
    ratio: float
    low: float
    high: float
    tokens_per_second: float
    target: float | None
    package: str
    version: str


def dense_grammar() -> PCFG:
    g = torch.Generator().manual_seed(0)
    symbols = INNER + OUTER
    return PCFG(
        torch.rand(INNER, generator=g),
        torch.rand(INNER, symbols, symbols, generator=g),
        torch.rand(OUTER, 200, generator=g),
        nonterminals=[f"N{i}" for i in range(INNER)],
        preterminals=[f"P{i}" for i in range(OUTER)],
        vocabulary=[f"w{i}" for i in range(200)],
        normalize=True,
    )


def flop(n: int, inner: int, outer: int, batch: int) -> tuple[float, float]:
    """Floating-point operations of a dense chart, inside and outside."""
    products, outers = (n - 1) * outer**2 * inner, 0
    for width in range(3, n + 1):
        spans = n - width + 1
        products += spans * (2 * inner**2 * outer + (inner**3 if width > 3 else 0))
        outers += spans * (width - 3) * inner**2
    return 2.0 * batch * (products + outers), 2.0 * batch * (products + 2 * outers)


def cpu_seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def matmul_speed() -> float:
    """Floating-point operations a second of a product of two matrices of 2048 x 2048."""
    a = torch.rand(2048, 2048, generator=torch.Generator().manual_seed(0))
    a @ a
    return 2 * 2048**3 / min(cpu_seconds(lambda: a @ a) for _ in range(3))


def torch_struct(grammar: PCFG, ids: torch.Tensor) -> Run:
    from torch_struct import SentCFG

    batch = ids.shape[0]
    terms = grammar.emissions.log().t()[ids]
    rules = grammar.rules.log().expand(batch, -1, -1, -1)
    root = grammar.root.log().expand(batch, -1)
    lengths = torch.full((batch,), ids.shape[1])
    return lambda: SentCFG((terms, rules, root), lengths=lengths).marginals


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def measure(rounds: int = ROUNDS) -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_dense(rounds), *_english(rounds)]
    finally:
        torch.set_num_threads(threads)


def _dense(rounds: int) -> list[Row]:
    grammar = dense_grammar()
    ids = torch.randint(200, (BATCH, WORDS), generator=torch.Generator().manual_seed(1))
    lengths = torch.full((BATCH,), WORDS)
    tables, emitted = grammar.tables(), grammar.emissions.t()[ids]
    ours: Run = lambda: inside_outside(grammar, ids)  # noqa: E731
    others: dict[str, tuple[Run, str, float | None]] = {
        "log Z alone": (lambda: inside(tables, emitted, lengths), "papercore", None)
    }
    if installed("torch_struct"):
        others["torch-struct SentCFG, all marginals"] = (torch_struct(grammar, ids), "torch-struct", 50.0)
    below, above = flop(WORDS, INNER, OUTER, BATCH)
    rows, base = _compare("dense", ours, others, rounds, BATCH * WORDS)
    limits = [(below + above) / matmul_speed() / base for _ in range(max(rounds, 3))]
    rows.append(
        Row(
            "matrix-product limit",
            "dense",
            *_quartiles(limits),
            BATCH * WORDS / (limits[0] * base),
            0.25,
            "torch",
            "",
        )
    )
    return rows


def _english(rounds: int) -> list[Row]:
    if not installed("nltk"):
        return []
    import nltk

    grammar = english().to(torch.float32)
    ids, trees = grammar.sample(40, max_length=20, generator=torch.Generator().manual_seed(3))
    lengths = [len(tree) for tree in trees]
    chosen = sorted(range(40), key=lambda i: abs(lengths[i] - 12))[:8]
    few, sizes = ids[chosen], [lengths[i] for i in chosen]
    sentences = [grammar.decode(ids[i, : lengths[i]]) for i in chosen]
    theirs = to_nltk(grammar)
    viterbi = nltk.ViterbiParser(theirs)
    chart = nltk.parse.pchart.InsideChartParser(theirs)

    def parse_all(parser: object) -> Run:
        def run() -> None:
            for sentence in sentences:
                next(iter(parser.parse(sentence)))  # type: ignore[attr-defined]

        return run

    others: dict[str, tuple[Run, str, float | None]] = {
        "NLTK ViterbiParser, best tree": (parse_all(viterbi), "nltk", None),
        "NLTK InsideChartParser, first tree": (parse_all(chart), "nltk", None),
    }
    rows, _ = _compare(
        "english",
        lambda: inside_outside(grammar, few, lengths=sizes),
        others,
        max(rounds // 2, 2),
        sum(sizes),
    )
    return rows


def _compare(
    task: str, ours: Run, others: dict[str, tuple[Run, str, float | None]], rounds: int, tokens: int
) -> tuple[list[Row], float]:
    """Rows of `others` relative to `ours`, and seconds of ours."""
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
    base = statistics.median(mine)
    rows = [
        Row("all marginals", task, 1.0, 1.0, 1.0, tokens / base, None, "papercore", _version("papercore"))
    ]
    for name, (_, package, target) in others.items():
        rate = tokens / statistics.median(seconds[name])
        rows.append(Row(name, task, *_quartiles(ratios[name]), rate, target, package, _version(package)))
    return rows, base


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def record(rows: list[Row]) -> dict[str, object]:
    """What the book's page reads."""
    packages = [p for p in ("torch", "torch-struct", "nltk", "papercore") if installed(p.replace("-", "_"))]
    return {
        "what": "CPU time over that of all marginals by papercore; median and quartiles over interleaved rounds; 1 thread",
        "model": f"{INNER} in-terminals, {OUTER} pre-terminals, {BATCH} sentences of {WORDS} words, float32",
        "rounds": ROUNDS,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "rows": [asdict(row) for row in rows],
    }


def write(path: Path, rows: list[Row]) -> None:
    save_benchmark(path, record(rows))


# ---- as tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Row]]:
    measured = measure()
    write(Path(os.environ.get("PAPERCORE_BENCHMARKS", "_build/benchmarks")) / "parsing.json", measured)
    yield {f"{row.task}: {row.name}": row for row in measured}


@pytest.mark.timeout(1200)
def test_all_marginals_are_50_times_faster_than_torch_struct(rows: dict[str, Row]) -> None:
    if not installed("torch_struct"):
        pytest.skip("needs torch-struct")
    assert rows["dense: torch-struct SentCFG, all marginals"].ratio >= 50


def test_all_marginals_are_within_4_times_of_the_matrix_product(rows: dict[str, Row]) -> None:
    assert rows["dense: matrix-product limit"].ratio >= 0.25


def main() -> None:
    measured = measure()
    for row in measured:
        print(
            f"{row.task:8s} {row.name:38s} {row.ratio:8.2f}  ({row.low:.2f} .. {row.high:.2f})  "
            f"{row.tokens_per_second:9,.0f} tokens/s  {row.package} {row.version}"
        )
    if len(sys.argv) > 1:
        write(Path(sys.argv[1]), measured)


if __name__ == "__main__":
    main()
