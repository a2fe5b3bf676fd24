"""The figures of the book: one style, one way to show a picture, one way to let a reader turn a knob.

A figure cell of a notebook reads::

    with figures.style():
        fig, ax = plt.subplots()
        ax.plot(steps, loss, label="MeZO", **figures.series_style(0, points=len(steps)))
        ax.plot([20_000], [0.31], label="reported", **figures.reported_style())
    figures.show(fig, "fig-loss", alt="Loss falls from ...", caption="Training loss of ...")

The same code runs without Jupyter: `show` then writes the picture into the folder named by PAPERCORE_FIGURES, or,
where that is not set, does nothing. matplotlib and IPython are imported only when something is drawn.

Glossary
    runs       y_s(x), [seeds, points], one row per seed
    alt        what a reader who cannot see the figure should know of it
    caption    what to see in the figure; Markdown
"""

from __future__ import annotations

import base64
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from papercore.lab.explore import explore
from papercore.lab.figure_style import (
    COLOURS,
    DASHES,
    DPI,
    GREY,
    MARKERS,
    WIDTH,
    Style,
    reported_style,
    series_style,
    style,
)
from papercore.lab.picture import (
    COLOURS_OF_LINES,
    checked_name,
    checked_text,
    display_raw,
    in_kernel,
    interactive_shell,
    png_bytes,
    save_if_asked,
)
from papercore.lab.plot import Plot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = [
    "COLOURS",
    "DASHES",
    "GREY",
    "MARKERS",
    "WIDTH",
    "Plot",
    "Style",
    "band",
    "explore",
    "png_bytes",
    "reported_style",
    "series_style",
    "show",
    "style",
]

# What the band of `band` may be: its name in the legend, and how it is worked out from runs [S, T].
_SPREADS = {
    "sd": "± 1 s.d.",
    "se": "± 1 s.e.",
    "range": "min to max",
}


def show(
    fig: Figure, name: str, *, alt: str, caption: str, dpi: int = DPI, colours: int = COLOURS_OF_LINES
) -> None:
    """Show `fig` as one small PNG with its alternative text and caption, and close it.

    In a notebook the output is ``image/png`` (150 dpi, 64 colours or 256 with images, opaque white, the same bytes at every run) with
    ``text/plain`` = `alt`; its metadata carry the alt text and the name and caption that the built book needs. Under
    a live kernel the caption follows as a line of its own. Elsewhere the picture is written as ``<name>.png`` into
    the folder that the environment variable PAPERCORE_FIGURES names; without it nothing is drawn.

    Args:
        fig: a matplotlib figure; closed afterwards, so that a notebook does not show it twice.
        name: label of the figure, for references and file names: letters, digits, hyphens, underscores.
        alt: text for readers who cannot see the picture; must not be empty.
        caption: what to see, at which scale, over how many seeds; Markdown; must not be empty.
        dpi, colours: of the picture, less for a page of so many figures that the usual ones would not fit its 300 kB.

    Raises:
        TypeError: if `fig` is no matplotlib figure, or a text is no string.
        ValueError: if `name` cannot be a label, or `alt` or `caption` is empty.
    """
    if not hasattr(fig, "savefig"):
        raise TypeError(f"fig is a {type(fig).__name__}; give the matplotlib figure (for axes: ax.figure)")
    checked_name(name)
    alt, caption = checked_text(alt, "alt"), checked_text(caption, "caption")
    try:
        shell = interactive_shell()
        png = png_bytes(fig, dpi=dpi, colours=colours)
        save_if_asked(f"{name}.png", png)
        if shell is not None:
            display_raw(
                {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": alt},
                {"image/png": {"alt": alt}, "papercore": {"name": name, "alt": alt, "caption": caption}},
            )
            if in_kernel():
                display_raw({"text/markdown": caption}, {"papercore": {"role": "caption"}})
    finally:
        # A figure made without pyplot has no window or inline display to close.
        pyplot: Any = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None:
            pyplot.close(fig)


def band(
    ax: Axes,
    x: ArrayLike,
    runs: ArrayLike | Sequence[ArrayLike],
    *,
    label: str,
    index: int = 0,
    spread: str = "sd",
) -> str:
    """Draw the mean of `runs` over seeds with a band of their spread; return a sentence that says what the band is.

    The legend says it too ("MeZO (mean ± 1 s.d., 5 seeds)"), because a band without a meaning is decoration.

    Args:
        ax: where to draw.
        x: [T], positions of the points.
        runs: [S, T], one row per seed.
        label: name of the series in the legend.
        index: number of the series, as in `series_style`.
        spread: "sd", the sample standard deviation (divisor S - 1); "se", that over the square root of S; "range",
            the least and the greatest run.

    Returns:
        A sentence for the caption. One seed has no spread: only its line is drawn, and the sentence says so.

    Raises:
        ValueError: if the shapes disagree, a value is not finite (a diverged seed must be named, not averaged away),
            or `spread` is unknown.
    """
    if spread not in _SPREADS:
        raise ValueError(f"spread is {spread!r}; choose one of {', '.join(map(repr, _SPREADS))}")
    positions = np.asarray(x, dtype=float)
    values = np.atleast_2d(np.asarray(runs, dtype=float))
    if positions.ndim != 1 or values.ndim != 2 or values.shape[1] != positions.size or not values.size:
        raise ValueError(
            f"x has shape {positions.shape} and runs {values.shape}; expected [T] and [seeds, T] with the same T >= 1"
        )
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise ValueError(
            f"runs of seed rows {bad.tolist()} hold values that are not finite; "
            "leave those rows out and say in the caption how many seeds diverged"
        )
    seeds = values.shape[0]
    mean = values.mean(axis=0)
    chosen = series_style(index, points=positions.size)
    if seeds == 1:
        ax.plot(positions, mean, label=f"{label} (1 seed)", **chosen)
        return f"{label}: one seed, so no spread is shown."
    ax.plot(positions, mean, label=f"{label} (mean {_SPREADS[spread]}, {seeds} seeds)", **chosen)
    if spread == "range":
        low, high = values.min(axis=0), values.max(axis=0)
        words = "from the least to the greatest run"
    else:
        half = values.std(axis=0, ddof=1) / (np.sqrt(seeds) if spread == "se" else 1.0)
        low, high = mean - half, mean + half
        words = "one standard error either side" if spread == "se" else "one standard deviation either side"
    # An edge line keeps the band visible in grey print, where a tint alone is lost.
    ax.fill_between(positions, low, high, color=chosen["color"], alpha=0.18, linewidth=0.6)
    return f"{label}: line, mean of {seeds} seeds; band, {words}."
