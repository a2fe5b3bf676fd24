"""The scoreboard's summary in the README, written by `make refresh` and checked by a test."""

from __future__ import annotations

from pathlib import Path

from papercore.experiments import CHAPTERS, scoreboard
from papercore.lab.claims import totals

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- scoreboard: written by `make refresh` -->", "<!-- end of scoreboard -->"
COLUMNS = ("holds", "fails", "fails (expected)", "stale", "not run", "not tested at this scale")


def summary() -> str:
    """A Markdown table: for each chapter and scale, how many claims have which verdict, from the committed records alone."""
    lines = [f"| chapter | scale | {' | '.join(COLUMNS)} |", f"| --- | --- |{' ---: |' * len(COLUMNS)}"]
    rows = scoreboard(own_runs=False)
    for slug in CHAPTERS:
        for scale in ("quick", "standard", "paper"):
            counts = totals([row for row in rows if row.slug == slug and row.scale == scale])
            cells = " | ".join(str(counts.get(label, "")) for label in COLUMNS)
            lines.append(f"| [{slug}](book/{slug}.ipynb) | {scale} | {cells} |")
    return "\n".join(lines)


def with_summary(text: str) -> str:
    """The README's text with the table of today. ValueError when its two markers are not there."""
    if START not in text or END not in text:
        raise ValueError(f"README.md needs the lines {START!r} and {END!r} around its scoreboard.")
    head, _, rest = text.partition(START)
    return f"{head}{START}\n{summary()}\n{END}{rest.partition(END)[2]}"


def update(path: Path = ROOT / "README.md") -> None:
    """Write the table of today into the README."""
    path.write_text(with_summary(path.read_text(encoding="utf-8")), encoding="utf-8")
