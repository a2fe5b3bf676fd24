import os
import subprocess
import sys
from pathlib import Path

import pytest

from tooling.install import Progress, digest, extras_within, make, read_stamp, works, write_stamp

ROOT = Path(__file__).resolve().parents[2]


def test_extras_within_extras_are_followed() -> None:
    found = extras_within(["test"], ROOT / "pyproject.toml")
    assert {"test", "book", "fast", "hf", "data"} <= found
    assert not found & {"evals", "bench", "jupyter", "lint"}, (
        "the tests must not install what they do not need"
    )


def test_book_installs_no_more_than_it_needs() -> None:
    assert extras_within(["book"], ROOT / "pyproject.toml") == {"book", "fast", "hf"}


def test_an_unknown_extra_is_refused() -> None:
    with pytest.raises(SystemExit, match="no extra 'boook' in pyproject.toml; there are book, test"):
        extras_within(["boook"], ROOT / "pyproject.toml")


def test_the_stamp_forgets_what_was_installed_from_other_files(tmp_path: Path) -> None:
    assert read_stamp(tmp_path) == {}
    write_stamp(tmp_path, {"book"}, "one")
    write_stamp(tmp_path, {"test"}, "one")
    assert read_stamp(tmp_path) == {"book": "one", "test": "one"}
    write_stamp(tmp_path, {"lint"}, "two")
    assert read_stamp(tmp_path) == {"lint": "two"}
    (tmp_path / "papercore.json").write_text("{")
    assert read_stamp(tmp_path) == {}


def test_a_change_of_either_file_asks_for_a_new_installation(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("a")
    before = digest(tmp_path)
    assert digest(tmp_path) == before
    (tmp_path / "constraints.txt").write_text("b")
    assert digest(tmp_path) != before


def test_a_broken_environment_does_not_work(tmp_path: Path) -> None:
    assert not works(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(tmp_path / "gone")
    assert not works(tmp_path)


def test_a_python_without_venv_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(
        SystemExit, match=r"(?s)cannot make virtual environments.*apt-get install python3-venv"
    ):
        make(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_progress_tells_of_large_downloads_errors_and_packages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    (site / "pip-24.dist-info").mkdir(parents=True)
    progress = Progress(tmp_path)
    for line in (
        "Collecting torch>=2.11 (from papercore)",
        "Downloading small-1.0-py3-none-any.whl (12 kB)",
        "WARNING: something that only the log needs",
        "Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (191.5 MB)",
        "Installing collected packages: a, b, c",
        "ERROR: no space left on device",
    ):
        progress.line(line)
    (site / "a-1.dist-info").mkdir()
    assert progress.unpacked() == 1
    shown = [line.split(" s  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == [
        "fetching torch-2.13.0 (191.5 MB); 1 packages so far",
        f"unpacking 3 packages into {tmp_path.name}",
        "ERROR: no space left on device",
    ]


def test_an_old_python_is_told_what_to_do(tmp_path: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python"):
        fake = tmp_path / name
        fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
        fake.chmod(0o755)
    env = {
        name: value for name, value in os.environ.items() if name not in {"PYTHON", "MAKEFLAGS", "MAKELEVEL"}
    }
    env["PATH"] = f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"
    told = subprocess.run(["make", "book"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert told.returncode != 0
    assert (
        "papercore needs Python 3.11 or later, and none was found: python3 on PATH is Python 3.9.2."
        in told.stderr
    )
    assert "make book PYTHON=" in told.stderr
