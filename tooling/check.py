"""`make test`: everything that must hold, in order, with a summary at the end.

A step that fails does not keep the others from running, except where they would only repeat its failure.
"""

from __future__ import annotations

import dataclasses
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

from tooling import scan
from tooling.contents import notebooks
from tooling.execute import BOOK, execute, say, shown
from tooling.render import render
from tooling.sandbox import BUILD, ROOT, cores, environment

PYTEST = [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={BUILD / 'cache' / 'pytest'}"]
QUIET_SECONDS = 15.0
MOST_WORKERS = 8  # each takes a gigabyte or two once torch is imported


@dataclasses.dataclass(eq=False)
class Step:
    """A part of the check: its title, what it does (text of what went wrong, or nothing), what must be good before it."""

    title: str
    run: Callable[[], str]
    after: Step | None = None
    outcome: str = "not reached"
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.title.partition(":")[0]

    @property
    def good(self) -> bool:
        return self.outcome == "ok"

    def go(self) -> None:
        if self.after is not None and not self.after.good:
            self.outcome = f"not run, since '{self.after.name}' is not good"
            return
        say(f"\n== {self.title}")
        begun = time.monotonic()
        try:
            self.outcome = self.run() or "ok"
        except (RuntimeError, ValueError) as error:
            say(str(error))
            self.outcome = "failed"
        self.seconds = time.monotonic() - begun


def check() -> int:
    """Everything that must hold; 0 when it does."""
    executed = Step("notebooks: executed at quick scale, without network", notebooks_execute)
    tested = Step("tests: units, docstrings, command line, distributed", unit_tests)
    compared = Step(
        "committed: stored outputs (nbval) and records beside the execution", compare_with_committed, executed
    )
    judged = Step("claims: the verdicts of the execution", claims, executed)
    built = Step("pages: strict build from the execution", build_pages, executed)
    scanned = Step("scan: no request to another host", scan_pages, built)
    return run_steps([executed, tested, compared, judged, built, scanned])


def run_steps(steps: list[Step]) -> int:
    """Run the steps in order and sum up; 0 when every one is good."""
    for step in steps:
        step.go()
    say("\n== summary")
    for step in steps:
        say(f"  {step.seconds:6.1f} s  {step.name:10}  {step.outcome}")
    good = all(step.good for step in steps)
    say(f"make test: {'all good' if good else 'FAILED'} in {sum(step.seconds for step in steps):.0f} s")
    return 0 if good else 1


def notebooks_execute() -> str:
    bad = [f"{job.name}: {job.failure} (log {shown(job.log)})" for job in execute() if job.failure]
    return "; ".join(bad)


def unit_tests() -> str:
    workers = max(2, min(cores(), MOST_WORKERS))
    # Tests write their runs elsewhere, so that none of them can touch the records of the execution.
    env = environment(runs=BUILD / "test" / "runs", threads=max(cores() // workers, 1))
    (BUILD / "test").mkdir(exist_ok=True)
    return pytest(
        [
            "-n",
            str(workers),
            "--dist",
            "worksteal",
            f"--basetemp={BUILD / 'test' / 'tmp'}",
            "--ignore=tests/test_records.py",
        ],
        env,
    )


def compare_with_committed() -> str:
    env = environment(gpu=False) | {"PAPERCORE_EXECUTED": str(BUILD / "runs")}
    own = [
        "-p",
        "tooling.replay_plugin",
        f"--executed={BUILD / 'notebooks'}",
        "--nbval-lax",
        "--nbval-kernel-name=papercore-replay",
    ]
    return pytest(
        [*own, "--nbval-kernel-startup-timeout=300", *map(str, notebooks(BOOK)), "tests/test_records.py"], env
    )


def pytest(arguments: list[str], env: dict[str, str]) -> str:
    """Run pytest, pass its output on as it comes, and give a sign of life while a long test says nothing."""
    # Colours only where someone looks: the closing lines are read by programs too.
    env = env | {
        "PY_COLORS": "1" if os.isatty(1) else "0",
        "COLUMNS": str(shutil.get_terminal_size((100, 20)).columns),
    }
    begun = time.monotonic()
    with subprocess.Popen(
        [*PYTEST, *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        assert child.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(child.stdout, selectors.EVENT_READ)
            while True:
                if not waiting.select(QUIET_SECONDS):
                    say(f" ({time.monotonic() - begun:.0f} s, a long one)")
                elif piece := os.read(child.stdout.fileno(), 1 << 16):
                    sys.stdout.buffer.write(piece)
                    sys.stdout.buffer.flush()
                else:
                    break
    return {0: "", 2: "interrupted", 5: "no test was found"}.get(child.returncode, "failed")


def claims() -> str:
    code = subprocess.run(
        [sys.executable, "-m", "papercore", "claims", "--summary", "--scale", "quick"],
        cwd=ROOT,
        env=environment(gpu=False),
    ).returncode
    return "" if code == 0 else "an unexpected verdict (see above)"


def build_pages() -> str:
    render(BUILD / "notebooks")
    return ""


def scan_pages() -> str:
    found = scan.scan(BUILD / "html")
    for line in found:
        say(line)
    return f"{len(found)} findings" if found else ""
