"""The make targets, after installation: python -m tooling book | test | html | lab | bench | lint | gpu | nbval | refresh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tooling import check
from tooling.contents import SCOREBOARD, notebooks
from tooling.execute import BOOK, Job, execute, say, shown
from tooling.render import render
from tooling.sandbox import BUILD, ROOT, cores, environment

RUNS = ROOT / "runs"


def book() -> int:
    """Execute what changed, build the pages, say where they are and what holds."""
    if failed(execute()):
        return 1
    pages = render(BUILD / "notebooks")
    say("\nThe scoreboard, chapter by chapter:")
    subprocess.run(
        [sys.executable, "-m", "papercore", "claims", "--summary"], cwd=ROOT, env=environment(gpu=False)
    )
    say(f"\nThe book is at {pages / 'index.html'}")
    return 0


def html() -> int:
    """Build the pages from the stored outputs."""
    say(f"The book is at {render(None) / 'index.html'}")
    return 0


def lab() -> int:
    """Jupyter with the chapters, in the user's own settings."""
    return subprocess.run([sys.executable, "-m", "jupyterlab", *sys.argv[2:]], cwd=BOOK).returncode


def bench() -> int:
    """Side-by-side measurements, one process, one thread: ratios are what counts."""
    results = BUILD / "benchmarks.json"
    results.parent.mkdir(exist_ok=True)
    # The folder is left out of plain pytest runs, so it is let in here.
    command = [
        *check.PYTEST,
        "-o",
        "norecursedirs=.* _build runs",
        "-s",
        f"--benchmark-json={results}",
        str(ROOT / "tests" / "benchmarks"),
        *sys.argv[2:],
    ]
    code = subprocess.run(command, cwd=ROOT, env=environment(threads=1)).returncode
    say(f"All measurements: {shown(results)}")
    return code


def lint() -> int:
    """ruff (rules, then layout) and mypy; all three report, whichever fails."""
    commands = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"])
    return max(
        [subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode for command in commands]
    )


def gpu() -> int:
    """Chapters at standard scale on CUDA, one at a time. Data and models are found as lab/data.py says; the network is open."""
    import torch

    if not torch.cuda.is_available():
        say(
            f"make gpu: torch {torch.__version__} sees no CUDA device. At standard scale on a CPU: papercore run SLUG --scale standard --device cpu"
        )
        return 1
    say(f"make gpu: standard scale on {torch.cuda.get_device_name()}")
    chapters = [path.stem for path in notebooks(BOOK) if path.stem != SCOREBOARD]
    done = execute(
        chapters,
        build=BUILD / "gpu",
        runs=RUNS,
        parameters={"scale": "standard", "device": "cuda"},
        jobs=1,
        offline=False,
    )
    claims = subprocess.run(
        [sys.executable, "-m", "papercore", "claims", "--scale", "standard"],
        cwd=ROOT,
        env=environment(BUILD / "gpu", runs=RUNS),
    )
    say(f"Executed notebooks: {shown(BUILD / 'gpu' / 'notebooks')}; records: {shown(RUNS)}")
    return max(failed(done), claims.returncode)


def nbval() -> int:
    """Every notebook executed anew by nbval, beside the outputs stored in it."""
    command = [
        *check.PYTEST,
        "--nbval-lax",
        "--nbval-current-env",
        "--nbval-kernel-startup-timeout=300",
        *map(str, notebooks(BOOK)),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment(BUILD / "nbval", threads=cores())).returncode


def refresh() -> int:
    """Execute everything anew; write the cleaned notebooks and the quick records that are committed."""
    from tooling.refresh import refresh_all

    return refresh_all()


def failed(jobs: list[Job]) -> int:
    """1 after a line on each notebook that failed, else 0."""
    bad = [job for job in jobs if job.failure]
    for job in bad:
        say(f"\n{job.name}: {job.failure}" + (f"\n  log: {shown(job.log)}" if job.log.exists() else ""))
    return int(bool(bad))


TARGETS = {f.__name__: f for f in (book, html, lab, bench, lint, gpu, nbval, refresh)} | {"test": check.check}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        say(f"python -m tooling: no target {name!r}; there are {', '.join(TARGETS)}")
        return 2
    os.chdir(Path(ROOT))
    try:
        return TARGETS[name]()
    except (RuntimeError, ValueError) as error:
        say(f"\nmake {name}: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
