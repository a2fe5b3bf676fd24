"""Where data sets lie: a name becomes a folder, a zip or a list of rows, or a clear error. Never a substitute.

Order of search, for every name:
    1. the path that the caller gives;
    2. the folder named by the environment variable PAPERCORE_DATA: `$PAPERCORE_DATA/<name>`;
    3. NLTK corpora only: NLTK's own search path (`$NLTK_DATA`, `~/nltk_data`, ...), zipped or unpacked;
       everything else: the Hugging Face cache or hub, through the `datasets` library, if it is installed.

Glossary
    name     what this book calls the set ("cifar10", "qc", "super_glue")
    config   the hub's word for a part of a set ("rte" of "super_glue"); a sub-folder on disk
    split    "train", "test", ...; the file `<split>.parquet`, `<split>-*.parquet` or `<split>.jsonl`
"""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["HUB", "Missing", "corpus", "corpus_text", "folder", "images", "rows"]

# Names of this book -> (hub id, default config). A name that is not here is taken as a hub id itself.
HUB: dict[str, tuple[str, str | None]] = {
    "cifar10": ("uoft-cs/cifar10", None),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "sst2": ("stanfordnlp/sst2", None),
    "super_glue": ("aps/super_glue", None),
    "squad": ("rajpurkar/squad", None),
    "drop": ("ucinlp/drop", None),
}


class Missing(ValueError):
    """Data or a model is not on this machine. The text names what, where we looked, and one command that gets it."""

    def __init__(self, what: str, tried: list[str], command: str):
        self.what, self.tried, self.command = what, list(tried), command
        places = "\n".join(f"  - {place}" for place in tried)
        super().__init__(f"{what} was not found. Looked in:\n{places}\nTo get it:\n  {command}")


