"""`papercore sweep` over real processes: failures, lost workers, Ctrl-C, and a second sweep that runs only the rest."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.cli.toy_book import Done, wait_for


def finish(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=180)
    return Done(process.returncode, out, err)


def test_a_sweep_runs_what_it_can_and_a_second_one_only_the_rest(book):
    words = ("sweep", "toy", "--device", "cpu", "--grid", "end=well,error", "seed=0,1,0", "--jobs", "2")
    first = finish(book.start(*words))
    assert first.status == 1
    lines = sorted(line.replace(str(book.runs), "RUNS") for line in first.out.splitlines())
    assert [re.sub(r"-\w{10}\.", "-X.", line) for line in lines] == [
        "device=cpu, end=error: FAILED RuntimeError: the last part fails",
        "device=cpu, seed=1, end=error: FAILED RuntimeError: the last part fails",
        "device=cpu, seed=1: RUNS/toy/quick-X.json",
        "device=cpu: RUNS/toy/quick-X.json",
    ]
    assert (
        len(book.log.read_text().split()) == 12
    )  # four runs of three parts: what stands there twice is run once
    assert len(list(book.runs.glob("toy/*.json"))) == 2
    book.log.unlink()
    second = finish(book.start(*words))
    assert second.status == 1 and sorted(second.out.splitlines()) == sorted(first.out.splitlines())
    assert book.log.read_text().split() == ["2", "2"]  # the failing parts alone


def test_a_lost_worker_costs_no_finished_record(book):
    done = finish(book.start("sweep", "toy", "--device", "cpu", "--grid", "end=well,killed", "--jobs", "1"))
    assert done.status == 1
    lines = done.out.splitlines()
    assert lines[0].startswith("device=cpu: ") and Path(lines[0].split(": ")[1]).is_file()
    assert lines[1].startswith("device=cpu, end=killed: FAILED BrokenProcessPool: ")


def test_an_interrupted_sweep_keeps_what_is_finished(book):
    gate, reached = book.root / "gate", book.root / "gate.reached"
    process = book.start("sweep", "toy", "--device", "cpu", "--grid", "seed=0,1,2", TOY_GATE=str(gate))
    assert process.stdout
    first = process.stdout.readline()
    gate.touch()
    wait_for(reached, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the sweep
    done = finish(process)
    gate.unlink()
    reached.unlink()
    assert (done.status, done.err) == (
        130,
        "\npapercore: interrupted; finished parts are kept, the same command goes on after them.\n",
    )
    written = [str(p) for p in book.runs.glob("toy/*.json")]
    assert first.split(": ")[1].strip() in written and len(written) < 3
    again = finish(book.start("sweep", "toy", "--device", "cpu", "--grid", "seed=0,1,2"))
    assert (
        again.status == 0
        and len(again.out.splitlines()) == 3
        and len(list(book.runs.glob("toy/*.json"))) == 3
    )
