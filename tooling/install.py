"""Make .venv and install papercore with the named extras into it, with a sign of life at least every ten seconds.

    python3 -m tooling.install book        # what `make book` needs
    python3 -m tooling.install test lint

A stamp in .venv remembers what was installed from which pyproject.toml and constraints.txt, so a second call returns at
once. Standard library alone: this runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = ROOT / "_build" / "logs" / "install.log"
OLDEST = (3, 11)
QUIET_SECONDS = 10.0
# What would make pip look or install outside .venv.
NOT_FOR_PIP = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")


def install(extras: list[str], root: Path = ROOT, venv: Path = VENV, log: Path = LOG) -> None:
    """Bring the environment to where all `extras` are installed from the present pyproject.toml and constraints.txt."""
    wanted, value = extras_within(extras, root / "pyproject.toml"), digest(root)
    usable, stamp = works(venv), read_stamp(venv)
    if usable and all(stamp.get(extra) == value for extra in wanted):
        say(f"papercore: the environment in {venv.name} is up to date ({', '.join(extras)}).")
        return
    if not usable:
        say(f"papercore: making {venv.name} with Python {sys.version.split()[0]}")
        make(venv)
    pins = len(re.findall(r"^[^#\s]+==", (root / "constraints.txt").read_text(), re.MULTILINE))
    say(
        f"papercore: installing papercore[{','.join(extras)}] in the tested versions (constraints.txt, {pins} pins)"
    )
    begun = time.monotonic()
    pip_install(extras, root, venv, log)
    write_stamp(venv, wanted, value)
    say(f"papercore: installed in {time.monotonic() - begun:.0f} s")


def say(text: str) -> None:
    print(text, flush=True)


def extras_within(extras: Iterable[str], pyproject: Path) -> set[str]:
    """The named extras and those that they contain (`papercore[book]` inside `test`)."""
    table = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    seen: set[str] = set()
    todo = list(extras)
    while todo:
        extra = todo.pop()
        if extra not in table:
            raise SystemExit(
                f"papercore: no extra {extra!r} in pyproject.toml; there are {', '.join(table)}."
            )
        if extra not in seen:
            seen.add(extra)
            for line in table[extra]:
                own = re.match(r"papercore\[([^\]]+)\]", line)
                todo += own.group(1).replace(" ", "").split(",") if own else []
    return seen


def digest(root: Path) -> str:
    """What an installation depends on: the two files, and where the source tree lies (it is installed editable)."""
    value = hashlib.sha256(str(root).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        value.update((root / name).read_bytes())
    return value.hexdigest()[:16]


def read_stamp(venv: Path) -> dict[str, str]:
    """Extra -> digest of what it was installed from; empty when there is no stamp, or half of one."""
    try:
        return dict(json.loads((venv / "papercore.json").read_text()))
    except (OSError, ValueError):
        return {}


def write_stamp(venv: Path, extras: set[str], value: str) -> None:
    """Remember these extras; those installed from other versions of the two files are forgotten."""
    kept = {extra: old for extra, old in read_stamp(venv).items() if old == value}
    temporary = venv / "papercore.json.new"
    temporary.write_text(json.dumps(kept | dict.fromkeys(extras, value), indent=1, sort_keys=True))
    temporary.replace(venv / "papercore.json")


def python_of(venv: Path = VENV) -> Path:
    """The environment's interpreter."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def works(venv: Path) -> bool:
    """True when the environment's Python starts, is new enough, has pip, and lies where it was made."""
    program = f"import sys, pip; print(sys.prefix if sys.version_info >= {OLDEST} else 'too old')"
    try:
        told = subprocess.run(
            [python_of(venv), "-c", program], capture_output=True, text=True, env=pip_environment()
        )
    except OSError:
        return False
    return told.returncode == 0 and told.stdout.strip() == str(venv)


