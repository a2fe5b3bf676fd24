"""The record of a run: what was measured, how far each number may move between machines, and what made it.

A record is one JSON file (plus an .npz beside it when there are arrays), written under a temporary name and renamed. Loading
checks it against the schema (record_schema.py) and its checksums, so that a damaged or hand-edited file is refused with the
place of the damage. Numbers are kept as they are stored, with eight significant digits (whole numbers in full): a verdict
is the same before saving and after loading.

How far a metric may move (`moves`):
    exact        the same number everywhere (counts, closed forms)
    rel:X        within a share X of the larger of the two values
    abs:X        within X
    se:K:NAME    within K times the standard error that the metric NAME holds
    volatile     seconds, memory: never compared
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import zipfile
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from papercore.lab.config import Config, resolve_device
from papercore.lab.paths import write_together
from papercore.lab.provenance import MemoryWatch, commit, hardware, versions
from papercore.lab.record_schema import (
    SCHEMA,
    as_stored,
    check_moves,
    checksum,
    schema_problem,
    unknown_standard_error,
)
from papercore.lab.rules import identifier
from papercore.lab.sources import source_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclasses.dataclass
class Record:
    """Measured numbers of one run of one chapter. Made by `Record.start(config)`, filled, closed by `finish`."""

    slug: str
    scale: str
    config: dict[str, Any]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    moves: dict[str, str] = dataclasses.field(default_factory=dict)
    tables: dict[str, dict[str, list[Any]]] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    _begun: float = 0.0
    _memory: MemoryWatch | None = None

    @classmethod
    def start(cls, config: Config) -> Self:
        """An empty record of this config; the clock and the memory watch run until `finish`."""
        device = resolve_device(config.device)
        record = cls(config.slug, config.scale, {**config.as_dict(), "device": device})
        record._begun, record._memory = time.monotonic(), MemoryWatch(device).start()
        # Hashed now: a file edited while the run goes on must not be credited with its result.
        record.provenance = {
            "source": source_hash(config.slug, config.scale),
            "commit": commit(),
            "digest": config.digest(),
        }
        return record

    def metric(self, name: str, value: Any, moves: str = "rel:0.05") -> float:
        """Store one number; `moves` says how far it may move between machines (see the head of this file).

        JSON has no infinity: an infinite value is kept as NaN, as it would come back from the file.
        """
        stored = as_stored(float(value))
        number = math.nan if stored is None else stored
        if name in self.metrics:
            raise ValueError(
                f"metric {name!r} is already in the record of {self.slug}: every name is measured once."
            )
        alike = [other for other in self.metrics if identifier(other) == identifier(name)]
        if alike:
            raise ValueError(
                f"metric {name!r} reads like {alike[0]!r} in a rule ({identifier(name)}): give it another name."
            )
        check_moves(name, moves)
        self.metrics[name], self.moves[name] = number, moves
        return number

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Store a table; every row must be as long as `columns`."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(
                    f"table {name!r}: a row of {len(row)} cells under {len(columns)} columns {columns}: {row}"
                )
        self.tables[name] = {
            "columns": list(columns),
            "rows": [[_plain(cell) for cell in row] for row in rows],
        }

    def array(self, name: str, values: Any) -> None:
        """Store an array (curves, matrices); it goes to the .npz beside the JSON."""
        array = np.asarray(values)
        if array.dtype.hasobject:
            raise TypeError(
                f"array {name!r} holds Python objects, which no record can: expected numbers or text of one shape."
            )
        self.arrays[name] = array

    def note(self, name: str, text: str) -> None:
        """Store a line of text that a reader of the numbers must know."""
        self.notes[name] = text

    def finish(self) -> Self:
        """Stamp seconds, memory, versions and the time of day; the record is complete."""
        memory = self._memory.stop() if self._memory else {}
        self._memory = None
        self.provenance |= {
            "versions": versions(), "hardware": hardware(self.config["device"]), "seed": self.config["seed"],
            "seconds": round(time.monotonic() - self._begun, 1), "finished": datetime.now(UTC).strftime("%Y-%m-%d"), **memory,
        }  # fmt: skip
        for name, moves in self.moves.items():
            if error := unknown_standard_error(name, moves, self.metrics):
                raise ValueError(error)
        return self

    def save(self, path: str | Path) -> Path:
        """Write the record to `path` (.json) and its arrays beside it (.npz), both or none.

        Raises:
            ValueError: not a .json file, or the record is not finished.
            OSError: the folder cannot be written or the disk is full; no file is left half-written.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"a record is a .json file, got {path}")
        if self._memory is not None:
            raise ValueError(f"the record of {self.slug} is still running: call finish() before save().")
        document = {
            "schema": SCHEMA, "slug": self.slug, "scale": self.scale, "config": self.config, "metrics": {k: as_stored(v) for k, v in self.metrics.items()},
            "moves": self.moves, "tables": self.tables, "notes": self.notes,
            "arrays": {k: {"shape": list(v.shape), "checksum": checksum(v)} for k, v in self.arrays.items()}, "provenance": self.provenance,
        }  # fmt: skip
        document = json.loads(
            json.dumps(document, allow_nan=False)
        )  # as a reader will see it, whose checksum must be the same
        document["checksum"] = checksum(document)
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        files: dict[Path, Callable[[Path], object]] = {path: lambda p: p.write_text(text, encoding="utf-8")}
        if self.arrays:
            # The arrays are renamed first: a reader in between finds that they do not fit, and says so.
            files = {path.with_suffix(".npz"): lambda p: np.savez_compressed(p, **self.arrays), **files}  # type: ignore[arg-type]
        write_together(files)
        if not self.arrays:
            path.with_suffix(".npz").unlink(missing_ok=True)
        self.path = path
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record and check it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, a field missing or of the wrong kind, or arrays that do not fit; the message names the place.
        """
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is not a record: {error}. Delete it and run the chapter again."
            ) from error
        problem = schema_problem(document)
        if problem:
            raise ValueError(
                f"{path} is not a record: {problem}. Records are written by code alone; run the chapter again."
            )
        arrays = _load_arrays(path.with_suffix(".npz"), document["arrays"]) if document["arrays"] else {}
        metrics = {k: math.nan if v is None else float(v) for k, v in document["metrics"].items()}
        return cls(
            document["slug"], document["scale"], document["config"], metrics, document["moves"], document["tables"], document["notes"],
            arrays, document["provenance"], path,
        )  # fmt: skip

    @property
    def fresh(self) -> bool:
        """True when the code that made this record is the code that is here now."""
        return self.provenance.get("source") == source_hash(self.slug, self.scale)

    def compare(self, other: Record) -> list[str]:
        """What differs between two records of one chapter and scale beyond what each metric may move; empty when they agree.

        Raises:
            ValueError: the records are of different chapters or scales.
        """
        if (self.slug, self.scale) != (other.slug, other.scale):
            raise ValueError(
                f"a record of {self.slug} at {self.scale} is not comparable to one of {other.slug} at {other.scale}."
            )
        problems = []
        for name in sorted(self.metrics.keys() ^ other.metrics.keys()):
            problems.append(
                f"{name}: only in {'this record' if name in self.metrics else 'the other record'}"
            )
        for name in sorted(self.metrics.keys() & other.metrics.keys()):
            mine, theirs, moves = self.metrics[name], other.metrics[name], self.moves[name]
            if moves == "volatile" or (math.isnan(mine) and math.isnan(theirs)):
                continue
            allowed = self._allowance(moves, mine, theirs)
            if not abs(mine - theirs) <= allowed:
                problems.append(
                    f"{name}: {mine:.6g} against {theirs:.6g}, apart by {abs(mine - theirs):.3g}, allowed {allowed:.3g} ({moves})"
                )
        return problems

    def _allowance(self, moves: str, mine: float, theirs: float) -> float:
        kind, _, rest = moves.partition(":")
        if kind == "rel":
            return float(rest) * max(abs(mine), abs(theirs))
        if kind == "abs":
            return float(rest)
        if kind == "se":
            factor, _, name = rest.partition(":")
            return float(factor) * self.metrics[name]
        return 0.0


def _load_arrays(path: Path, expected: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The arrays beside a record, if they are those that it was saved with; else ValueError."""
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing: the arrays of its record lie there. Run the chapter again."
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Run the chapter again.") from error
    for name in sorted(arrays.keys() | expected.keys()):
        if name not in arrays or name not in expected:
            holder = "the record alone" if name in expected else "this file alone"
            raise ValueError(
                f"{path} does not belong to its record: array {name!r} is in {holder}. Run the chapter again."
            )
        if {"shape": list(arrays[name].shape), "checksum": checksum(arrays[name])} != expected[name]:
            raise ValueError(
                f"{path} does not belong to its record: array {name!r} is another one. Run the chapter again."
            )
    return arrays


def _plain(cell: Any) -> Any:
    """A table cell as JSON can hold it."""
    if isinstance(cell, (np.floating, float)):
        return as_stored(float(cell))
    if isinstance(cell, np.integer):
        return int(cell)
    if isinstance(cell, (list, tuple)):
        return [_plain(part) for part in cell]
    if hasattr(cell, "item"):
        return _plain(cell.item())
    return cell
