"""Execute the book's notebooks with papermill, several at a time, and keep the results for everything that needs them.

    python -m tooling.execute                                     # quick scale, no network, into _build/notebooks
    python -m tooling.execute --only mezo --force
    python -m tooling.execute --scale standard --device cuda      # what `make gpu` does

One execution feeds the page, nbval and the comparison of records. It is reused as long as its key is the same: a digest
over the notebook's cells, the sources and claims of papercore, the records shown in the chapter and the pinned versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from tooling.contents import SCOREBOARD, notebooks
from tooling.sandbox import BUILD, ROOT, cores, environment, free_gigabytes

BOOK = ROOT / "book"
GIGABYTES_A_CHAPTER = 4.0
SECONDS_BETWEEN_LINES = 15.0
SECONDS_A_CELL = 1800  # generous: quick chapters end within two minutes, on a busy machine within ten
# These decide how a notebook is executed, so a change in them makes old executions worthless.
ENGINE = (
    "tooling/execute.py",
    "tooling/one_notebook.py",
    "tooling/sandbox.py",
    "tooling/offline/sitecustomize.py",
    "constraints.txt",
)


@dataclasses.dataclass
class Job:
    """One notebook to execute, and what became of it."""

    notebook: Path
    output: Path
    log: Path
    key: str
    parameters: dict[str, Any]
    seconds: float = 0.0
    reused: bool = False
    failure: str = ""

    @property
    def name(self) -> str:
        return self.notebook.stem

    @property
    def key_file(self) -> Path:
        return self.output.with_suffix(".json")

    @property
    def cost(self) -> float:
        """Seconds of the last execution; unknown ones count as long, so that they start early."""
        try:
            return float(json.loads(self.key_file.read_text())["seconds"])
        except (OSError, ValueError, KeyError):
            return float("inf")

    @property
    def finished(self) -> bool:
        """True when the output on disk is of exactly this key."""
        try:
            return self.output.is_file() and json.loads(self.key_file.read_text())["key"] == self.key
        except (OSError, ValueError, KeyError):
            return False


def execute(
    only: Iterable[str] = (),
    *,
    book: Path = BOOK,
    build: Path = BUILD,
    runs: Path | None = None,
    parameters: dict[str, Any] | None = None,
    jobs: int | None = None,
    offline: bool = True,
    force: bool = False,
) -> list[Job]:
    """Execute the chapters side by side and then the scoreboard; print a line as each starts and ends.

    Args:
        only: names of notebooks; empty means all of the table of contents.
        build: takes notebooks, logs, caches and, unless `runs` says otherwise, the records.
        parameters: values for the parameters cell; none are injected when it is empty.
        jobs: how many at a time; default: as many as cores and free memory carry.
        offline: block the network, and hide GPUs: quick scale is the same everywhere.
        force: execute also what has not changed.

    Returns:
        One Job a notebook; `failure` is empty where it went well.
    """
    todo = [_job(path, book, build, parameters or {}) for path in _chosen(book, only)]
    for job in todo:
        job.reused = job.finished and not force
    waiting = [job for job in todo if not job.reused]
    chapters = sorted((job for job in waiting if job.name != SCOREBOARD), key=lambda job: -job.cost)
    at_once = max(min(jobs or _at_once(), len(chapters)), 1)
    threads = max(cores() // at_once, 1)
    reused = [job.name for job in todo if job.reused]
    if reused:
        say(f"notebooks: unchanged since they were executed, and reused: {', '.join(reused)}")
    if waiting:
        say(
            f"notebooks: executing {', '.join(job.name for job in waiting)}; {at_once} at a time, {threads} threads each"
        )
    runner = Runner(environment(build, runs=runs, threads=threads, offline=offline, gpu=not offline))
    runner.run(chapters, at_once)
    board = [job for job in waiting if job.name == SCOREBOARD]
    if board and any(job.failure for job in chapters):
        board[0].failure = "not executed, since it would show the numbers of a chapter that failed"
        say(f"  {SCOREBOARD:12}  {board[0].failure}")
    else:
        runner.run(board, 1)
    return todo


class Runner:
    """Runs jobs as child processes and tells how they fare."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self.children: list[subprocess.Popen[bytes]] = []
        self.stopped = False

    def run(self, jobs: list[Job], at_once: int) -> None:
        """Run the jobs, `at_once` at a time. Ctrl-C stops the running ones; finished ones stay."""
        if not jobs:
            return
        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(self._one, job) for job in jobs]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:
                for future in futures:
                    future.cancel()
                self._stop()
                raise SystemExit(
                    "\nstopped; chapters that had ended are kept, and so are finished parts of the others"
                ) from None

    def _stop(self) -> None:
        self.stopped = True
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)  # papermill ends its kernel, which ends its own children
        for child in self.children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)

    def _one(self, job: Job) -> None:
        begun = time.monotonic()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.output.parent.mkdir(parents=True, exist_ok=True)
        job.key_file.unlink(missing_ok=True)
        partial = job.log.with_suffix(".ipynb")
        partial.unlink(missing_ok=True)
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "tooling.one_notebook", str(job.notebook), str(partial)]
        command += [json.dumps(job.parameters), str(SECONDS_A_CELL), str(writing)]
        say(f"  {job.name:12}  started")
        with open(job.log, "w", encoding="utf-8") as log, open(reading, encoding="utf-8") as reports:
            child = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[writing], start_new_session=True,
            )  # fmt: skip
            os.close(writing)
            self.children.append(child)
            with _Listener(job.name, reports) as told:
                code = child.wait()
        job.seconds = time.monotonic() - begun
        if code == 0:
            partial.replace(job.output)
            job.key_file.write_text(json.dumps({"key": job.key, "seconds": round(job.seconds, 1)}))
            say(f"  {job.name:12}  done in {job.seconds:.0f} s")
        else:
            job.failure = told.failure or f"its process ended with status {code}"
            if self.stopped:
                return
            say(f"  {job.name:12}  FAILED after {job.seconds:.0f} s: {job.failure}")
            say(
                f"  {'':12}  log {shown(job.log)}"
                + (f", notebook so far {shown(partial)}" if partial.exists() else "")
            )


