"""Where runs and records lie on disk.

`runs/<slug>/<scale>-<digest>.json` holds any run; `book/records/<slug>/` the few that the book shows. Two environment
variables move them: PAPERCORE_RUNS (where runs are written) and PAPERCORE_RECORDS (folders looked in before book/records).
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import papercore

WHAT_TO_DO = "Free some space or name another folder (--out, PAPERCORE_RUNS)"


def source_root() -> Path | None:
    """The source tree that this package was imported from, or None for an installed copy."""
    root = Path(papercore.__file__).resolve().parent.parent
    return root if (root / "book" / "_toc.yml").is_file() else None


def runs_folder() -> Path:
    """Where runs are written: $PAPERCORE_RUNS, else runs/ in the source tree, else runs/ in the current folder."""
    named = os.environ.get("PAPERCORE_RUNS")
    return Path(named) if named else (source_root() or Path.cwd()) / "runs"


def record_folders() -> list[Path]:
    """Folders with records to show, first come first served."""
    named = [Path(p) for p in os.environ.get("PAPERCORE_RECORDS", "").split(os.pathsep) if p]
    root = source_root() or Path.cwd()
    return [*named, root / "book" / "records"]


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see the old file or the new one, never half.

    Raises:
        OSError: with the path and what to do, when the folder cannot be written or the disk is full; `path` is untouched.
    """
    write_together({path: write})
    return path


def write_together(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """`write_atomically` for files that belong together: none is renamed before all of them are on the disk.

    Raises:
        OSError: as `write_atomically`; all files are untouched when it comes from the writing.
    """
    with contextlib.ExitStack() as cleanup:
        temporaries = {}
        for path, write in files.items():
            with _explained(path):
                temporaries[path] = cleanup.enter_context(_temporary_beside(path))
                write(temporaries[path])
                with open(temporaries[path], "rb") as written:
                    os.fsync(written.fileno())
        for path, temporary in temporaries.items():
            with _explained(path):
                os.replace(temporary, path)


def refuse_unwritable(path: Path) -> None:
    """Find out before a long run, and not after it, that its result cannot be written to `path`.

    Raises:
        OSError: `path` is a folder, or no file can be made beside it; the message says what to do.
    """
    if path.is_dir():
        reason = f"is a folder, where a file was expected. {WHAT_TO_DO}"
        raise IsADirectoryError(errno.EISDIR, reason, str(path))
    with _explained(path), _temporary_beside(path):
        pass


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Let an OSError name `path` and say what to do."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; nothing was changed there. {WHAT_TO_DO}"
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """An empty file in the folder of `path`, removed at the end if it is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept, since numpy appends its own to a name without one.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    try:
        os.close(handle)
        Path(name).chmod(0o644)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
