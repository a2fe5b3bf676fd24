"""Execute one notebook with papermill, in a process of its own: a crash or a leak in one chapter touches no other.

    python -m tooling.one_notebook IN.ipynb OUT.ipynb '{"scale": "quick"}' SECONDS_A_CELL FILE_DESCRIPTOR

Where it is and what went wrong goes to the file descriptor (1 to see it), a JSON object a line; all else to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from tooling.sandbox import free_gigabytes


class Report:
    """Writes facts where the caller listens. The descriptor is not inherited by the kernel, so it closes with this process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __call__(self, **facts: str) -> None:
        os.write(self.descriptor, (json.dumps(facts) + "\n").encode())


class Places(logging.Handler):
    """Turns papermill's "Executing Cell 7" into a report of where the notebook is."""

    def __init__(self, cells: list[Any], report: Report) -> None:
        super().__init__()
        self.cells, self.report, self.index = cells, report, 0

    def emit(self, record: logging.LogRecord) -> None:
        if cell := re.match(r"Executing Cell (\d+)", record.getMessage()):
            self.index = int(cell[1]) - 1
            self.report(place=f"cell {place(self.cells, self.index)}")


def place(cells: list[Any], index: int) -> str:
    """`7 of 30 (fig-loss)`: number, total, and the cell's own name."""
    name = cells[index].get("id", "") if 0 <= index < len(cells) else ""
    return f"{index + 1} of {len(cells)}" + (f" ({name})" if name else "")


def explain(error: BaseException, cells: list[Any], index: int) -> str:
    """What went wrong, where, and what it means, in a line or two."""
    if isinstance(error, PapermillExecutionError):
        at = next(
            (i for i, cell in enumerate(cells) if cell.cell_type == "code" and cell.source == error.source),
            error.cell_index,
        )
        return f"cell {place(cells, at)} raised {error.ename}: {error.evalue.strip()}"
    at_cell = f"cell {place(cells, index)}"
    if isinstance(error, DeadKernelError):
        return (
            f"{at_cell}: the kernel died without a Python error. The usual cause is that the system ended it for want of memory "
            f"({free_gigabytes():.1f} GiB are free now; a chapter needs up to 4 GiB): close other programs or use fewer jobs. "
            "Else a compiled library crashed: see the end of the log."
        )
    if isinstance(error, CellTimeoutError):
        return f"{at_cell} ran longer than its limit, and was stopped"
    return f"{at_cell}: {type(error).__name__}: {error}"


def main(notebook: Path, output: Path, parameters: dict[str, Any], seconds: int, report: Report) -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    cells = nbformat.read(notebook, as_version=4).cells
    if parameters:
        # papermill puts the injected cell after the parameters cell: count as it does.
        at = next((i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])), -1)
        cells = [*cells[: at + 1], nbformat.v4.new_code_cell("", id="injected-parameters"), *cells[at + 1 :]]
    places = Places(cells, report)
    logging.getLogger("papermill").addHandler(places)
    report(place="starting its kernel")
    try:
        papermill.execute_notebook(
            notebook, output, parameters=parameters, kernel_name="python3", cwd=notebook.parent, progress_bar=False, log_output=True,
            execution_timeout=seconds, start_timeout=300, autosave_cell_every=0,
        )  # fmt: skip
    except Exception as error:
        logging.getLogger("papermill").error("%s", error)
        report(failure=explain(error, cells, places.index))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(
        main(
            Path(sys.argv[1]),
            Path(sys.argv[2]),
            json.loads(sys.argv[3]),
            int(sys.argv[4]),
            Report(int(sys.argv[5])),
        )
    )
