"""`papercore claims`: rows, totals, and the exit status that a machine reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_claims_as_json_is_a_list_of_rows(book):
    before = book.call("claims", "toy", "--json")
    assert before.status == 0 and {(r["id"], r["scale"]): r["verdict"] for r in before.json} == {
        ("toy/C1", "quick"): "not run", ("toy/C1", "standard"): "not run", ("toy/C1", "paper"): "not tested at this scale",
        ("toy/C2", "quick"): "not run", ("toy/C2", "standard"): "not tested at this scale", ("toy/C2", "paper"): "not tested at this scale",
        ("toy/C3", "quick"): "not tested at this scale", ("toy/C3", "standard"): "not tested at this scale", ("toy/C3", "paper"): "not tested at this scale",
    }  # fmt: skip
    book.call("run", "toy", "--device", "cpu")
    book.call("run", "toy", "--device", "cpu", "--scale", "standard")
    done = book.call("claims", "--json")
    assert (done.status, done.err) == (0, "")
    rows = {(r["id"], r["scale"]): r for r in done.json}
    assert len(rows) == len(done.json) == 9
    first = rows["toy/C1", "quick"]
    wanted = {
        "slug": "toy",
        "id": "toy/C1",
        "scale": "quick",
        "verdict": "holds",
        "measured": 1.5,
        "reported": "1.5",
        "rule": "== 1.5",
    }
    assert {k: first[k] for k in wanted} == wanted
    assert Path(first["record"]).is_file() and Path(first["record"]).name.startswith("quick-")
    assert (rows["toy/C1", "standard"]["verdict"], rows["toy/C1", "standard"]["label"]) == (
        "fails",
        "fails (expected)",
    )
    assert rows["toy/C1", "standard"]["why"] == "There are five parts at this scale."
    assert rows["toy/C3", "quick"]["record"] is None and rows["toy/C3", "quick"]["measured"] is None
    one = book.call("claims", "toy", "--scale", "standard", "--json")
    assert [r["scale"] for r in one.json] == ["standard"] * 3


def test_claims_in_a_terminal_and_in_one_line(book):
    book.call("run", "toy", "--device", "cpu")
    text = book.call("claims").out
    assert [line for line in text.splitlines() if line.startswith("---")] == [
        "--- quick",
        "--- standard",
        "--- paper",
    ]
    assert "+ toy/C1     holds                      The parts add up." in text
    assert book.call("claims", "--summary").out.splitlines() == [
        "toy          quick     1 holds, 1 fails (expected), 1 not tested at this scale",
        "toy          standard  1 not run, 2 not tested at this scale",
        "toy          paper     3 not tested at this scale",
    ]
    assert (
        book.call("claims", "toy", "--summary", "--scale", "paper").out
        == "toy          paper     3 not tested at this scale\n"
    )


def test_claims_end_with_status_1_on_an_unexpected_verdict(book):
    book.call("run", "toy", "--device", "cpu")
    good = book.claims.read_text()
    for old, new, message in (
        ('"== 1.5"', '"< 1.5"', "unexpected: toy/C1 at quick fails\n"),
        (
            '"total > 100"',
            '"total > 1"',
            "unexpected: toy/C2 at quick holds although marked as expected to fail\n",
        ),
    ):
        assert old in good
        book.claims.write_text(good.replace(old, new))
        for words in ((), ("--json",), ("--summary",), ("toy", "--scale", "quick")):
            done = book.call("claims", *words)
            assert (done.status, done.err) == (1, message)
        assert book.call("claims", "--scale", "standard").status == 0  # the surprise is at another scale
    book.claims.write_text(good.replace("rule:", "rules:"))
    done = book.call("claims")
    assert done.status == 2 and "claims/toy.yml, toy/C1: unknown fields ['rules']" in done.err


def test_a_stale_record_is_shown_as_stale_and_surprises_nobody(book):
    book.claims.write_text(book.claims.read_text().replace('"== 1.5"', '"== 1.6"'))
    book.call("run", "toy", "--device", "cpu")
    with book.experiment.open("a") as file:
        file.write("\nMORE = 1\n")
    done = book.call("claims", "--json", "--scale", "quick")
    assert (done.status, [r["verdict"] for r in done.json]) == (
        0,
        ["stale", "stale", "not tested at this scale"],
    )


def test_the_book_shows_its_own_record_where_there_is_no_other(book):
    book.call(
        "run", "toy", "--device", "cpu", "--scale", "standard", "--out", "book/records/toy/standard-cpu.json"
    )
    rows = book.call("claims", "--scale", "standard", "--json").json
    assert rows[0]["verdict"] == "fails" and rows[0]["record"].endswith("book/records/toy/standard-cpu.json")
    # A run of one's own comes first, as long as it is fresh.
    book.call("run", "toy", "--device", "cpu", "--scale", "standard")
    assert "/runs/toy/standard-" in book.call("claims", "--scale", "standard", "--json").json[0]["record"]
    # Other settings are another run, and never stand for the scale.
    book.reset()
    book.call("run", "toy", "--device", "cpu", "--set", "rate=0.75", "--out", "book/records/toy/quick.json")
    assert book.call("claims", "--scale", "quick", "--json").json[0]["verdict"] == "stale"


def test_a_reader_who_stops_reading_is_no_error(book):
    command = f"{sys.executable} -m papercore claims --json | head -c 5"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=book.root,
        env=book.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("[\n {\n", "")
