"""Clean executed notebooks: what is committed and rendered depends on the chapter and its numbers alone.

    python -m tooling.clean book/mezo.ipynb              # clean in place
    python -m tooling.clean --check book/*.ipynb         # say what is not clean; exit status 1 if anything is

Dropped: timings, papermill's notes, widget state and live widgets, stderr, captions shown as text.
Numbered: code cells, from 1 (nbval takes a cell with outputs and no number for one that was never run).
Moved: a figure's name, caption and alternative text go from its output into the cell's metadata, where the page builder
reads them. Kept: everything else that a cell gave, and the cell's readable id. Cleaning a clean notebook changes nothing.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from pathlib import Path
from typing import Any

import nbformat

LIMIT_BYTES = 300_000
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
FIGURE_MIMES = ("image/png", "image/svg+xml", "image/jpeg")
CELL_METADATA = {"tags", "mystnb", "jupyter"}
NOTEBOOK_METADATA: dict[str, Any] = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}
READABLE_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
RANDOM_ID = re.compile(r"[0-9a-f]{8}|[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Outputs that differ on every machine or at every run.
NOT_STABLE = {
    "an object's address": re.compile(r"\bat 0x[0-9a-f]{6,}"),
    "a path of one machine": re.compile(
        rf"{re.escape(str(Path(__file__).resolve().parent.parent))}|/(?:home|Users|root|tmp|mnt|private)/[\w.-]+|\b[A-Z]:\\[\w.-]+"
    ),
}


def clean(notebook: Any) -> Any:
    """The cleaned copy of a notebook.

    Raises:
        ValueError: the notebook cannot be shown: a cell failed, has two figures, or carries injected parameters.
    """
    out = nbformat.v4.new_notebook(metadata=copy.deepcopy(NOTEBOOK_METADATA))
    out.nbformat_minor = max(notebook.get("nbformat_minor", 5), 5)
    taken: set[str] = set()
    number = 0
    for cell in notebook.cells:
        cell = copy.deepcopy(cell)
        cell["id"] = _readable_id(cell, taken)
        taken.add(cell["id"])
        if "injected-parameters" in cell.metadata.get("tags", []):
            raise ValueError(
                f"cell {cell['id']} holds injected parameters: the book shows the defaults alone"
            )
        if cell.cell_type == "code":
            number += 1
            _move_figure(cell)
            cell.outputs = _joined(
                [output for output in map(_clean_output, cell.outputs) if output is not None]
            )
            cell.execution_count = number
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = number
                if output.output_type == "error":
                    raise ValueError(f"cell {cell['id']} failed: {output.ename}: {output.evalue}")
        cell.metadata = nbformat.from_dict(
            {k: v for k, v in cell.metadata.items() if k in CELL_METADATA and v}
        )
        cell.source = "\n".join(line.rstrip() for line in cell.source.splitlines())
        out.cells.append(cell)
    return out


def text_of(notebook: Any) -> str:
    """The file as written: sorted keys, one-space indent, final newline."""
    return str(nbformat.writes(notebook, version=4)).rstrip("\n") + "\n"


def problems(path: Path) -> list[str]:
    """What keeps a committed notebook from being clean, each with its place; empty when nothing does."""
    text = path.read_text(encoding="utf-8")
    found = []
    if len(text.encode()) > LIMIT_BYTES:
        found.append(
            f"{len(text.encode()) / 1e3:.0f} kB, more than {LIMIT_BYTES / 1e3:.0f}: fewer points or smaller figures"
        )
    notebook = nbformat.reads(text, as_version=4)
    for number, cell in enumerate(notebook.cells, 1):
        name = cell.get("id", "")
        if not READABLE_ID.fullmatch(name) or RANDOM_ID.fullmatch(name):
            found.append(f"cell {number} has the id {name!r}: give it a readable one, like fig-loss")
        for output in cell.get("outputs", []):
            for what, pattern in NOT_STABLE.items():
                if hit := pattern.search(_text_in(output)):
                    found.append(f"cell {name} prints {what}: {hit[0].strip()}")
    try:
        if text_of(clean(notebook)) != text:
            found.append(f"not clean; run: python -m tooling.clean {path.name}")
    except ValueError as error:
        found.append(str(error))
    return found


def clean_file(source: Path, target: Path) -> None:
    """Write the cleaned notebook of `source` to `target`, whole or not at all."""
    notebook = nbformat.read(source, as_version=4)
    try:
        text = text_of(clean(notebook))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    temporary = target.with_name(f".{target.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)


def _move_figure(cell: Any) -> None:
    """Take the figure's name, caption and alt text from the outputs into the cell's metadata for myst-nb."""
    told = [
        output.metadata["papercore"]
        for output in cell.outputs
        if "caption" in output.get("metadata", {}).get("papercore", {})
    ]
    if len(told) > 1:
        raise ValueError(
            f"cell {cell['id']} shows {len(told)} figures ({', '.join(t['name'] for t in told)}): one a cell, so that each has its caption"
        )
    if told:
        mystnb = cell.metadata.setdefault("mystnb", {})
        mystnb["figure"] = {"caption": told[0]["caption"], "name": told[0]["name"]}
        mystnb["image"] = {"alt": told[0]["alt"]}
    elif (
        not any(mime in output.get("data", {}) for output in cell.outputs for mime in FIGURE_MIMES)
        and "mystnb" in cell.metadata
    ):
        # The cell once showed a figure, and no longer does.
        cell.metadata["mystnb"] = {
            k: v for k, v in cell.metadata["mystnb"].items() if k not in {"figure", "image"}
        }


def _clean_output(output: Any) -> Any | None:
    """The output as committed, or None if it goes."""
    if output.output_type == "stream":
        # What a progress bar drew over itself is not text. Warnings stay in the log and in the executed notebook.
        output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n"))
        return None if output.name == "stderr" or not output.text else output
    if output.output_type == "error":
        return output
    if output.metadata.get("papercore", {}).get("role") == "caption":
        return None
    if WIDGET_VIEW in output.data:
        # A live control with nothing to stand in for it would leave a gap in the page.
        output.data = nbformat.from_dict(
            {mime: value for mime, value in output.data.items() if mime != WIDGET_VIEW}
        )
        if not any(mime in output.data for mime in ("text/html", *FIGURE_MIMES)):
            return None
    output.metadata = nbformat.from_dict({k: v for k, v in output.metadata.items() if k in output.data})
    for mime in ("image/png", "image/jpeg"):
        if mime in output.data:
            output.data[mime] = output.data[mime].strip()
    return output


def _joined(outputs: list[Any]) -> list[Any]:
    """Neighbouring pieces of the same stream as one."""
    joined: list[Any] = []
    for output in outputs:
        if (
            joined
            and output.output_type == "stream"
            and joined[-1].output_type == "stream"
            and joined[-1].name == output.name
        ):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _readable_id(cell: Any, taken: set[str]) -> str:
    """The cell's own id if a person gave it, else one from its first words."""
    own = str(cell.get("id", ""))
    if own and own not in taken and not RANDOM_ID.fullmatch(own):
        return own
    words = re.findall(r"[a-z0-9]+", cell.source.lower())
    stem = "-".join(words[:4])[:40].rstrip("-") or cell.cell_type
    if RANDOM_ID.fullmatch(stem):
        stem = f"{cell.cell_type}-{stem}"
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name


def _text_in(output: Any) -> str:
    if output.output_type == "stream":
        return str(output.text)
    return "\n".join(str(value) for mime, value in output.get("data", {}).items() if mime.startswith("text/"))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tooling.clean", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 when a notebook is not clean"
    )
    words = parser.parse_args()
    bad = 0
    for path in words.notebooks:
        if words.check:
            for problem in problems(path):
                bad = 1
                print(f"{path}: {problem}")
        else:
            clean_file(path, path)
    return bad


if __name__ == "__main__":
    sys.exit(main())
