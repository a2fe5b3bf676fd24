"""Claims of a paper and their verdicts: what was reported, what was measured, and a rule that decides.

`papercore/claims/<slug>.yml` holds the claims, `<slug>.csv` the paper's own numbers. A verdict is one of

    holds                      the rule is true of a fresh record
    fails                      it is false; the claim stays visible, with its `why`
    not tested at this scale   the claim says that this size cannot test it honestly
    not run                    there is no record of this size, or it lacks the metric
    stale                      the record was made by other code than is here now
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import string
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from papercore.lab.config import SCALES
from papercore.lab.record import Record
from papercore.lab.rules import Rule, identifier

VERDICTS = ("holds", "fails", "not tested at this scale", "not run", "stale")
CLAIM_FIELDS = {
    "id",
    "text",
    "where",
    "reported",
    "metric",
    "shows",
    "scales",
    "rule",
    "why",
    "expected",
    "figure",
    "confidence",
}
REPORTED_COLUMNS = ["paper", "table", "row", "column", "value", "unit", "source", "confidence"]
CONFIDENCE = (
    "paper",
    "repo",
    "third-party",
    "derived",
    "memory",
)  # how a reported value is known; memory is shown as unconfirmed


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim of one paper.

    Fields:
        id: `<slug>/<number>`; text: the claim in our words; where: its place in the paper; reported: the paper's value as text.
        metric: the metric that tests it; shows: how the measured value is written, a format string over metrics; both by scale.
        scales: the sizes at which the test is honest; rule, why, expected, metric, shows: one value, or one by scale.
        figure: name of the figure that shows it; confidence: how sure the reported value is.
    """

    id: str
    text: str
    where: str
    reported: str
    metric: dict[str, str]
    shows: dict[str, str]
    scales: tuple[str, ...]
    rule: dict[str, str]
    why: dict[str, str]
    expected: dict[str, str]
    figure: str | None = None
    confidence: str = "paper"

    @property
    def slug(self) -> str:
        return self.id.split("/")[0]

    def parsed_rule(self, scale: str) -> Rule:
        """The rule of this scale, read through the whitelist."""
        return Rule(self.rule[scale], self.metric.get(scale))


@dataclasses.dataclass(frozen=True)
class Row:
    """A claim at one scale with its verdict: a line of the scoreboard."""

    slug: str
    id: str
    text: str
    where: str
    scale: str
    verdict: str
    expected: bool
    measured: float | None
    shown: str
    reported: str
    confidence: str
    rule: str
    why: str
    record: str | None
    figure: str | None

    @property
    def unexpected(self) -> bool:
        """A failure that nobody foresaw, or a foreseen failure that did not come."""
        return self.verdict in {"holds", "fails"} and (self.verdict == "fails") != self.expected

    @property
    def label(self) -> str:
        """The verdict as shown: a foreseen failure says so."""
        return "fails (expected)" if self.verdict == "fails" and self.expected else self.verdict

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "label": self.label}


def slugs() -> list[str]:
    """Chapters that have claims."""
    folder = resources.files("papercore") / "claims"
    return sorted(f.name.removesuffix(".yml") for f in folder.iterdir() if f.name.endswith(".yml"))


@lru_cache(maxsize=32)
def load_claims(slug: str) -> tuple[Claim, ...]:
    """The claims of a chapter, checked: known fields, ids that differ, rules that parse, a reason for every foreseen failure.

    Raises:
        ValueError: names the file, the claim and the field.
    """
    found = tuple(_claim(slug, entry) for entry in _document(slug)["claims"])
    ids = [claim.id for claim in found] + [entry["id"] for entry in left_out(slug)]
    if twice := [name for name in dict.fromkeys(ids) if ids.count(name) > 1]:
        raise ValueError(f"claims/{slug}.yml: {twice[0]} stands there {ids.count(twice[0])} times.")
    return found


def left_out(slug: str) -> list[dict[str, str]]:
    """Claims of the paper that the book does not test, each with its reason."""
    return list(_document(slug).get("left_out") or [])


