"""A copy of papercore with one small chapter, to run the real command line on: nothing of it is patched.

`ToyBook.start` gives a real process of `python -m papercore`. Importing torch is most of what such a process does, so
`ToyBook.call` forks one that has it imported already; arguments, environment, output and exit status are the same.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papercore

PACKAGE = Path(papercore.__file__).resolve().parent
CHAPTER = Path(__file__).resolve().parent / "toy_chapter"

# Reads {"words", "env", "out", "err"} a line, answers with the exit status of a forked child that ran those words.
FORKING = """
import json, os, sys
import numpy, torch, yaml
from papercore.cli import main

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.environ.clear()
            os.environ.update(asked["env"])
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            try:
                status = main(asked["words"])
            except SystemExit as end:
                status = end.code
            except BaseException:
                import traceback
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class ToyBook:
    """The copy in `root`, with its runs in `root/runs`."""

    def __init__(self, root: Path) -> None:
        self.root, self.package = root, root / "papercore"
        for name in ("__init__.py", "__main__.py", "cli.py", "lab", "experiments/__init__.py"):
            target = self.package / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (PACKAGE / name).is_dir() else shutil.copyfile
            copy(
                PACKAGE / name,
                target,
                **({"ignore": shutil.ignore_patterns("__pycache__")} if copy is shutil.copytree else {}),
            )
        with (self.package / "experiments" / "__init__.py").open("a") as registry:
            registry.write('\nCHAPTERS = {"toy": Chapter("toy", "A toy", "Tests", "0000.00000")}\n')
        self.experiment = self.package / "experiments" / "toy" / "__init__.py"
        self.claims = self.package / "claims" / "toy.yml"
        for source, target in (
            (CHAPTER / "experiment.py", self.experiment),
            (CHAPTER / "claims.yml", self.claims),
        ):
            target.parent.mkdir(parents=True)
            shutil.copyfile(source, target)
        self.runs = root / "runs"
        self.records = root / "book" / "records" / "toy"
        self.records.mkdir(parents=True)
        (root / "book" / "_toc.yml").touch()  # what a source tree is recognised by
        self.log = root / "log"
        self._server: subprocess.Popen[str] | None = None

    def reset(self) -> None:
        """The book as it was at first."""
        for folder in (self.runs, self.records):
            shutil.rmtree(folder, ignore_errors=True)
        self.records.mkdir()
        shutil.copyfile(CHAPTER / "claims.yml", self.claims)
        shutil.copyfile(CHAPTER / "experiment.py", self.experiment)
        self.log.unlink(missing_ok=True)

    def environment(self, **more: str) -> dict[str, str]:
        """Variables under which this copy is the papercore that Python imports."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("PAPERCORE_", "TOY_"))}
        path = os.pathsep.join([str(self.root), *filter(None, [own.get("PYTHONPATH")])])
        return own | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOY_LOG": str(self.log)} | more

    def call(self, *words: str, **env: str) -> Done:
        """Run `papercore WORDS` to its end."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", FORKING],
                cwd=self.root,
                env=self.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin and self._server.stdout
        out, err = self.root / "out", self.root / "err"
        asked = {"words": words, "env": self.environment(**env), "out": str(out), "err": str(err)}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return Done(status, out.read_text(), err.read_text())

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """`python -m papercore WORDS` as a process of its own, with a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "papercore", *words],
            cwd=self.root, env=self.environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until `path` is there; fail when the process ends first."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None:
            raise AssertionError(f"the process ended first: {process.communicate()}")
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no {path.name} after {seconds:.0f} s")
        time.sleep(0.02)


def files(folder: Path) -> list[str]:
    """Every file under a folder, by its name from there."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
