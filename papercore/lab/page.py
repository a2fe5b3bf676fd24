"""What a chapter's page says: figures with their words, sentences with measured numbers, tables, verdicts.

A number in a page comes from a record, never from a keyboard. So prose that holds numbers is a text with names in braces,
filled from the record when the notebook runs::

    page.show(figures.prompt, record)                       # draws, or says what the record lacks
    page.tell(record, "MeZO ends at {full_mean:.2f}.")      # a paragraph
    page.verdicts(record)                                   # reported beside measured, with the verdicts

A notebook runs at every scale, and a record holds what its own scale measures. What is not there is said in a sentence, not
in a traceback: a figure or paragraph that asks for it raises `NotMeasured`, and `show` and `tell` turn that into words.

Nothing here makes a number, and without Jupyter nothing is displayed.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papercore.lab import figures
from papercore.lab.claims import Row, judge, load_claims, totals
from papercore.lab.picture import checked_name, checked_text, display_raw, interactive_shell
from papercore.lab.plot import number_text
from papercore.lab.rules import identifier
from papercore.lab.scoreboard import verdict_table_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from papercore.lab.record import Record


UNTESTED = "not tested at this scale"


class NotMeasured(ValueError):
    """The record does not hold what a figure, a paragraph or a table needs."""


@dataclass(frozen=True)
class Drawn:
    """A figure and its words: `alt` for readers who cannot see it, `caption` (Markdown) on what to see in it.

    dpi, colours: a chapter has about twelve figures and a notebook 300 kB, so they are stored at 110 pixels an inch (693 pixels
    for a text column of 690) and with 32 colours.
    """

    name: str
    fig: Figure
    alt: str
    caption: str
    dpi: int = 110
    colours: int = 32

    def __post_init__(self) -> None:
        checked_name(self.name)
        object.__setattr__(self, "alt", checked_text(self.alt, "alt"))
        object.__setattr__(self, "caption", checked_text(self.caption, "caption"))

    def show(self) -> None:
        """Display it in a notebook, or write it where PAPERCORE_FIGURES says (lab/figures.py)."""
        figures.show(
            self.fig, self.name, alt=self.alt, caption=self.caption, dpi=self.dpi, colours=self.colours
        )


def require(record: Record, *names: str) -> None:
    """Raise NotMeasured unless every name is a table, an array or a metric of the record."""
    held = record.tables.keys() | record.arrays.keys() | record.metrics.keys()
    _refuse(record, [name for name in names if name not in held])


def _refuse(record: Record, missing: Sequence[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise NotMeasured(f"a record at {record.scale} scale does not hold {missing[0]!r}{more}")


def rows(record: Record, table: str) -> list[dict[str, Any]]:
    """The rows of a table as dicts. NotMeasured if the record has no such table."""
    require(record, table)
    columns = record.tables[table]["columns"]
    return [dict(zip(columns, row, strict=True)) for row in record.tables[table]["rows"]]


def show(draw: Callable[[Record], Drawn], record: Record) -> None:
    """Draw a figure from the record and show it; where the record lacks its numbers, say so in a sentence."""
    try:
        drawn = draw(record)
    except NotMeasured as reason:
        _markdown(f"*No figure here: {reason}.*")
    else:
        drawn.show()


def tell(
    record: Record, text: str, *, values: Callable[[Record], Mapping[str, Any]] | None = None, **more: Any
) -> None:
    """Show Markdown whose braces are filled with the record's metrics, with `values(record)` and with `more`.

    A metric's name is written as an identifier: `{eps_1e_4_minus_full:+.3f}`. Lines may be indented as code is. Where the
    record lacks a number, a sentence says so.
    """
    try:
        worked_out = values(record) if values is not None else {}
        _markdown(filled(record, text, **worked_out, **more))
    except NotMeasured as reason:
        _markdown(f"*No numbers here: {reason}.*")


def filled(record: Record, text: str, **more: Any) -> str:
    """`text` with its braces filled, and the spaces that all of its lines begin with taken away.

    Raises:
        NotMeasured: a name is neither a metric nor in `more`.
    """
    values = {identifier(name): value for name, value in record.metrics.items()} | more
    wanted = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    _refuse(record, sorted(wanted - values.keys()))
    lines = text.strip("\n").splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    # Filled last: a value with line breaks must not decide what the margin is.
    return "\n".join(line[margin:] for line in lines).format(**values)


def table(
    columns: Sequence[str], body: Iterable[Sequence[Any]], formats: Mapping[str, str] | None = None
) -> str:
    """A Markdown table: numbers to the right, texts to the left, an empty cell for None.

    Args:
        columns: heads, one a column.
        body: rows of as many cells.
        formats: head -> format of its numbers, such as ".3f"; other numbers have four significant digits.

    >>> print(table(["k", "accuracy"], [[1, 0.51234], [16, None]], {"accuracy": ".2f"}))
    | k | accuracy |
    | ---: | ---: |
    | 1 | 0.51 |
    | 16 |  |
    """
    lines = [list(row) for row in body]
    for row in lines:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells under {len(columns)} heads: {row}")
    formats = formats or {}
    unknown = sorted(set(formats) - set(columns))
    if unknown:
        raise ValueError(f"formats names {unknown}, the columns are {list(columns)}")
    right = [any(_is_number(row[i]) for row in lines) for i in range(len(columns))]
    text = [list(columns), ["---:" if side else "---" for side in right]]
    text += [
        [_cell(cell, formats.get(head)) for cell, head in zip(row, columns, strict=True)] for row in lines
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in text)


def show_tables(record: Record) -> None:
    """Show every table of the record and its notes: what a page has of a scale that has no figures of its own."""
    parts = []
    for name, stored in record.tables.items():
        parts += [f"**{name.replace('_', ' ')}**", table(stored["columns"], stored["rows"])]
    parts += [f"- {note}" for note in record.notes.values()]
    _markdown("\n\n".join(parts) if parts else "*The record holds no tables.*")


def show_markdown(text: str, *, caption: str = "") -> None:
    """Show Markdown, a bold caption above it if one is given."""
    _markdown(f"**{caption}**\n\n{text}" if caption else text)


def show_made(make: Callable[[Record], str], record: Record, *, caption: str = "") -> None:
    """Show Markdown that `make` writes from the record; where the record lacks its numbers, say so in a sentence."""
    try:
        show_markdown(make(record), caption=caption)
    except NotMeasured as reason:
        _markdown(f"*No table here: {reason}.*")


def judged(record: Record) -> list[Row]:
    """The claims of the record's chapter, judged by this record alone."""
    return [judge(claim, record.scale, record) for claim in load_claims(record.slug)]