@lru_cache(maxsize=32)
def reported(slug: str) -> tuple[dict[str, str], ...]:
    """The paper's own numbers: rows of `<slug>.csv` as dicts. ValueError when a column or a value is damaged."""
    text = (resources.files("papercore") / "claims" / f"{slug}.csv").read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if reader.fieldnames != REPORTED_COLUMNS:
        raise ValueError(f"claims/{slug}.csv has columns {reader.fieldnames}, expected {REPORTED_COLUMNS}.")
    rows = tuple(reader)
    for number, row in enumerate(rows, 2):
        problem = _reported_problem(slug, row)
        if problem:
            raise ValueError(f"claims/{slug}.csv, line {number}: {problem}.")
    return rows


def reported_value(slug: str, table: str, row: str, column: str) -> float:
    """One reported number as a float: 92.7 of `92.7 (0.5)`, 13 of `13B`, 1 of `<1`.

    Raises:
        KeyError: the paper's table has no such cell.
        ValueError: the cell does not begin with a number.
    """
    for line in reported(slug):
        if (line["table"], line["row"], line["column"]) == (table, row, column):
            return float(line["value"].split()[0].lstrip("<>~").removesuffix("B"))
    raise KeyError(f"{slug}: no reported number in table {table!r}, row {row!r}, column {column!r}")


def _reported_problem(slug: str, row: dict[Any, Any]) -> str | None:
    if None in row or None in row.values():
        return f"expected {len(REPORTED_COLUMNS)} cells"
    if row["paper"] != slug:
        return f"paper {row['paper']!r}, expected {slug!r}"
    if row["confidence"] not in CONFIDENCE:
        return f"confidence {row['confidence']!r}, expected one of {', '.join(CONFIDENCE)}"
    return None if row["value"].strip() else "no value"


def judge(claim: Claim, scale: str, record: Record | None, *, fresh: bool | None = None) -> Row:
    """The verdict of one claim at one scale, given the record of that scale (or None); `fresh` None asks the record."""
    verdict, measured, shown, why = "not run", None, "", claim.why.get(scale, "")
    expected = claim.expected.get(scale) == "fails"
    if scale not in claim.scales:
        verdict = "not tested at this scale"
    elif record is not None:
        metrics = {identifier(k): v for k, v in record.metrics.items()}
        rule = claim.parsed_rule(scale)
        missing = [name for name in rule.names if name not in metrics]
        name = identifier(claim.metric.get(scale, ""))
        if name in metrics:
            value = metrics[name]
            measured = value if math.isfinite(value) else None
        shown = _shown(claim.shows.get(scale), metrics, measured)
        if not (record.fresh if fresh is None else fresh):
            verdict = "stale"
        elif missing:
            why = f"the record does not hold {', '.join(missing)}"
        else:
            verdict = "holds" if rule(metrics) else "fails"
    return Row(
        claim.slug, claim.id, claim.text, claim.where, scale, verdict, expected, measured, shown, claim.reported, claim.confidence,
        claim.rule.get(scale, ""), why, None if record is None or record.path is None or scale not in claim.scales else str(record.path), claim.figure,
    )  # fmt: skip


def totals(rows: list[Row]) -> dict[str, int]:
    """How many rows have each verdict (as shown), most telling first."""
    order = ("holds", "fails", "fails (expected)", "stale", "not run", "not tested at this scale")
    return {label: n for label in order if (n := sum(row.label == label for row in rows))}


class _Metrics(string.Formatter):
    """Fills `{name:.3f}` from metrics; a metric that is missing shows as a question mark."""

    def get_value(self, key: Any, args: Any, kwargs: Any) -> Any:
        return kwargs.get(key, math.nan)

    def format_field(self, value: Any, spec: str) -> str:
        return "?" if isinstance(value, float) and math.isnan(value) else super().format_field(value, spec)


