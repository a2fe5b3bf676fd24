"""The scoreboard: every claim of every paper, reported beside measured at each scale, as a table and as a bar chart.

The table is plain HTML that can be read, searched and printed without scripts. Where scripts run, a small one of our
own (book/_static/scoreboard.js) adds filters by chapter, scale and verdict; it loads nothing. A verdict is always a
word and a sign, never a colour alone.

Glossary
    row        one claim at one scale: a dict with the keys of ROW_KEYS
    verdict    one of VERDICTS
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from papercore.lab.figure_style import WIDTH, style
from papercore.lab.plot import number_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW_KEYS = (
    *("slug", "id", "text", "where", "scale", "verdict"),
    *("measured", "reported", "rule", "why", "record", "figure"),
)

# verdict -> (class in the style sheet, sign, colour and hatch in the chart)
VERDICTS = {
    "holds": ("holds", "✓", "#009E73", ""),
    "fails": ("fails", "✗", "#D55E00", "xxx"),
    "fails (expected)": ("expected", "✗", "#E69F00", "///"),
    "not tested at this scale": ("untested", "–", "#c9c9c9", "..."),
    "not run": ("unrun", "○", "#ffffff", ""),
    "stale": ("stale", "↻", "#56B4E9", "\\\\\\"),
}
_SCALES = ("quick", "standard", "paper")
# Addresses inside the book alone: no scheme, no host, nothing that could run.
_INNER = re.compile(r"(?!/)[\w./-]*(#[\w.-]+)?")


def verdict_table_html(rows: Iterable[Mapping[str, Any]], *, filters: bool = True) -> str:
    """Return the verdicts as HTML: a summary, filters for readers with scripts, and one table for each chapter.

    Args:
        rows: one dict for each claim and scale with the keys `slug`, `id`, `text`, `where`, `scale`, `verdict`,
            `measured`, `reported`, `rule`, `why`, `record`, `figure`. All but the first six may be None. Numbers are
            shown at four significant digits, texts as they are (escaped). `figure` is the name of a figure of the
            chapter or an address inside the book; it becomes a link. A row may add `title`, its chapter's name.
            Chapters and claims keep the order of `rows`.
        filters: False leaves the filters out, for a page that shows one chapter at one scale.

    Raises:
        ValueError: if a row lacks a key or its verdict is none of VERDICTS.

    Example:
        >>> row = dict.fromkeys(ROW_KEYS) | {"slug": "mezo", "id": "mezo/C1", "text": "MeZO beats zero-shot.",
        ...     "where": "Table 1", "scale": "quick", "verdict": "holds", "measured": 0.83, "reported": 0.91}
        >>> "pc-holds" in verdict_table_html([row])
        True
    """
    rows = [_checked(row, number) for number, row in enumerate(rows)]
    chapters: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        chapters.setdefault(row["slug"], {}).setdefault(row["id"], []).append(row)
    parts = ['<div class="pc-verdicts">', _summary(rows), *([_filters(rows)] if filters else [])]
    parts += [_chapter(slug, claims) for slug, claims in chapters.items()]
    return "\n".join([*parts, "</div>"])


def verdict_bar(rows: Iterable[Mapping[str, Any]], *, scale: str | None = None) -> Figure:
    """Return a matplotlib figure with one bar per chapter: how many of its claims have which verdict.

    Args:
        rows: as for `verdict_table_html`.
        scale: count the rows of this scale alone; None counts all rows.

    Returns:
        The figure, for `papercore.lab.figures.show`. Verdicts differ by colour and hatch, and each part of a bar
        carries its number.

    Raises:
        ValueError: if there is no row to count, a row lacks a key, or a verdict is unknown.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = [_checked(row, number) for number, row in enumerate(rows)]
    chosen = [row for row in rows if scale is None or row["scale"] == scale]
    if not chosen:
        known = ", ".join(_in_order(rows, "scale")) or "none"
        raise ValueError(f"no row to count at scale {scale!r}; the scales of the rows are: {known}")
    slugs = _in_order(chosen, "slug")
    counts = Counter((row["slug"], row["verdict"]) for row in chosen)
    with style():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(slugs)))
        ax = figure.subplots()
        ends = [0] * len(slugs)
        for verdict, (_, _, colour, hatch) in VERDICTS.items():
            widths = [counts[slug, verdict] for slug in slugs]
            if not any(widths):
                continue
            look: dict[str, Any] = {"color": colour, "edgecolor": "#333333", "linewidth": 0.7, "hatch": hatch}
            ax.barh(range(len(slugs)), widths, left=ends, height=0.68, label=verdict, **look)
            for line, (width, end) in enumerate(zip(widths, ends, strict=True)):
                if width:
                    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
                    ax.text(
                        end + width / 2, line, str(width), ha="center", va="center", fontsize=9, bbox=ground
                    )
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        ax.set_xlim(0, 1.02 * max(ends))
        ax.set_yticks(range(len(slugs)), slugs)
        ax.invert_yaxis()
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("claims" if scale is not None else "claims, counted at each scale")
        ax.grid(visible=False, axis="y")
        figure.legend(loc="outside upper left", ncols=3)
    return figure


