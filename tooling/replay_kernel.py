"""A Jupyter kernel that executes nothing: it answers each cell with the outputs that an earlier execution stored.

nbval compares a notebook's stored outputs with those that a kernel gives. With this kernel it compares the committed
outputs with those of the one execution that `make book` has already paid for. The environment variable PAPERCORE_REPLAY
names the executed notebook. Cells must come in its order and with its source: a cell that differs is answered with an
error, which fails the test, so outputs can never stand in for code that did not run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ipykernel.kernelapp import IPKernelApp
from ipykernel.kernelbase import Kernel


class OutOfStep(Exception):
    """The cell sent to the kernel is not the one that was executed at this place."""


class Replay:
    """The code cells of an executed notebook, handed out in order."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Read without nbformat, whose import takes longer than everything else that this kernel does.
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        self.cells = [cell for cell in cells if cell["cell_type"] == "code"]
        self.next = 0

    def outputs(self, source: str) -> list[Any]:
        """The stored outputs of the next cell, whose source must be `source`."""
        if self.next >= len(self.cells):
            raise OutOfStep(
                f"{self.path} has {len(self.cells)} code cells, and one more was sent: execute the notebook again"
            )
        cell = self.cells[self.next]
        executed = joined(cell["source"])
        if executed.strip() != source.strip():
            raise OutOfStep(
                f"cell {self.next} ({cell.get('id', 'no id')}) is not the one that was executed in {self.path}: execute the notebook again.\n"
                f"executed: {first_line(executed)}\nsent:     {first_line(source)}"
            )
        self.next += 1
        return list(cell["outputs"])


def joined(text: Any) -> Any:
    """Text as one string: files hold it as a list of lines."""
    return "".join(text) if isinstance(text, list) and all(isinstance(line, str) for line in text) else text


def first_line(source: str) -> str:
    return source.strip().partition("\n")[0]


class ReplayKernel(Kernel):
    implementation = "papercore-replay"
    implementation_version = "1"
    language_info = {"name": "python", "mimetype": "text/x-python", "file_extension": ".py"}
    banner = "stored outputs of an executed notebook"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._replay: Replay | None = None

    async def do_execute(self, code: str, silent: bool, *_: Any, **__: Any) -> dict[str, Any]:
        if not code.strip():
            return {
                "status": "ok",
                "execution_count": self.execution_count,
                "payload": [],
                "user_expressions": {},
            }
        try:
            if self._replay is None:
                self._replay = Replay(os.environ["PAPERCORE_REPLAY"])
            outputs = self._replay.outputs(code)
        except (OutOfStep, OSError, KeyError) as error:
            return self._fail(type(error).__name__, str(error), [f"{type(error).__name__}: {error}"])
        for output in outputs:
            if output["output_type"] == "error":
                return self._fail(output["ename"], output["evalue"], output["traceback"])
            self._send(output)
        return {
            "status": "ok",
            "execution_count": self.execution_count,
            "payload": [],
            "user_expressions": {},
        }

    def _send(self, output: Any) -> None:
        kind = output["output_type"]
        if kind == "stream":
            content = {"name": output["name"], "text": joined(output["text"])}
        else:
            data = {
                mime: value if mime.endswith("json") else joined(value)
                for mime, value in output["data"].items()
            }
            content = {"data": data, "metadata": output["metadata"]}
            if kind == "execute_result":
                content["execution_count"] = self.execution_count
        self.send_response(self.iopub_socket, kind, content)

    def _fail(self, name: str, value: str, traceback: list[str]) -> dict[str, Any]:
        content = {"ename": name, "evalue": value, "traceback": traceback}
        self.send_response(self.iopub_socket, "error", content)
        return {"status": "error", "execution_count": self.execution_count, **content}


if __name__ == "__main__":
    IPKernelApp.launch_instance(kernel_class=ReplayKernel)
