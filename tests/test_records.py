"""The committed quick records are what the code gives: recomputed by the execution of the chapters, and compared.

`make test` executes the chapters first and names the folder of their records in PAPERCORE_EXECUTED.
"""

import json
import os
from pathlib import Path

import pytest

from papercore.experiments import CHAPTERS, configure
from papercore.lab import claims
from papercore.lab.record import Record

RECORDS = Path(__file__).resolve().parents[1] / "book" / "records"
EXECUTED = os.environ.get("PAPERCORE_EXECUTED")

needs_execution = pytest.mark.skipif(EXECUTED is None, reason="compares with a fresh execution: make test")


def recomputed(slug: str) -> Record:
    config = configure(slug, "quick", "cpu")
    path = Path(str(EXECUTED)) / slug / f"quick-{config.digest()}.json"
    assert path.is_file(), f"the execution of {slug} left no record at {path}"
    return Record.load(path)


@needs_execution
@pytest.mark.parametrize("slug", CHAPTERS)
def test_a_fresh_run_agrees_with_the_committed_record(slug: str) -> None:
    committed, fresh = Record.load(RECORDS / slug / "quick.json"), recomputed(slug)
    assert fresh.fresh, "the code changed while the chapter ran"
    assert committed.config == fresh.config
    assert committed.compare(fresh) == []


@needs_execution
@pytest.mark.parametrize("slug", CHAPTERS)
def test_a_fresh_run_gives_the_committed_verdicts(slug: str) -> None:
    committed, fresh = Record.load(RECORDS / slug / "quick.json"), recomputed(slug)
    if not committed.fresh:
        pytest.skip("the committed record is of older code and shown as stale; make refresh renews it")
    for claim in claims.load_claims(slug):
        before, now = (claims.judge(claim, "quick", record) for record in (committed, fresh))
        assert before.verdict == now.verdict, (
            f"{claim.id}: {before.verdict} ({before.shown}) in the book, {now.verdict} ({now.shown}) here"
        )


@pytest.mark.parametrize(
    "path", sorted(RECORDS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_committed_records_name_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    json.loads(text)
    for word in ("/home/", "/Users/", "/tmp/", str(Path.home()) + "/"):
        assert word not in text, f"{path.name} holds {word}"


def test_a_record_that_moved_too_far_is_told() -> None:
    # The comparison above must be able to fail.
    one = Record(
        "mezo", "quick", {}, metrics={"loss": 1.0, "steps": 3.0}, moves={"loss": "rel:0.05", "steps": "exact"}
    )
    other = Record("mezo", "quick", {}, metrics={"loss": 1.2, "steps": 4.0}, moves=one.moves)
    assert len(one.compare(other)) == 2
    assert one.compare(one) == []
