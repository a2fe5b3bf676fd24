"""Finished parts of a run, kept on disk: a killed run loses the part it was in and nothing else.

A part is a function without arguments that returns a flat dict of JSON values and numpy arrays. Its result is kept under the run's
config digest and source hash: a changed setting or a changed kernel starts afresh.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from papercore.lab.config import Config
from papercore.lab.paths import runs_folder, write_atomically
from papercore.lab.progress import say
from papercore.lab.sources import source_hash

DAMAGED = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class Stages:
    """Results of named parts of a run under one folder.

    Args:
        root: the folder; made when the first part is finished.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @classmethod
    def of(cls, config: Config) -> Self:
        """The parts of this config under the present source: runs/<slug>/<scale>-<digest>.parts/<source>."""
        name = f"{config.scale}-{config.digest()}.parts"
        return cls(runs_folder() / config.slug / name / source_hash(config.slug, config.scale))

    def get(self, name: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `part`, computed now or read from an earlier, interrupted run.

        A result computed now passes through the same file as one read back, so both are equal to the last digit.

        Raises:
            TypeError: the part returned something that is neither JSON nor a numpy array of numbers or text.
            OSError: the folder cannot be written or the disk is full.
        """
        path = self._path(name)
        result = _read(path)
        if result is None:
            begun = time.monotonic()
            say(f"  {name} ...")
            _write(path, name, part(), begun)
            shutil.rmtree(self.folder(name), ignore_errors=True)
            say(f"  {name} done in {time.monotonic() - begun:.1f} s")
            result = _read(path)
            if result is None:
                raise OSError(errno.EIO, "was written and cannot be read back", str(path))
        return result

    def seconds(self) -> float:
        """Seconds that the parts on disk took when they were computed."""
        return sum(_seconds(path) for path in self.root.glob("*.npz"))

    def done(self, name: str) -> bool:
        """Whether this part is on disk."""
        return self._path(name).is_file()

    def folder(self, name: str) -> Path:
        """Scratch of one part, for checkpoints inside it; removed when the part is finished."""
        return self._path(name).with_suffix(".scratch")

    def clear(self) -> None:
        """Remove every part: the record that they went into is on disk."""
        shutil.rmtree(self.root.parent, ignore_errors=True)

    def _path(self, name: str) -> Path:
        readable = re.sub(r"[^\w.-]+", "_", name)
        # Two names that read alike after cleaning must not share a file.
        mark = "" if readable == name else "-" + hashlib.sha256(name.encode()).hexdigest()[:6]
        return self.root / f"{readable}{mark}.npz"


def _write(path: Path, name: str, result: dict[str, Any], begun: float) -> None:
    """Keep a part's result, and how long it took, in one file."""
    plain = {k: v for k, v in result.items() if not isinstance(v, np.ndarray)}
    arrays = {f"array_{k}": v for k, v in result.items() if isinstance(v, np.ndarray)}
    if objects := [k.removeprefix("array_") for k, v in arrays.items() if v.dtype.hasobject]:
        raise TypeError(
            f"part {name!r}: array {objects[0]!r} holds Python objects, which cannot be kept on disk."
        )
    try:
        text = json.dumps(plain, default=_scalar)
    except TypeError as error:
        raise TypeError(f"part {name!r} returned what is neither JSON nor a numpy array: {error}.") from error
    seconds = np.array(time.monotonic() - begun)
    write_atomically(path, lambda p: np.savez_compressed(p, plain=np.array(text), seconds=seconds, **arrays))  # type: ignore[arg-type]


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _read(path: Path) -> dict[str, Any] | None:
    """The result of a part; None when it is not on disk, or when the disk lost some of it."""
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            plain = json.loads(str(stored["plain"]))
            return {
                **plain,
                **{k.removeprefix("array_"): stored[k] for k in stored.files if k.startswith("array_")},
            }
    except FileNotFoundError:
        return None
    except DAMAGED:
        say(f"  {path} is damaged: computing this part again")
        return None


def _seconds(path: Path) -> float:
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            return float(stored["seconds"])
    except DAMAGED:
        return 0.0