def _checked(row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    missing = [key for key in ROW_KEYS if key not in row]
    if missing:
        raise ValueError(f"row {number} lacks {', '.join(missing)}; a row has the keys {', '.join(ROW_KEYS)}")
    if row["verdict"] not in VERDICTS:
        raise ValueError(
            f"row {number} ({row['id']}) has the verdict {row['verdict']!r}; it must be one of {', '.join(VERDICTS)}"
        )
    return row


def _in_order(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    found = dict.fromkeys(str(row[key]) for row in rows)
    known = _SCALES if key == "scale" else tuple(VERDICTS) if key == "verdict" else ()
    return [value for value in known if value in found] + [value for value in found if value not in known]


def _badge(verdict: str, more: str = "") -> str:
    kind, sign, _, _ = VERDICTS[verdict]
    return f'<span class="pc-badge pc-{kind}"><span aria-hidden="true">{sign}</span> {escape(verdict)}{more}</span>'


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    badges = [_badge(verdict, f" <b>{counts[verdict]}</b>") for verdict in VERDICTS if counts[verdict]]
    claims = len({(row["slug"], row["id"]) for row in rows})
    return f'<p class="pc-summary">{claims} claims, {len(rows)} verdicts: {" ".join(badges)}</p>'


def _filters(rows: Sequence[Mapping[str, Any]]) -> str:
    """The filter controls, hidden until the script that answers them shows them."""
    lists = []
    for key, label in (("slug", "Chapter"), ("scale", "Scale"), ("verdict", "Verdict")):
        options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in _in_order(rows, key))
        lists.append(
            f'<label>{label} <select data-key="{key}"><option value="">all</option>{options}</select></label>'
        )
    return (
        f'<form class="pc-filters" hidden aria-label="Filter the verdicts">{"".join(lists)}'
        '<button type="reset">Show all</button> <output aria-live="polite"></output></form>'
    )


def _chapter(slug: str, claims: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    title = next((row["title"] for rows in claims.values() for row in rows if row.get("title")), None)
    named = escape(slug) if title is None else f"{escape(str(title))} <code>{escape(slug)}</code>"
    page = f"{slug}.html"
    caption = f'<a href="{escape(page)}">{named}</a>' if _INNER.fullmatch(page) else named
    return "\n".join(
        [
            f"<table><caption>{caption}</caption>",
            '<thead><tr><th scope="col">Scale</th><th scope="col">Reported</th><th scope="col">Measured</th>'
            '<th scope="col">Verdict</th></tr></thead>',
            *(_claim(rows) for rows in claims.values()),
            "</table>",
        ]
    )


def _claim(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    where = f' <span class="pc-where">{escape(str(first["where"]))}</span>' if first["where"] else ""
    reasons = [
        f'<p class="pc-why"><b>Why{at}:</b> {escape(str(why))}</p>'
        for at, why in _by_scale(rows, "why")
        if why
    ]
    head = f"<code>{escape(str(first['id']))}</code> {escape(str(first['text']))}{where}{''.join(reasons)}{_evidence(rows)}"
    lines = [f'<tbody><tr class="pc-claim"><th colspan="4" scope="rowgroup">{head}</th></tr>']
    for row in rows:
        keys = " ".join(f'data-{key}="{escape(str(row[key]))}"' for key in ("slug", "scale", "verdict"))
        lines.append(
            f"<tr {keys}><td>{escape(str(row['scale']))}</td><td>{_value(row['reported'])}</td>"
            f"<td>{_value(row['measured'])}</td><td>{_badge(row['verdict'])}</td></tr>"
        )
    return "\n".join([*lines, "</tbody>"])


def _by_scale(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, Any]]:
    """Return the different values of `key`, each with " (scale, scale)" unless it is the same at every scale."""
    values = dict.fromkeys(row[key] for row in rows)
    if len(values) == 1:
        return [("", rows[0][key])]
    return [(f" ({', '.join(str(r['scale']) for r in rows if r[key] == value)})", value) for value in values]


def _evidence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a doubting reader asks for: the rule that a program evaluated, the record it read, the figure."""
    items = []
    for key, label in (("rule", "Rule"), ("record", "Record"), ("figure", "Figure")):
        for at, value in _by_scale(rows, key):
            if value:
                text = str(value)
                shown = f"<code>{escape(text)}</code>"
                if key == "figure" and _INNER.fullmatch(text):
                    # docutils writes an identifier with hyphens where the name has underscores.
                    inner = f"{rows[0]['slug']}.html#{text.replace('_', '-')}"
                    address = text if re.search(r"[./#]", text) else inner
                    shown = f'<a href="{escape(address)}">{escape(text)}</a>'
                items.append(f"<dt>{label}{escape(at)}</dt><dd>{shown}</dd>")
    return f"<details><summary>Rule and record</summary><dl>{''.join(items)}</dl></details>" if items else ""


def _value(value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return '<span aria-label="none">–</span>'
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(str(value))
    return escape(str(value) if isinstance(value, int) or not math.isfinite(value) else number_text(value))
