"""Execution of a small book: order, reuse, and what is said when a chapter fails."""

import json
from pathlib import Path

import nbformat
import pytest

from tests.tooling.mini_book import code, notebook, text, write_book
from tooling.execute import Job, execute, key_of, shown
from tooling.one_notebook import place
from tooling.sandbox import cores, environment

BLOCKED = """\
import os, socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=3)
except OSError as error:
    print(type(error).__name__)
print(os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"] == "")
"""
GOOD = notebook(
    text("title", "# Good"),
    code("params", 'scale: str = "quick"  # size', tags=("parameters",)),
    code("network", BLOCKED),
    code(
        "write",
        'import pathlib; pathlib.Path(os.environ["PAPERCORE_RUNS"]).mkdir(exist_ok=True); print(scale)',
    ),
)
BROKEN = notebook(
    text("title", "# Broken"), code("fine", "x = 0"), code("divide", "1 / x"), code("never", "print('never')")
)
DEAD = notebook(
    text("title", "# Dead"), code("killed", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
)
BOARD = notebook(text("title", "# Board"), code("table", "print('all')"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Job], str]:
    folder = tmp_path_factory.mktemp("book")
    book = write_book(folder / "book", good=GOOD, broken=BROKEN, dead=DEAD, scoreboard=BOARD)
    build = folder / "_build"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tooling.execute.say", said.append)
        jobs = execute(book=book, build=build, jobs=3)
    return book, build, {job.name: job for job in jobs}, "\n".join(said)


def outputs(path: Path) -> list[str]:
    return [
        output.text for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])
    ]


def test_a_good_chapter_is_kept_with_its_outputs(run: tuple[Path, Path, dict[str, Job], str]) -> None:
    _, build, jobs, said = run
    assert not jobs["good"].failure and jobs["good"].finished
    assert outputs(build / "notebooks" / "good.ipynb") == [
        f"NetworkBlocked\n{max(cores() // 3, 1)} True\n",
        "quick\n",
    ]
    assert "good          started" in said and "good          done in" in said


def test_a_failing_cell_is_named_with_its_error_and_log(run: tuple[Path, Path, dict[str, Job], str]) -> None:
    _, build, jobs, said = run
    assert jobs["broken"].failure == "cell 3 of 4 (divide) raised ZeroDivisionError: division by zero"
    log = build / "logs" / "broken.log"
    assert f"log {shown(log)}" in said and "ZeroDivisionError" in log.read_text()
    assert (build / "logs" / "broken.ipynb").is_file(), "the notebook so far helps to find the cause"
    assert not (build / "notebooks" / "broken.ipynb").exists(), (
        "a half-executed notebook must not be taken for a finished one"
    )


def test_a_killed_kernel_is_explained(run: tuple[Path, Path, dict[str, Job], str]) -> None:
    failure = run[2]["dead"].failure
    assert failure.startswith("cell 2 of 2 (killed): the kernel died without a Python error.")
    assert "want of memory" in failure


def test_the_scoreboard_waits_for_all_chapters(run: tuple[Path, Path, dict[str, Job], str]) -> None:
    assert (
        "not executed, since it would show the numbers of a chapter that failed"
        in run[2]["scoreboard"].failure
    )


def test_unchanged_notebooks_are_not_executed_again(
    run: tuple[Path, Path, dict[str, Job], str], capsys: pytest.CaptureFixture[str]
) -> None:
    book, build, _, _ = run
    before = (build / "notebooks" / "good.ipynb").stat().st_mtime_ns
    (job,) = execute(["good"], book=book, build=build)
    assert job.reused and not job.failure
    assert (build / "notebooks" / "good.ipynb").stat().st_mtime_ns == before
    assert "unchanged since they were executed, and reused: good" in capsys.readouterr().out


def test_the_scoreboard_runs_alone_when_all_chapters_are_done(
    run: tuple[Path, Path, dict[str, Job], str],
) -> None:
    book, build, _, _ = run
    (job,) = execute(["scoreboard"], book=book, build=build)
    assert not job.failure and outputs(build / "notebooks" / "scoreboard.ipynb") == ["all\n"]


def test_an_unknown_notebook_is_refused(run: tuple[Path, Path, dict[str, Job], str]) -> None:
    with pytest.raises(
        SystemExit,
        match="no notebook godo in the table of contents; there are good, broken, dead, scoreboard",
    ):
        execute(["godo"], book=run[0], build=run[1])


def test_the_key_changes_with_what_decides_the_result(tmp_path: Path) -> None:
    book = write_book(tmp_path, good=GOOD, scoreboard=BOARD)
    good, board = book / "good.ipynb", book / "scoreboard.ipynb"
    key, board_key = key_of(good, book, {}), key_of(board, book, {})
    assert key_of(good, book, {"scale": "standard"}) != key

    made = nbformat.read(good, as_version=4)
    made.cells[2].outputs = []
    made.metadata["papermill"] = {"duration": 3}
    nbformat.write(made, good)
    assert key_of(good, book, {}) == key, "outputs and notes do not decide"

    records = book / "records" / "good"
    records.mkdir(parents=True)
    (records / "quick.json").write_text("{}")
    assert key_of(good, book, {}) == key, "the quick record is what the execution makes"
    (records / "standard-cpu.json").write_text("{}")
    assert key_of(good, book, {}) != key
    assert key_of(board, book, {}) != board_key, "the scoreboard shows the records of all chapters"

    key, board_key = key_of(good, book, {}), key_of(board, book, {})
    made.cells[3].source += "\n1"
    nbformat.write(made, good)
    assert key_of(good, book, {}) != key and key_of(board, book, {}) != board_key


def test_a_key_file_of_half_a_line_counts_as_none(tmp_path: Path) -> None:
    job = Job(tmp_path / "a.ipynb", tmp_path / "out" / "a.ipynb", tmp_path / "a.log", "key", {})
    job.output.parent.mkdir()
    job.output.write_text("{}")
    job.key_file.write_text('{"key": "k')
    assert not job.finished and job.cost == float("inf")
    job.key_file.write_text(json.dumps({"key": "key", "seconds": 3.0}))
    assert job.finished and job.cost == 3.0


def test_place_names_the_cell() -> None:
    assert place(GOOD.cells, 2) == "3 of 4 (network)"


def test_the_caller_s_own_settings_do_not_reach_chapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "qtagg")
    monkeypatch.setenv("PAPERCORE_RECORDS", "/elsewhere")
    env = environment(tmp_path, threads=2, gpu=False)
    assert env["MPLBACKEND"] == "agg" and "PAPERCORE_RECORDS" not in env
    assert (
        env["OMP_NUM_THREADS"] == "2" and env["CUDA_VISIBLE_DEVICES"] == "" and env["HF_HUB_OFFLINE"] == "1"
    )
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE" not in environment(tmp_path, offline=False)
