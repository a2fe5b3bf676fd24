"""A matplotlib figure as a small PNG whose bytes are the same at every run, and where a picture may go.

Committed notebooks hold their figures, so a figure must be small (150 dpi, 64 colours: a fifth or a quarter of the full
PNG, with no visible loss for lines) and must not change when nothing has changed (no version or date inside).
"""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papercore.lab.figure_style import DPI

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS_OF_LINES, COLOURS_OF_IMAGES = 64, 256
FOLDER_VARIABLE = "PAPERCORE_FIGURES"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def checked_name(name: str) -> str:
    """Return `name` if it can be a label, a file name and an HTML id; raise ValueError otherwise.

    >>> checked_name("fig-loss")
    'fig-loss'
    """
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; it must be a string such as 'fig-loss'")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"name is {name!r}; it becomes a label and a file name: "
            "use letters, digits, hyphens and underscores, as in 'fig-loss'"
        )
    return name


def checked_text(text: str, what: str) -> str:
    """Return `text` stripped; raise ValueError if it is empty. `what` ("alt", "caption") names it in the message."""
    if not isinstance(text, str):
        raise TypeError(f"{what} is a {type(text).__name__}; it must be a string")
    if not text.strip():
        purpose = {
            "alt": "say what a reader who cannot see the figure should know of it",
            "caption": "say what to see in the figure, at which scale, over how many seeds",
        }.get(what, "write it")
        raise ValueError(f"{what} is empty; every figure needs one: {purpose}")
    return " ".join(text.split())


def png_bytes(fig: Figure, *, dpi: int = DPI, small: bool = True, colours: int = COLOURS_OF_LINES) -> bytes:
    """Return `fig` as PNG: opaque white ground, few colours, the same bytes at every call.

    Lines and bars keep `colours` of them; a figure that holds an image or a heat map keeps 256, or its shades would show
    as steps.

    Args:
        fig: a matplotlib figure; it is left open and unchanged.
        dpi: pixels per inch; 150 shows a 6.3 in figure sharp on most screens.
        small: False keeps all colours and saves half the time, for a picture that is looked at and not stored.
        colours: of a figure of lines and bars; 32 instead of 64 saves a sixth of the bytes.
    """
    buffer = io.BytesIO()
    # "Software" would put matplotlib's version into the bytes.
    fig.savefig(
        buffer, format="png", dpi=dpi, facecolor="white", transparent=False, metadata={"Software": None}
    )
    if not small:
        return buffer.getvalue()
    return _quantised(buffer.getvalue(), COLOURS_OF_IMAGES if _has_shades(fig) else colours)


def _has_shades(fig: Figure) -> bool:
    from matplotlib.collections import QuadMesh

    return any(
        ax.images or any(isinstance(artist, QuadMesh) for artist in ax.collections) for ax in fig.get_axes()
    )


def _quantised(png: bytes, colours: int) -> bytes:
    from PIL import Image  # matplotlib writes PNG through Pillow, so it is there

    with Image.open(io.BytesIO(png)) as picture:
        # Maximum coverage keeps thin lines in their own colours, where median cut gives all places to what fills
        # the page: beside a blue heat map it turns a green line blue. No dithering: its speckle costs more bytes
        # than it saves.
        small = picture.convert("RGB").quantize(
            colors=colours, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE
        )
    out = io.BytesIO()
    small.save(out, format="PNG", optimize=True)
    return out.getvalue() if out.tell() < len(png) else png


def save_if_asked(file_name: str, content: bytes) -> Path | None:
    """Write `content` into the folder that PAPERCORE_FIGURES names and return its path; None if it names none."""
    folder = os.environ.get(FOLDER_VARIABLE, "").strip()
    if not folder:
        return None
    path = Path(folder).expanduser() / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
    return path


def interactive_shell() -> Any | None:
    """Return IPython's shell if this code runs in one, else None. IPython is never imported for the question."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def in_kernel() -> bool:
    """Is there a Jupyter kernel around this code, and so perhaps a front end that can show controls?"""
    return getattr(interactive_shell(), "kernel", None) is not None


def display_raw(data: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Hand one output, as a dict from MIME type to content, to the notebook around this code."""
    importlib.import_module("IPython.display").display(data, raw=True, metadata=metadata)
