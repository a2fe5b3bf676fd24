"""A book of a few cells, for tests that execute, render and compare."""

from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

TABLE_OF_CONTENTS = "format: jb-book\nroot: index\nchapters:\n"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def notebook(*cells: Any) -> Any:
    """A notebook of these cells, with the metadata of a Python kernel."""
    made = new_notebook(cells=list(cells))
    made.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return made


def code(name: str, source: str, *outputs: Any, tags: tuple[str, ...] = ()) -> Any:
    cell = new_code_cell(source, outputs=list(outputs))
    cell["id"] = name
    cell.execution_count = 1 if outputs else None
    if tags:
        cell.metadata["tags"] = list(tags)
    return cell


def text(name: str, source: str) -> Any:
    cell = new_markdown_cell(source)
    cell["id"] = name
    return cell


def printed(words: str) -> Any:
    return new_output("stream", name="stdout", text=words)


def figure(name: str = "fig-one", caption: str = "What to see.", alt: str = "A dot.") -> Any:
    """The output of lab.figures.show."""
    told = {"image/png": {"alt": alt}, "papercore": {"name": name, "alt": alt, "caption": caption}}
    return new_output("display_data", data={"image/png": PIXEL, "text/plain": alt}, metadata=told)


def write_book(folder: Path, **chapters: Any) -> Path:
    """A book folder with an index, these notebooks, and a table of contents in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.md").write_text("# A small book\n\nOne page, and some $x^2$.\n")
    (folder / "references.bib").write_text("")
    (folder / "_static").mkdir(exist_ok=True)
    for name in ("book.css", "explore.js", "scoreboard.js"):
        (folder / "_static" / name).write_text("")
    for name in ("logo.svg", "favicon.svg"):
        (folder / name).write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "_toc.yml").write_text(TABLE_OF_CONTENTS + "".join(f"  - file: {name}\n" for name in chapters))
    for name, made in chapters.items():
        nbformat.write(made, folder / f"{name}.ipynb")
    return folder
