"""Which pages the book has: book/_toc.yml is the one place that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SCOREBOARD = "scoreboard"


def pages(book: Path) -> list[Path]:
    """Every page of the table of contents, in reading order, as a path inside `book`.

    Raises:
        ValueError: the table names a page that has no file, or names one twice.
    """
    names = _names(yaml.safe_load((book / "_toc.yml").read_text(encoding="utf-8")))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{book / '_toc.yml'} names {', '.join(twice)} more than once")
    found = []
    for name in names:
        files = [
            path for path in (book / f"{name}{suffix}" for suffix in (".ipynb", ".md")) if path.is_file()
        ]
        if len(files) != 1:
            what = "neither" if not files else "both"
            raise ValueError(
                f"{book / '_toc.yml'} names {name!r}, and {what} of {name}.ipynb and {name}.md are there"
            )
        found += files
    return found


def notebooks(book: Path) -> list[Path]:
    """The book's notebooks in reading order: chapters, then the scoreboard, which reads what they measured."""
    found = [page for page in pages(book) if page.suffix == ".ipynb"]
    return sorted(found, key=lambda page: page.stem == SCOREBOARD)


def _names(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for item in node for name in _names(item)]
    if not isinstance(node, dict):
        return []
    own = [str(node[key]) for key in ("root", "file") if key in node]
    return own + [
        name for key in ("parts", "chapters", "sections", "entries") for name in _names(node.get(key, []))
    ]