def _check_shows(where: str, template: str) -> None:
    """ValueError unless every field of the template is a metric's name with a format of numbers."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if bad := [name for name in fields if not name.isidentifier()]:
            raise ValueError(f"{{{bad[0]}}} is no metric's name")
        string.Formatter().vformat(template, (), dict.fromkeys(fields, 1.0))
    except ValueError as error:
        raise ValueError(f"{where}: shows {template!r} is not a template over metrics: {error}.") from error


def _shown(template: str | None, metrics: dict[str, float], measured: float | None) -> str:
    if template:
        return _Metrics().vformat(template, (), metrics)
    return "" if measured is None else f"{measured:.4g}"


@lru_cache(maxsize=32)
def _document(slug: str) -> dict[str, Any]:
    file = resources.files("papercore") / "claims" / f"{slug}.yml"
    if not file.is_file():
        raise ValueError(
            f"no claims for chapter {slug!r}: chapters with claims are {', '.join(slugs()) or 'none'}."
        )
    document = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not isinstance(document.get("claims"), list):
        raise ValueError(f"claims/{slug}.yml: expected a mapping with a list `claims`.")
    for entry in document.get("left_out") or []:
        if set(entry) != {"id", "reason"}:
            raise ValueError(f"claims/{slug}.yml: left_out entries have id and reason, got {sorted(entry)}.")
    return document


def _claim(slug: str, entry: Any) -> Claim:
    if not isinstance(entry, dict):
        raise ValueError(f"claims/{slug}.yml: a claim is a mapping of fields, got {entry!r}.")
    name = entry.get("id", "a claim without id")
    unknown = set(entry) - CLAIM_FIELDS
    if unknown:
        raise ValueError(
            f"claims/{slug}.yml, {name}: unknown fields {sorted(unknown)}; known are {sorted(CLAIM_FIELDS)}."
        )
    missing = {"id", "text", "where", "reported", "scales"} - set(entry)
    if missing or not str(name).startswith(f"{slug}/"):
        raise ValueError(
            f"claims/{slug}.yml, {name}: "
            + (f"missing {sorted(missing)}." if missing else f"the id must begin with {slug}/.")
        )
    scales = tuple(entry["scales"]) if isinstance(entry["scales"], list) else (entry["scales"],)
    if set(scales) - set(SCALES):
        raise ValueError(
            f"claims/{slug}.yml, {name}: scales {list(scales)}, expected some of {list(SCALES)}."
        )
    by_scale = {
        field: _by_scale(slug, name, field, entry.get(field), scales)
        for field in ("rule", "why", "expected", "metric", "shows")
    }
    claim = Claim(
        name, " ".join(str(entry["text"]).split()), str(entry["where"]), str(entry["reported"]), by_scale["metric"], by_scale["shows"], scales,
        by_scale["rule"], by_scale["why"], by_scale["expected"], entry.get("figure"), entry.get("confidence", "paper"),
    )  # fmt: skip
    if claim.confidence not in CONFIDENCE:
        raise ValueError(
            f"claims/{slug}.yml, {name}: confidence {claim.confidence!r}, expected one of {', '.join(CONFIDENCE)}."
        )
    for template in claim.shows.values():
        _check_shows(f"claims/{slug}.yml, {name}", template)
    for scale in scales:
        if scale not in claim.rule:
            raise ValueError(f"claims/{slug}.yml, {name}: no rule for scale {scale}.")
        try:
            claim.parsed_rule(scale)
        except ValueError as error:
            raise ValueError(f"claims/{slug}.yml, {name}: {error}") from error
        if scale in claim.expected and (claim.expected[scale] != "fails" or not claim.why.get(scale)):
            raise ValueError(
                f"claims/{slug}.yml, {name}: `expected` takes `fails`, and needs a `why` for scale {scale}."
            )
    return claim


def _by_scale(slug: str, name: str, field: str, value: Any, scales: tuple[str, ...]) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, dict):
        if set(value) - set(SCALES):
            raise ValueError(
                f"claims/{slug}.yml, {name}: {field} by scale has keys {sorted(value)}, expected some of {list(SCALES)}."
            )
        return {scale: " ".join(str(text).split()) for scale, text in value.items()}
    text = " ".join(str(value).split())
    return dict.fromkeys(SCALES if field == "why" else scales, text)