def make(venv: Path) -> None:
    """An empty environment with pip, in place of what was there."""
    try:
        import ensurepip  # noqa: F401
        from venv import EnvBuilder
    except ImportError as error:
        raise SystemExit(
            f"papercore: this Python ({sys.executable}) cannot make virtual environments: {error}.\n"
            "On Debian and Ubuntu: sudo apt-get install python3-venv. Or name another Python: make book PYTHON=/path/to/python3"
        ) from None
    EnvBuilder(clear=venv.exists(), symlinks=os.name != "nt", with_pip=True, prompt="papercore").create(venv)


def pip_environment() -> dict[str, str]:
    """The caller's environment, less what would lead pip astray; its own settings of where packages come from stay."""
    env = {name: value for name, value in os.environ.items() if name not in NOT_FOR_PIP}
    return env | {
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
    }


def pip_install(extras: list[str], root: Path, venv: Path, log: Path) -> None:
    """Run pip; its full output goes to the log."""
    # Bytecode is compiled when a module is first imported: most of what is unpacked here never is.
    command: list[str | Path] = [
        python_of(venv),
        "-m",
        "pip",
        "install",
        "--progress-bar=off",
        "--no-compile",
    ]
    command += ["-c", root / "constraints.txt", "-e", f"{root}[{','.join(extras)}]"]
    log.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(venv)
    tail: list[str] = []
    with (
        open(log, "w", encoding="utf-8") as out,
        subprocess.Popen(
            command, cwd=root, env=pip_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        ) as pip,
        progress,
    ):  # fmt: skip
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                out.write(line)
                tail = [*tail[-24:], line]
                progress.line(line.strip())
        except KeyboardInterrupt:
            pip.wait()
            raise SystemExit(
                "\npapercore: stopped. What is installed stays in .venv; the next call goes on from there."
            ) from None
    if pip.returncode:
        raise SystemExit(
            f"{''.join(tail)}papercore: pip failed (exit status {pip.returncode}). Its full output is in {log}."
        )


class Progress:
    """Turns pip's output into a few lines, and a quiet stretch into a line every ten seconds."""

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.begun = self.shown = time.monotonic()
        self.found: set[str] = set()
        self.before, self.planned, self.doing = self.in_place(), 0, "starting pip"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            if time.monotonic() - self.shown >= QUIET_SECONDS:
                self.show(
                    f"unpacking: {self.unpacked()} of {self.planned} packages in place"
                    if self.planned
                    else self.doing
                )

    def in_place(self) -> int:
        """Packages in the environment now."""
        return sum(1 for _ in self.venv.glob("lib/python3*/site-packages/*.dist-info"))

    def unpacked(self) -> int:
        return min(max(self.in_place() - self.before, 0), self.planned)

    def show(self, text: str) -> None:
        self.shown = time.monotonic()
        say(f"  {self.shown - self.begun:4.0f} s  {text}")

    def line(self, text: str) -> None:
        """Take in one line of pip's output."""
        if name := re.match(r"(?:Collecting|Obtaining|Requirement already satisfied:) ([\w.-]+)", text):
            self.found.add(name[1].lower())
            self.doing = f"looking up {name[1]}; {len(self.found)} packages so far"
        elif fetched := re.match(r"(?:Downloading|Processing|Using cached) (\S+)(.*)", text):
            archive = "-".join(fetched[1].rsplit("/", 1)[-1].split("-")[:2])
            self.doing = f"fetching {archive}{fetched[2]}; {len(self.found)} packages so far"
            if re.search(r"\d{3,}(\.\d+)? MB|GB", fetched[2]):
                self.show(self.doing)
        elif text.startswith("Installing collected packages:"):
            self.planned = text.count(",") + 1
            self.show(f"unpacking {self.planned} packages into {self.venv.name}")
        elif text.startswith(("ERROR", "error:", "WARNING: Retrying")):
            self.show(text)


if __name__ == "__main__":
    install(sys.argv[1:] or ["book"])
