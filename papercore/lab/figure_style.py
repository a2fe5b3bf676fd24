"""One look for every figure of the book: size, fonts, grid, and a palette that does not rest on colour alone.

The width is the book's text column, so a figure is shown at its own size and its letters at theirs. Series differ
by colour, marker and line style together: a reader who sees no colours, or prints in grey, still tells them apart.
Values that a paper reports are always hollow markers; what this book measured is always filled. Figures carry no
title, because each has a caption, and their ground is opaque white, because the dark theme lays them on a card.

Glossary
    index      i, number of a series in a figure, 0-based; colours, markers and lines repeat with it
    WIDTH      inch, the text column of the built book at 1280 px

matplotlib is imported inside the functions: a command-line run that draws nothing never loads it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

WIDTH = 6.3
HEIGHT = 3.5
DPI = 150

# Okabe and Ito's palette without its yellow, which is too pale for a line on white. The order keeps neighbours apart
# for the three common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# On-off lengths in points; None is a solid line. The page's SVG uses the same lengths.
DASHES: tuple[tuple[float, ...] | None, ...] = (
    None,
    (5.0, 2.0),
    (1.2, 1.8),
    (6.0, 1.8, 1.2, 1.8),
    (8.0, 3.0),
    (3.0, 1.5),
    (6.0, 1.5, 1.2, 1.5, 1.2, 1.5),
)
GREY = "#6b6b6b"


class Style(dict[str, Any]):
    """matplotlib settings that are a dict and a context manager at once.

    ``with style(): ...`` applies them inside the block only; ``plt.rcParams.update(style())`` applies them for good.
    """

    _context: AbstractContextManager[None] | None = None

    def __enter__(self) -> Style:
        import matplotlib

        settings: Any = dict(self)
        self._context = matplotlib.rc_context(settings)
        self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._context.__exit__(kind, error, trace)
            self._context = None


def style(*, height: float = HEIGHT) -> Style:
    """Return the book's matplotlib settings: text-column width, 9-10 pt, light grid, opaque white, no title.

    Args:
        height: default height of a figure in inches; the width is always the text column, 6.3 in.

    Raises:
        ValueError: if `height` is not positive.

    Example:
        >>> style()["figure.figsize"]
        (6.3, 3.5)
    """
    if not height > 0:
        raise ValueError(f"height is {height!r}; it must be a positive number of inches, such as {HEIGHT}")
    return Style(
        {
            "figure.figsize": (WIDTH, float(height)),
            "figure.dpi": DPI,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.dpi": DPI,
            "savefig.facecolor": "white",
            "savefig.transparent": False,
            "savefig.bbox": None,  # "tight" would crop, and figures of one page would differ in width
            # DejaVu comes with matplotlib, so the letters are the same on every machine.
            "font.family": ["DejaVu Sans"],
            "font.size": 9.5,
            "axes.labelsize": 10.0,
            "axes.titlesize": 10.0,
            "legend.fontsize": 9.5,
            "xtick.labelsize": 9.5,
            "ytick.labelsize": 9.5,
            "text.color": "#222222",
            "axes.labelcolor": "#222222",
            "xtick.color": "#222222",
            "ytick.color": "#222222",
            "axes.facecolor": "white",
            "axes.edgecolor": "#8a8a8a",
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e3e3e3",
            "grid.linewidth": 0.7,
            "grid.linestyle": "-",
            "lines.linewidth": 1.7,
            "lines.markersize": 5.0,
            # A pale ground without an edge: grid lines do not run through the words.
            "legend.frameon": True,
            "legend.framealpha": 0.85,
            "legend.edgecolor": "none",
            "legend.facecolor": "white",
            "legend.handlelength": 2.8,  # long enough to show a dash pattern
            "hatch.linewidth": 0.7,
            "image.cmap": "cividis",  # reads the same with and without colour vision
            "axes.prop_cycle": _cycle(),
        }
    )


def _cycle() -> Any:
    from cycler import cycler  # a dependency of matplotlib itself

    return (
        cycler(color=list(COLOURS))
        + cycler(marker=list(MARKERS))
        + cycler(linestyle=[_line(dash) for dash in DASHES])
    )


def _line(dash: tuple[float, ...] | None) -> Any:
    return "-" if dash is None else (0, dash)


def series_style(index: int, *, points: int | None = None) -> dict[str, Any]:
    """Return keyword arguments of ``ax.plot`` for measured series number `index`: colour, filled marker and line.

    Args:
        index: number of the series, 0-based; the seven styles repeat.
        points: how many points the series has. Beyond 25, only about ten of them carry a marker, so that a long
            curve stays a curve.

    Raises:
        ValueError: if `index` is negative or `points` is below 1.

    Example:
        >>> series_style(1)["color"], series_style(1)["marker"]
        ('#D55E00', 's')
    """
    if index < 0:
        raise ValueError(f"index is {index}; series are counted from 0")
    if points is not None and points < 1:
        raise ValueError(f"points is {points}; a series has at least one point")
    i = index % len(COLOURS)
    chosen: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": _line(DASHES[i])}
    if points is not None and points > 25:
        # Each series starts its markers elsewhere, so that curves on top of each other show all their markers.
        step = -(-points // 10)
        chosen["markevery"] = ((i * step) // len(COLOURS), step)
    return chosen


def reported_style(index: int | None = None) -> dict[str, Any]:
    """Return keyword arguments of ``ax.plot`` for values that the paper reports: hollow markers and no line.

    Args:
        index: number of the measured series that these values stand beside: same colour and marker shape, hollow.
            None (one set of reported values for the whole figure): dark grey diamonds.

    Raises:
        ValueError: if `index` is negative.

    Example:
        >>> reported_style()["markerfacecolor"], reported_style()["linestyle"]
        ('white', 'none')
    """
    if index is not None and index < 0:
        raise ValueError(f"index is {index}; series are counted from 0")
    i = None if index is None else index % len(COLOURS)
    return {
        "linestyle": "none",
        "marker": "D" if i is None else MARKERS[i],
        "markersize": 6.5,
        # White rather than "none": a line that runs behind the marker must not fill it.
        "markerfacecolor": "white",
        "markeredgecolor": "#222222" if i is None else COLOURS[i],
        "markeredgewidth": 1.4,
        "zorder": 4,
    }