def verdicts(record: Record) -> None:
    """Show every claim of the chapter: what the paper reports, what this record holds, the rule and its verdict."""
    html = verdict_table_html(board_rows(judged(record)), filters=False)
    if interactive_shell() is not None:
        display_raw({"text/html": html, "text/plain": verdict_lines(record)}, {})


def verdict_lines(record: Record) -> str:
    """One line a claim with its verdict and nothing that moves between machines, then the totals."""
    found = judged(record)
    lines = [f"{row.id:10} {row.label}" for row in found]
    return "\n".join([*lines, ", ".join(f"{n} {label}" for label, n in totals(found).items())])


def board_rows(found: Iterable[Row], titles: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows for `scoreboard.verdict_table_html`: the verdict as shown, the measured text, a record's name without its folder.

    A scale that does not test a claim shows no reported value either, unless no scale does: there is nothing to stand beside.
    """
    found = list(found)
    tested = {row.id for row in found if row.verdict != UNTESTED}
    out = []
    for row in found:
        record = None if row.record is None else f"{row.slug}/{Path(row.record).name}"
        shown: dict[str, Any] = {
            "verdict": row.label,
            "measured": row.shown or row.measured,
            "record": record,
        }
        if row.verdict == UNTESTED and row.id in tested:
            shown["reported"] = None
        if titles and row.slug in titles:
            shown["title"] = titles[row.slug]
        out.append(row.as_dict() | shown)
    return out


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _cell(cell: Any, form: str | None) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if not _is_number(cell):
        return str(cell).replace("|", "\\|")
    if form is not None:
        return format(cell, form)
    return f"{cell:,}" if isinstance(cell, int) else number_text(cell)


def _markdown(text: str) -> None:
    if interactive_shell() is not None:
        # No plain text beside it: a stored notebook would hold every sentence once more.
        display_raw({"text/markdown": text}, {})
