"""`make refresh`: the one way in which committed notebooks, quick records and the README's summary come to be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tooling.clean import clean_file, problems
from tooling.contents import SCOREBOARD, notebooks
from tooling.execute import BOOK, execute, say, shown
from tooling.sandbox import BUILD, ROOT, environment

# In processes of their own, since papercore finds runs and records through its environment.
COPY_RECORD = """
import sys
from papercore.experiments import configure, run_path
from papercore.lab.record import Record
slug, target = sys.argv[1:]
Record.load(run_path(configure(slug, "quick", "cpu"))).save(target)
"""
UPDATE_README = "from tooling.readme import update; update()"


def refresh_all(book: Path = BOOK, build: Path = BUILD) -> int:
    """Execute all chapters from scratch; write their records and notebooks, the README's summary and the scoreboard."""
    chapters = [path for path in notebooks(book) if path.stem != SCOREBOARD]
    shutil.rmtree(build / "runs", ignore_errors=True)  # a record that lies there would be reused
    if not _execute(chapters, book, build):
        return 1
    for chapter in chapters:
        target = book / "records" / chapter.stem / "quick.json"
        subprocess.run(
            [sys.executable, "-c", COPY_RECORD, chapter.stem, str(target)],
            cwd=ROOT,
            env=environment(build, gpu=False),
            check=True,
        )
        say(f"wrote {shown(target)}")
    subprocess.run(
        [sys.executable, "-c", UPDATE_README], cwd=ROOT, env=environment(build, gpu=False), check=True
    )
    say("wrote the scoreboard's summary in README.md")
    board = [path for path in notebooks(book) if path.stem == SCOREBOARD]
    if board and not _execute(board, book, build):
        return 1
    found = [f"{path.name}: {problem}" for path in (*chapters, *board) for problem in problems(path)]
    for line in found:
        say(line)
    return int(bool(found))


def _execute(paths: list[Path], book: Path, build: Path) -> bool:
    """Execute and write back cleaned; False when one of them failed, and then nothing is written."""
    done = execute([path.stem for path in paths], book=book, build=build, force=True)
    if any(job.failure for job in done):
        say("refresh: nothing was written, since a notebook failed")
        return False
    for job in done:
        clean_file(job.output, job.notebook)
        say(f"wrote {shown(job.notebook)} ({job.notebook.stat().st_size / 1e3:.0f} kB)")
    return True
