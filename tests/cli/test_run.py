"""`papercore run`: the record, the verdicts, and what is left when a run is ended, fails or finds no room."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.toy_book import ToyBook, files, wait_for


def record_of(book: ToyBook) -> Path:
    (path,) = book.runs.glob("toy/*.json")
    return path


def test_a_run_writes_its_record_and_prints_the_verdicts(book):
    done = book.call("run", "toy", "--device", "cpu")
    assert (done.status, done.err) == (0, "")
    path = record_of(book)
    assert re.fullmatch(r"quick-[0-9a-f]{10}\.json", path.name)
    assert done.out.startswith(f"wrote {path}\n")
    assert (
        "+ toy/C1     holds                      The parts add up.\n    reported 1.5\n    measured 1.5   rule == 1.5\n"
        in done.out
    )
    assert (
        "- toy/C2     fails (expected)           The sum is large.\n    reported above 100\n    measured 1.50 and ?   rule total > 100\n    why      Small parts make a small sum.\n"
        in done.out
    )
    assert (
        "  toy/C3     not tested at this scale   It works at any size.\n    why      There is no other size.\n"
        in done.out
    )
    assert re.search(
        r"^toy at quick on cpu: \d+ s, 0\.\d GiB; 1 holds, 1 fails \(expected\), 1 not tested at this scale$",
        done.out,
        re.M,
    )
    document = json.loads(path.read_text())
    assert document["metrics"] == {"total": 1.5, "total_in_numpy": 1.5} and document["config"]["parts"] == 3
    assert files(book.runs) == [
        f"toy/{path.name}",
        f"toy/{path.stem}.npz",
    ]  # the parts are gone, nothing temporary is left


def test_a_second_run_says_that_it_reuses_the_record_unless_forced(book):
    first = book.call("run", "toy", "--device", "cpu")
    before = record_of(book).read_bytes()
    second = book.call(
        "run", "toy", "--device", "auto", CUDA_VISIBLE_DEVICES=""
    )  # auto is cpu here: the same run
    assert second.status == 0 and second.out.startswith(
        f"reused {record_of(book)} (same settings, same code; --force runs it again)\n"
    )
    assert second.out.splitlines()[1:] == first.out.splitlines()[1:]
    assert book.log.read_text() == "0 1 2 " and record_of(book).read_bytes() == before
    assert book.call("run", "toy", "--device", "cpu", "--force").out.startswith("wrote ")
    assert book.log.read_text() == "0 1 2 0 1 2 "
    assert book.call("run", "toy", "--device", "cpu", "--set", "rate=0.25").out.startswith("wrote ")
    assert len(list(book.runs.glob("toy/*.json"))) == 2
    with book.experiment.open("a") as file:
        file.write("\nMORE = 1\n")
    assert book.call("run", "toy", "--device", "cpu").out.startswith("wrote ")  # other code


def test_settings_reach_the_run_in_every_spelling(book):
    words = ["--set", "parts=2", "rate=1e-1", "--set", "kinds=fancy", "--seed", "7"]
    done = book.call("run", "toy", *words, "--out", "deep/er/mine.json", "--device", "cpu")
    assert done.status == 0 and files(book.root / "deep") == ["er/mine.json", "er/mine.npz"]
    config = json.loads((book.root / "deep/er/mine.json").read_text())["config"]
    assert config == {
        "scale": "quick",
        "device": "cpu",
        "seed": 7,
        "parts": 2,
        "rate": 0.1,
        "kinds": ["fancy"],
        "end": "well",
    }
    assert files(book.runs) == []


def test_an_unexpected_verdict_is_status_1_for_the_settings_of_the_book_alone(book):
    # With other settings the claim fails too, but nobody claimed it there.
    other = book.call("run", "toy", "--device", "cpu", "--set", "parts=4")
    assert "- toy/C1     fails " in other.out and (other.status, other.err) == (0, "")
    book.claims.write_text(book.claims.read_text().replace('"== 1.5"', '"== 1.6"'))
    for device in ("cpu", "auto"):
        done = book.call("run", "toy", "--device", device, CUDA_VISIBLE_DEVICES="")
        assert (done.status, done.err) == (1, "unexpected: toy/C1 at quick fails\n")
    book.reset()
    book.claims.write_text(book.claims.read_text().replace('"total > 100"', '"total > 1"'))
    done = book.call("run", "toy", "--device", "cpu")
    assert (done.status, done.err) == (
        1,
        "unexpected: toy/C2 at quick holds although marked as expected to fail\n",
    )


def test_a_place_that_cannot_be_written_is_refused_before_the_run(book):
    (book.root / "a-file").write_text("")
    (book.root / "folder.json").mkdir(exist_ok=True)
    (book.root / "mine.json").write_text('{"shopping": ["bread"]}')
    for words, env, status, message in (
        (("--out", "a-file/record.json"), {}, 1, r"papercore: \w+Error: .*a-file/record\.json"),
        (
            ("--out", "folder.json"),
            {},
            1,
            r"papercore: IsADirectoryError: .*is a folder, where a file was expected",
        ),
        (("--out", "/proc/self/record.json"), {}, 1, r"papercore: \w+Error: .*nothing was changed there"),
        (
            (),
            {"PAPERCORE_RUNS": "a-file"},
            1,
            r"papercore: \w+Error: .*nothing was changed there.*PAPERCORE_RUNS",
        ),
        (("--out", "mine.json"), {}, 2, r"papercore: mine\.json is not a record: schema None"),
    ):
        done = book.call("run", "toy", "--device", "cpu", *words, **env)
        assert (done.status, done.out) == (status, "") and re.match(message, done.err), done.err
        assert not book.log.exists() and len(done.err.splitlines()) == 1
    assert (book.root / "mine.json").read_text() == '{"shopping": ["bread"]}'


def test_a_disk_that_fills_keeps_the_finished_parts(book):
    """A limit on the size of files, set by the system, stands in for a full disk."""
    first = book.call("run", "toy", "--device", "cpu", "--set", "end=error")
    assert (first.status, first.out, first.err) == (1, "", "papercore: RuntimeError: the last part fails\n")
    parts = files(book.runs)
    assert len(parts) == 2 and all(p.endswith(".npz") for p in parts)
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); from papercore.cli import main; sys.exit(main())"
    words = ["run", "toy", "--device", "cpu", "--set", "parts=2"]
    limited = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=book.root,
        env=book.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (limited.returncode, limited.stdout) == (1, "")
    assert re.match(
        r"papercore: OSError: .*File too large; nothing was changed there\. Free some space or name another folder",
        limited.stderr,
    )
    assert files(book.runs) == parts  # what was there is there, and nothing half-written
    assert book.call(*words).status == 0


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("error", "papercore: RuntimeError: the last part fails\n"),
        ("nan", "papercore: FloatingPointError: the loss is nan at step 3\n"),
    ],
)
def test_a_run_that_fails_says_why_and_keeps_its_parts(book, end, message):
    done = book.call("run", "toy", "--device", "cpu", "--set", f"end={end}")
    assert (done.status, done.out, done.err) == (1, "", message)
    assert [Path(p).name[:6] for p in files(book.runs)] == ["part_0", "part_1"]
    told = book.call("run", "toy", "--device", "cpu", "--set", f"end={end}", PAPERCORE_TRACEBACK="1")
    assert told.status == 1 and "Traceback" in told.err and "in part\n" in told.err
    assert book.log.read_text() == "0 1 2 2 "


def test_a_bug_is_shown_with_its_place(book):
    done = book.call("run", "toy", "--device", "cpu", "--set", "end=bug")
    assert done.status == 1 and "Traceback" in done.err and "KeyError: 'nobody thought of this'" in done.err


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_run_keeps_its_finished_parts_and_goes_on(book, how, status):
    gate = book.root / "gate"
    gate.touch()
    process = book.start("run", "toy", "--device", "cpu", TOY_GATE=str(gate))
    reached = Path(f"{gate}.reached")
    wait_for(reached, process)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    gate.unlink()
    reached.unlink()
    assert (process.returncode, out) == (status, "")
    if how == signal.SIGINT:
        assert (
            err == "\npapercore: interrupted; finished parts are kept, the same command goes on after them.\n"
        )
    (left,) = files(book.runs)
    assert re.fullmatch(r"toy/quick-\w{10}\.parts/\w{16}/part_0-\w{6}\.npz", left)
    done = book.call("run", "toy", "--device", "cpu")
    assert done.status == 0 and done.out.startswith("wrote ")
    assert book.log.read_text() == "0 1 1 2 "  # the first part was not run again
    resumed = json.loads(record_of(book).read_text())
    assert resumed["provenance"]["resumed"] is True
    book.call("run", "toy", "--device", "cpu", "--force")
    whole = json.loads(record_of(book).read_text())
    assert {k: resumed[k] for k in ("metrics", "arrays", "config")} == {
        k: whole[k] for k in ("metrics", "arrays", "config")
    }
    assert "resumed" not in whole["provenance"]


def test_a_damaged_record_of_ones_own_is_run_again(book):
    book.call("run", "toy", "--device", "cpu")
    record_of(book).write_text("{")
    refused = book.call("claims", "toy")
    assert refused.status == 2 and f"{record_of(book)} is not a record" in refused.err
    assert book.call("run", "toy", "--device", "cpu").out.startswith("wrote ")
    assert book.call("claims", "toy").status == 0
