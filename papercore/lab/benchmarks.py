"""Records of speed: what `make bench` measures, kept beside the chapters' records in `records/benchmarks/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from papercore.lab.paths import record_folders, write_atomically


def save_benchmark(path: Path, document: dict[str, Any]) -> None:
    """Write measurements as JSON, whole or not at all.

    Raises:
        ValueError: `path` is not a .json file, so it may be someone's source.
        OSError: the folder cannot be written or the disk is full.
    """
    if path.suffix != ".json" or (path.exists() and not path.is_file()):
        raise ValueError(f"the measurements go to a .json file, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1) + "\n"
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def find_benchmark(name: str) -> dict[str, Any] | None:
    """The measurements of that name from the first record folder that holds them; None where there are none.

    Raises:
        ValueError: the file is not JSON, or no record of measurements.
    """
    for folder in record_folders():
        path = folder / "benchmarks" / f"{name}.json"
        if path.is_file():
            document = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(document, dict):
                raise ValueError(
                    f"{path} is not a benchmark record: the top level is a {type(document).__name__}, expected an object"
                )
            return document
    return None
