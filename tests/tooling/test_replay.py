"""nbval with the replay kernel: it passes what was executed, and fails on other outputs and on other code."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_output

from tests.tooling.mini_book import code, notebook, printed
from tooling.replay_kernel import OutOfStep, Replay, joined
from tooling.sandbox import ROOT, environment

CHECKED = ("nbval-check-output",)


def page(count: str = "3", source: str = "print(count)") -> object:
    return notebook(
        code("first", "x = 1"),
        code("table", source, printed(f"{count} hold\n"), tags=CHECKED),
        code(
            "value",
            "x",
            new_output("execute_result", data={"text/plain": "1"}, execution_count=3),
            tags=CHECKED,
        ),
    )


def test_nbval_compares_committed_outputs_with_the_execution(tmp_path: Path) -> None:
    committed, executed = tmp_path / "book", tmp_path / "executed"
    for folder in (committed, executed):
        folder.mkdir()
    for name, there, now in (
        ("same", page(), page()),
        ("moved", page("3"), page("2")),
        ("edited", page(source="print(count) # edited"), page()),
    ):
        nbformat.write(there, committed / f"{name}.ipynb")
        nbformat.write(now, executed / f"{name}.ipynb")
    names = [str(committed / f"{name}.ipynb") for name in ("same", "moved", "edited")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "tooling.replay_plugin",
        f"--executed={executed}",
        "--nbval-lax",
    ]
    command += ["--nbval-kernel-name=papercore-replay", "-p", "no:cacheprovider", "-p", "no:xdist", *names]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(tmp_path / "build", threads=1),
        capture_output=True,
        text=True,
        timeout=250,
    )
    verdicts = re.findall(r"(\w+)(?:\.|::)ipynb::Cell (\d) (PASSED|FAILED)", done.stdout)
    assert {
        page: [verdict for name, _, verdict in verdicts if name == page]
        for page in ("same", "moved", "edited")
    } == {
        "same": ["PASSED", "PASSED", "PASSED"],
        "moved": ["PASSED", "FAILED", "PASSED"],
        "edited": ["PASSED", "FAILED", "FAILED"],
    }, done.stdout[-3000:] + done.stderr[-2000:]
    assert "is not the one that was executed" in done.stdout


def test_cells_must_come_in_order_and_with_their_source(tmp_path: Path) -> None:
    nbformat.write(page(), tmp_path / "page.ipynb")
    replay = Replay(str(tmp_path / "page.ipynb"))
    assert replay.outputs("x = 1\n") == []
    with pytest.raises(OutOfStep, match=r"cell 1 \(table\) is not the one"):
        replay.outputs("x")
    assert joined(replay.outputs("print(count)")[0]["text"]) == "3 hold\n"
    replay.outputs("x")
    with pytest.raises(OutOfStep, match="has 3 code cells, and one more was sent"):
        replay.outputs("x")
