"""The record of a run: what was measured, how far each number may move between machines, and what made it.

A record is one JSON file (plus an .npz beside it when there are arrays), written under a temporary name and renamed. Loading
checks it against the schema below, so that a damaged or hand-edited file is refused with the place of the damage.

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
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from papercore.lab.config import Config, resolve_device
from papercore.lab.paths import write_atomically
from papercore.lab.provenance import MemoryWatch, commit, hardware, versions
from papercore.lab.sources import source_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCHEMA = 1
FIELDS: dict[str, type] = {
    "schema": int, "slug": str, "scale": str, "config": dict, "metrics": dict, "moves": dict, "tables": dict, "notes": dict, "arrays": dict, "provenance": dict,
}  # fmt: skip
PROVENANCE = ("source", "commit", "versions", "hardware", "seed", "seconds", "peak_memory_bytes", "finished")


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
        record.provenance = {"source": source_hash(config.slug, config.scale), "commit": commit(), "digest": config.digest()}
        return record

    def metric(self, name: str, value: Any, moves: str = "rel:0.05") -> float:
        """Store one number; `moves` says how far it may move between machines (see the head of this file)."""
        number = float(value)
        if name in self.metrics:
            raise ValueError(f"metric {name!r} is already in the record of {self.slug}: every name is measured once.")
        _check_moves(name, moves)
        self.metrics[name], self.moves[name] = number, moves
        return number

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Store a table; every row must be as long as `columns`."""
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table {name!r}: a row of {len(row)} cells under {len(columns)} columns {columns}: {row}")
        self.tables[name] = {"columns": list(columns), "rows": [[_plain(cell) for cell in row] for row in rows]}

    def array(self, name: str, values: Any) -> None:
        """Store an array (curves, matrices); it goes to the .npz beside the JSON."""
        self.arrays[name] = np.asarray(values)

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
            if moves.startswith("se:") and moves.split(":")[2] not in self.metrics:
                raise ValueError(f"metric {name!r} moves with the standard error {moves.split(':')[2]!r}, which the record does not hold.")
        return self

    def save(self, path: str | Path) -> Path:
        """Write the record to `path` (.json), arrays first, each file atomically."""
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"a record is a .json file, got {path}")
        if self._memory is not None:
            raise ValueError(f"the record of {self.slug} is still running: call finish() before save().")
        document = {
            "schema": SCHEMA, "slug": self.slug, "scale": self.scale, "config": self.config, "metrics": {k: _number(v) for k, v in self.metrics.items()},
            "moves": self.moves, "tables": self.tables, "notes": self.notes, "arrays": {k: list(v.shape) for k, v in self.arrays.items()},
            "provenance": self.provenance,
        }  # fmt: skip
        if self.arrays:
            write_atomically(path.with_suffix(".npz"), lambda p: np.savez_compressed(p, **self.arrays))  # type: ignore[arg-type]
        write_atomically(path, lambda p: p.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"))
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
            raise ValueError(f"{path} is not a record: {error}. Delete it and run the chapter again.") from error
        problem = _schema_problem(document)
        if problem:
            raise ValueError(f"{path} is not a record: {problem}. Records are written by code alone; run the chapter again.")
        arrays: dict[str, Any] = {}
        if document["arrays"]:
            with np.load(path.with_suffix(".npz")) as stored:
                arrays = {name: stored[name] for name in stored.files}
            shapes = {name: list(a.shape) for name, a in arrays.items()}
            if shapes != document["arrays"]:
                raise ValueError(f"{path.with_suffix('.npz')} does not belong to {path.name}: shapes {shapes}, expected {document['arrays']}.")
        metrics = {k: float("nan") if v is None else float(v) for k, v in document["metrics"].items()}
        return cls(document["slug"], document["scale"], document["config"], metrics, document["moves"], document["tables"], document["notes"], arrays, document["provenance"], path)

    @property
    def fresh(self) -> bool:
        """True when the code that made this record is the code that is here now."""
        return self.provenance.get("source") == source_hash(self.slug, self.scale)

    def compare(self, other: Record) -> list[str]:
        """What differs between two records of the same chapter beyond what each metric may move; empty when they agree."""
        problems = []
        for name in sorted(self.metrics.keys() ^ other.metrics.keys()):
            problems.append(f"{name}: only in {'this record' if name in self.metrics else 'the other record'}")
        for name in sorted(self.metrics.keys() & other.metrics.keys()):
            mine, theirs, moves = self.metrics[name], other.metrics[name], self.moves[name]
            allowed = self._allowance(moves, mine, theirs)
            if math.isnan(mine) and math.isnan(theirs):
                continue
            if not abs(mine - theirs) <= allowed:
                problems.append(f"{name}: {mine:.6g} against {theirs:.6g}, apart by {abs(mine - theirs):.3g}, allowed {allowed:.3g} ({moves})")
        return problems

    def _allowance(self, moves: str, mine: float, theirs: float) -> float:
        kind, _, rest = moves.partition(":")
        if kind == "volatile":
            return math.inf
        if kind == "rel":
            return float(rest) * max(abs(mine), abs(theirs))
        if kind == "abs":
            return float(rest)
        if kind == "se":
            factor, _, name = rest.partition(":")
            return float(factor) * self.metrics[name]
        return 0.0


def _check_moves(name: str, moves: str) -> None:
    kind, _, rest = moves.partition(":")
    try:
        good = (kind in {"exact", "volatile"} and not rest) or (kind in {"rel", "abs"} and float(rest) > 0) or (kind == "se" and float(rest.split(":")[0]) > 0 and rest.split(":")[1] != "")
    except (ValueError, IndexError):
        good = False
    if not good:
        raise ValueError(f"metric {name!r}: moves = {moves!r} is not one of exact, rel:X, abs:X, se:K:NAME, volatile.")


def _schema_problem(document: Any) -> str | None:
    if not isinstance(document, dict):
        return f"the top level is a {type(document).__name__}, expected an object"
    if document.get("schema") != SCHEMA:
        return f"schema {document.get('schema')!r}, this version reads {SCHEMA}"
    for field, kind in FIELDS.items():
        if not isinstance(document.get(field), kind):
            return f"field {field!r} is {'missing' if field not in document else type(document[field]).__name__}, expected {kind.__name__}"
    for name, value in document["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            return f"metric {name!r} is {value!r}, expected a number"
        if name not in document["moves"]:
            return f"metric {name!r} does not say how far it may move"
        try:
            _check_moves(name, document["moves"][name])
        except ValueError as error:
            return str(error)
    for name, table in document["tables"].items():
        if not isinstance(table, dict) or set(table) != {"columns", "rows"}:
            return f"table {name!r} does not have columns and rows"
    missing = [key for key in PROVENANCE if key not in document["provenance"]]
    return f"provenance lacks {', '.join(missing)}" if missing else None


def _plain(cell: Any) -> Any:
    """A table cell as JSON can hold it."""
    if isinstance(cell, (np.floating, float)):
        return _number(float(cell))
    if isinstance(cell, np.integer):
        return int(cell)
    if hasattr(cell, "item"):
        return _plain(cell.item())
    return cell


def _number(value: float) -> float | None:
    """Eight significant digits; JSON has no NaN and no infinity, so these become null."""
    return float(f"{value:.8g}") if math.isfinite(value) else None