class _Listener:
    """Reads a child's reports (one JSON object a line) and prints where it is from time to time."""

    def __init__(self, name: str, stream: IO[str]) -> None:
        self.name, self.stream = name, stream
        self.failure, self.place = "", ""
        self.begun = time.monotonic()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read, self._beat)]

    def __enter__(self) -> _Listener:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(5)

    def _read(self) -> None:
        for line in self.stream:
            try:
                report = json.loads(line)
            except ValueError:
                continue
            self.place = report.get("place", self.place)
            self.failure = report.get("failure", self.failure)

    def _beat(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LINES):
            say(f"  {self.name:12}  {time.monotonic() - self.begun:.0f} s, {self.place or 'starting'}")


def key_of(notebook: Path, book: Path, parameters: dict[str, Any]) -> str:
    """Digest over everything that decides what the execution of this notebook gives."""
    value = hashlib.sha256(f"{sys.version_info[:2]}{json.dumps(parameters, sort_keys=True)}".encode())
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        value.update(f"{cell['cell_type']}\0{source}\0".encode())
    package = sorted(
        path for path in (ROOT / "papercore").rglob("*") if path.suffix in {".py", ".yml", ".csv", ".json"}
    )
    # A chapter shows its own committed records; the scoreboard those of all chapters.
    shown_records = book / "records" / ("" if notebook.stem == SCOREBOARD else notebook.stem)
    # Not its quick record: that one is what the execution makes.
    records = (
        sorted(path for path in shown_records.rglob("*.*") if path.stem != "quick")
        if shown_records.is_dir()
        else []
    )
    for path in [*(ROOT / name for name in ENGINE), *package, *records]:
        value.update(f"{path.name}\0".encode() + path.read_bytes())
    if notebook.stem == SCOREBOARD:
        for chapter in notebooks(book):
            value.update(b"" if chapter == notebook else key_of(chapter, book, parameters).encode())
    return value.hexdigest()[:20]


def say(text: str) -> None:
    print(text, flush=True)


def shown(path: Path) -> str:
    """A path as the reader can type it: relative to the source tree where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _job(notebook: Path, book: Path, build: Path, parameters: dict[str, Any]) -> Job:
    # The scoreboard is the only notebook without a parameters cell.
    own = {} if notebook.stem == SCOREBOARD else parameters
    folder, logs = build / "notebooks", build / "logs"
    return Job(
        notebook, folder / notebook.name, logs / f"{notebook.stem}.log", key_of(notebook, book, own), own
    )


def _chosen(book: Path, only: Iterable[str]) -> list[Path]:
    there = {path.stem: path for path in notebooks(book)}
    unknown = sorted(set(only) - set(there))
    if unknown:
        raise SystemExit(
            f"no notebook {', '.join(unknown)} in the table of contents; there are {', '.join(there)}"
        )
    return [path for name, path in there.items() if not only or name in only]


def _at_once() -> int:
    return max(
        min(cores(), int(free_gigabytes() // GIGABYTES_A_CHAPTER) if free_gigabytes() < 1e6 else cores()), 1
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tooling.execute", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="notebooks to execute (default: all)"
    )
    parser.add_argument("--scale", default="quick", choices=["quick", "standard", "paper"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--jobs", type=int, help="how many at a time")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder for notebooks, logs and runs")
    parser.add_argument("--force", action="store_true", help="execute also what has not changed")
    words = parser.parse_args()
    chosen = {"scale": words.scale, "device": words.device}
    parameters = {
        name: value for name, value in chosen.items() if value != {"scale": "quick", "device": "auto"}[name]
    }
    done = execute(
        words.only,
        build=words.build.resolve(),
        parameters=parameters,
        jobs=words.jobs,
        offline=words.scale == "quick",
        force=words.force,
    )
    return int(any(job.failure for job in done))


if __name__ == "__main__":
    sys.exit(main())