def folder(name: str, *, path: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a data set, from an explicit `path` or from `$PAPERCORE_DATA/<name>`.

    Raises `Missing` when neither exists. This function never asks the hub: `rows` does.

    >>> import tempfile
    >>> here = tempfile.mkdtemp()
    >>> folder("cifar10", path=here) == Path(here)
    True
    """
    found, tried = _folder(name, path)
    if found is None:
        raise Missing(f"the data set {name!r}", tried, _hub_command(name, None))
    return found


def rows(
    name: str,
    split: str,
    *,
    config: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """All rows of one split, as dictionaries with the hub's column names.

    From a folder when one is named (parquet, or JSON lines, in the hub's layout: `<split>.parquet`,
    `<split>-00000-of-00001.parquet`, either of them under `data/` or `<config>/`), else by `datasets.load_dataset`
    from its cache or the hub.

    Raises `Missing` when the set is nowhere, `ValueError` when it is there without this split.
    """
    found, tried = _folder(name, path)
    if found is not None:
        return _rows_of_folder(found, name, split, config)
    hub, default = HUB.get(name, (name, None))
    config = config or default
    command = _hub_command(name, config)
    try:
        from datasets import load_dataset
    except ImportError:
        tried.append("the hub: the package `datasets` is not installed (pip install datasets)")
        raise Missing(f"the data set {name!r}", tried, command) from None
    try:
        return [dict(row) for row in load_dataset(hub, config, split=split)]
    except Exception as error:  # offline, unknown id, unknown split: the library has one class for each
        tried.append(f"the hub's {hub!r}: {type(error).__name__}: {_first_line(error)}")
        raise Missing(f"the split {split!r} of the data set {name!r}", tried, command) from error


def images(
    name: str, split: str, *, path: str | os.PathLike[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one split: uint8 `[N, H, W, 3]` and int64 `[N]`, from the columns `img` and `label`."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("reading images needs Pillow: pip install pillow") from None
    table = rows(name, split, path=path)
    if not table or not {"img", "label"} <= set(table[0]):
        columns = sorted(table[0]) if table else []
        raise ValueError(f"{name!r} has the columns {columns} in its split {split!r}; needed: img, label")
    pixels = [_decode(row["img"], Image) for row in table]
    return np.stack(pixels), np.asarray([row["label"] for row in table], dtype=np.int64)


def corpus(name: str, *, path: str | os.PathLike[str] | None = None) -> Path:
    """The zip file or folder of one NLTK corpus ("qc", "sentence_polarity", ...).

    `path` may be the zip, the unpacked folder, or a folder that holds either (itself, or under `corpora/`).
    Otherwise `$PAPERCORE_DATA` (and its `nltk_data/`) and NLTK's search path are looked through.
    NLTK itself is not needed. Raises `Missing`.
    """
    if path is not None:
        given = Path(path).expanduser()
        if given.suffix == ".zip" and given.is_file():
            return given
        if (given / "README").exists() or (given.name == name and given.is_dir()):
            return given
        roots = [given]
    else:
        roots = _nltk_roots()
    tried: list[str] = []
    if path is None and "PAPERCORE_DATA" not in os.environ and "NLTK_DATA" not in os.environ:
        tried.append("PAPERCORE_DATA and NLTK_DATA: not set")
    for root in roots:
        for parent in (root / "corpora", root):
            for candidate in (parent / f"{name}.zip", parent / name):
                if candidate.exists():
                    return candidate
        tried.append(f"{root / 'corpora'} ({name}.zip or {name}/)")
    raise Missing(f"the NLTK corpus {name!r}", tried, f"pip install nltk && python -m nltk.downloader {name}")


def corpus_text(name: str, file: str, *, path: str | os.PathLike[str] | None = None) -> str:
    """One file of an NLTK corpus as text (latin-1, which is what these corpora are in and which never fails).

    The zip is read directly: NLTK's newer readers refuse some locations. Raises `Missing`, or `ValueError` naming
    the files that are there.
    """
    place = corpus(name, path=path)
    if place.is_dir():
        target = place / file
        if not target.is_file():
            there = sorted(item.name for item in place.iterdir())
            raise ValueError(f"the corpus {name!r} in {place} has no file {file!r}; it has {there}")
        return target.read_text(encoding="latin-1")
    try:
        with zipfile.ZipFile(place) as archive:
            inside = {item.split("/", 1)[-1]: item for item in archive.namelist() if not item.endswith("/")}
            if file not in inside:
                raise ValueError(
                    f"the corpus {name!r} in {place} has no file {file!r}; it has {sorted(inside)}"
                )
            # universal newlines, as when an unpacked file is opened
            return io.TextIOWrapper(io.BytesIO(archive.read(inside[file])), encoding="latin-1").read()
    except zipfile.BadZipFile:
        raise ValueError(
            f"{place} is no readable zip file; remove it and fetch the corpus {name!r} again"
        ) from None


def corpus_files(name: str, *, path: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of all files of an NLTK corpus, sorted."""
    place = corpus(name, path=path)
    if place.is_dir():
        return sorted(item.name for item in place.iterdir() if item.is_file())
    with zipfile.ZipFile(place) as archive:
        return sorted(item.split("/", 1)[-1] for item in archive.namelist() if not item.endswith("/"))


def _folder(name: str, path: str | os.PathLike[str] | None) -> tuple[Path | None, list[str]]:
    if path is not None:
        given = Path(path).expanduser()
        if given.is_dir():
            return given, []
        raise Missing(
            f"the data set {name!r}", [f"{given} (the path given): no such folder"], _hub_command(name, None)
        )
    root = os.environ.get("PAPERCORE_DATA")
    if not root:
        return None, ["PAPERCORE_DATA: not set"]
    for candidate in (Path(root).expanduser() / name, Path(root).expanduser() / name.rsplit("/", 1)[-1]):
        if candidate.is_dir():
            return candidate, []
    return None, [f"PAPERCORE_DATA: {Path(root) / name} does not exist"]


def _rows_of_folder(place: Path, name: str, split: str, config: str | None) -> list[dict[str, Any]]:
    parents = [place / config] if config and (place / config).is_dir() else []
    parents += [parent / "data" for parent in [*parents, place]] + [place]
    for parent in parents:
        for pattern in (f"{split}.parquet", f"{split}-*.parquet", f"{split}.jsonl"):
            files = sorted(parent.glob(pattern))
            if files:
                return [row for file in files for row in _rows_of_file(file)]
    there = sorted(str(item.relative_to(place)) for item in place.rglob("*") if item.is_file())[:20]
    part = f" of {config!r}" if config else ""
    raise ValueError(
        f"the folder {place} of the data set {name!r} has no split {split!r}{part} "
        f"(wanted {split}.parquet, {split}-*.parquet or {split}.jsonl); it has {there}"
    )


def _rows_of_file(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"reading {file} needs pyarrow: pip install pyarrow") from None
    return list(parquet.read_table(file).to_pylist())


def _decode(image: Any, library: Any) -> np.ndarray:
    """Hub parquet holds {"bytes": ..., "path": ...}; `datasets` hands out a decoded picture."""
    if isinstance(image, Mapping):
        image = library.open(io.BytesIO(image["bytes"]))
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def _nltk_roots() -> list[Path]:
    roots: list[Path] = []
    if data := os.environ.get("PAPERCORE_DATA"):
        roots += [Path(data).expanduser() / "nltk_data", Path(data).expanduser()]
    roots += [Path(item).expanduser() for item in os.environ.get("NLTK_DATA", "").split(os.pathsep) if item]
    roots += [
        Path.home() / "nltk_data",
        Path(sys.prefix) / "nltk_data",
        Path(sys.prefix) / "share" / "nltk_data",
    ]
    roots += [Path("/usr/share/nltk_data"), Path("/usr/local/share/nltk_data")]
    return list(dict.fromkeys(roots))


def _hub_command(name: str, config: str | None) -> str:
    hub, default = HUB.get(name, (name, None))
    arguments = f"{hub!r}" if not (config or default) else f"{hub!r}, {(config or default)!r}"
    return f'pip install datasets && python -c "from datasets import load_dataset; load_dataset({arguments})"'


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"
