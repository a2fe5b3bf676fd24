"""What a record's file must look like: its fields, how far metrics may move, numbers that JSON can hold, checksums."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import numpy as np

from papercore.lab.config import SCALES

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCHEMA = 1
FIELDS: dict[str, type] = {
    "schema": int, "slug": str, "scale": str, "config": dict, "metrics": dict, "moves": dict, "tables": dict, "notes": dict,
    "arrays": dict, "provenance": dict, "checksum": str,
}  # fmt: skip
SETTINGS: dict[str, type] = {"scale": str, "device": str, "seed": int}
PROVENANCE = (
    "source",
    "digest",
    "commit",
    "versions",
    "hardware",
    "seed",
    "seconds",
    "peak_memory_bytes",
    "finished",
)
WHOLE_BELOW = 2.0**53  # up to here a float holds every whole number


def as_stored(value: float) -> float | None:
    """Eight significant digits, whole numbers in full; JSON has no NaN and no infinity, so these become None (null).

    >>> as_stored(1 / 3), as_stored(123456789012.0), as_stored(float("nan"))
    (0.33333333, 123456789012.0, None)
    """
    if not math.isfinite(value):
        return None
    if value.is_integer() and abs(value) < WHOLE_BELOW:
        return value
    return float(f"{value:.8g}")


def checksum(content: dict[str, Any] | NDArray[Any]) -> str:
    """Sixteen hex digits over a document (but for its own checksum) or over an array's kind and bytes."""
    if isinstance(content, np.ndarray):
        data = f"{content.dtype.str} {content.shape} ".encode() + np.ascontiguousarray(content).tobytes()
    else:
        rest = {key: value for key, value in content.items() if key != "checksum"}
        data = json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def check_moves(name: str, moves: Any) -> None:
    """ValueError unless `moves` is one of exact, rel:X, abs:X, se:K:NAME, volatile."""
    kind, _, rest = moves.partition(":") if isinstance(moves, str) else ("", "", "")
    factor, _, error_name = rest.partition(":")
    try:
        good = (kind in {"exact", "volatile"} and moves == kind) or (
            (kind in {"rel", "abs"} or (kind == "se" and error_name != "")) and 0 < float(factor) < math.inf
        )
    except ValueError:
        good = False
    if not good or (kind in {"rel", "abs"} and error_name):
        raise ValueError(
            f"metric {name!r}: moves = {moves!r} is not one of exact, rel:X, abs:X, se:K:NAME, volatile."
        )


def unknown_standard_error(name: str, moves: str, metrics: Container[str]) -> str | None:
    """What is wrong when `moves` names a standard error that is not among the metrics."""
    kind, _, rest = moves.partition(":")
    error_name = rest.partition(":")[2]
    if kind == "se" and error_name not in metrics:
        return (
            f"metric {name!r} moves with the standard error {error_name!r}, which the record does not hold."
        )
    return None


def schema_problem(document: Any) -> str | None:
    """The first thing that keeps a parsed JSON document from being a record, with its place; None when it is one."""
    if not isinstance(document, dict):
        return f"the top level is a {type(document).__name__}, expected an object"
    if document.get("schema") != SCHEMA:
        return f"schema {document.get('schema')!r}, this version reads {SCHEMA}"
    for field, kind in FIELDS.items():
        if not isinstance(document.get(field), kind):
            found = type(document[field]).__name__ if field in document else "missing"
            return f"field {field!r} is {found}, expected {kind.__name__}"
    if document["scale"] not in SCALES:
        return f"scale {document['scale']!r}, expected one of {', '.join(SCALES)}"
    for setting, kind in SETTINGS.items():
        if not isinstance(document["config"].get(setting), kind):
            return f"config has no {setting!r} of kind {kind.__name__}"
    problem = _metrics_problem(document["metrics"], document["moves"]) or _tables_problem(document["tables"])
    if problem:
        return problem
    missing = [key for key in PROVENANCE if key not in document["provenance"]]
    if missing:
        return f"provenance lacks {', '.join(missing)}"
    if document["checksum"] != checksum(document):
        return "its contents do not fit its checksum, so it was changed after it was written"
    return None


def _metrics_problem(metrics: dict[str, Any], moves: dict[str, Any]) -> str | None:
    for name, value in metrics.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float, type(None)))
            or (value is not None and not math.isfinite(value))
        ):
            return f"metric {name!r} is {value!r}, expected a number or null"
        if name not in moves:
            return f"metric {name!r} does not say how far it may move"
        try:
            check_moves(name, moves[name])
        except ValueError as error:
            return str(error).rstrip(".")
        if lacking := unknown_standard_error(name, moves[name], metrics):
            return lacking.rstrip(".")
    unknown = sorted(moves.keys() - metrics.keys())
    return f"moves names {unknown[0]!r}, which is no metric" if unknown else None


def _tables_problem(tables: dict[str, Any]) -> str | None:
    for name, table in tables.items():
        if not isinstance(table, dict) or set(table) != {"columns", "rows"}:
            return f"table {name!r} does not have columns and rows"
        if not isinstance(table["columns"], list) or not isinstance(table["rows"], list):
            return f"table {name!r}: columns and rows are not lists"
        for number, row in enumerate(table["rows"]):
            if not isinstance(row, list) or len(row) != len(table["columns"]):
                return f"table {name!r}, row {number}: not a list of {len(table['columns'])} cells"
    return None
