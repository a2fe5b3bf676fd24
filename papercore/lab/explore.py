"""A control over a quantity that matters, for a reader with a kernel and for a reader without one.

``explore(fn, k=[1, 2, 4], ...)`` calls `fn` once for every setting and shows one output with two representations:
ipywidgets controls that redraw the figure, which a live notebook takes, and HTML with the same figure as SVG, which
the built book takes. In the book a small script of our own (book/_static/explore.js) adds the controls and draws
the other settings from the stored numbers; without scripts the figure at its starting setting remains.

Glossary
    ranges     parameter -> the values it may take
    grid       all settings, the last parameter running fastest; frame number = place in the grid
    start      place of each parameter's first value shown: the default in the signature of `fn` if it is one of
               the values, else the middle of a range of numbers, else the first
"""

from __future__ import annotations

import base64
import importlib
import inspect
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from papercore.lab.figure_style import GREY, MARKERS, WIDTH, reported_style, series_style, style
from papercore.lab.page_svg import legend_html, specification, svg
from papercore.lab.picture import (
    checked_name,
    checked_text,
    display_raw,
    in_kernel,
    interactive_shell,
    png_bytes,
    save_if_asked,
)
from papercore.lab.plot import Axis, Looks, Plot, number_text, shared_axes, shared_looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["JSON_LIMIT", "Plot", "explore"]

JSON_LIMIT = 50_000  # bytes of one figure's data in the page
_VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Control:
    """One parameter: its name, the label shown, its values, and the place of the one shown first."""

    name: str
    label: str
    values: tuple[Any, ...]
    start: int

    @property
    def is_slider(self) -> bool:
        """Are the values ordered numbers, for a slider, rather than texts, for a list?"""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    @property
    def texts(self) -> list[str]:
        """The values as a reader sees them."""
        return [number_text(value) if self.is_slider else str(value) for value in self.values]


def explore(
    fn: Callable[..., Plot],
    *,
    name: str,
    alt: str,
    caption: str = "",
    labels: Mapping[str, str] | None = None,
    **ranges: Sequence[Any],
) -> None:
    """Show ``fn(**setting)`` with a control for every parameter, live under a kernel and stored in the built page.

    Without Jupyter the HTML is written as ``<name>.html`` into the folder that PAPERCORE_FIGURES names, if it is set.

    Args:
        fn: called with one value per parameter; returns a `Plot`. It is called once for every combination, here and
            now, and never again: moving a control is instant. Labels, scales and limits of the axes must be the same
            at every setting.
        name: label of the figure: letters, digits, hyphens, underscores.
        alt: text for readers who cannot see the figure; the setting shown is added to it.
        caption: what to see and what to try. Plain text; `code` in backticks and $x$ for formulas.
        labels: parameter -> what to print at its control, where its name will not do.
        **ranges: parameter -> values it may take, all different: numbers (a slider) or texts (a list).

    Raises:
        TypeError: if `fn` does not return a `Plot`.
        ValueError: on an empty or repeated range, an unknown label, plots that do not share their axes, or data of
            more than 50 kB; the message says the size and how to shrink it.

    Example:
        >>> def decay(rate=0.5):
        ...     return Plot([0, 1, 2], {"left": [1, rate, rate**2]}, "step", "share left")
        >>> explore(decay, name="decay", alt="The share left falls faster at a smaller rate.", rate=[0.2, 0.5, 0.9])
    """
    checked_name(name)
    alt = checked_text(alt, "alt")
    caption = " ".join(caption.split())
    controls = _controls(fn, ranges, labels or {})
    plots = _every_plot(fn, controls)
    axes = shared_axes(plots)
    html = _page_html(plots, axes, controls, name=name, alt=alt, caption=caption)
    save_if_asked(f"{name}.html", html.encode())
    if interactive_shell() is None:
        return
    data: dict[str, Any] = {"text/html": html, "text/plain": alt}
    if in_kernel():
        view = _live_view(plots, axes, controls, alt=alt, caption=caption)
        if view is not None:
            data[_VIEW] = view
    display_raw(data, {"papercore": {"role": "explore", "name": name}})


def _controls(
    fn: Callable[..., Plot], ranges: Mapping[str, Sequence[Any]], labels: Mapping[str, str]
) -> list[Control]:
    if not ranges:
        raise ValueError(
            "no range is given; name at least one parameter of fn with its values, as in k=[1, 2, 4]"
        )
    unknown = sorted(set(labels) - set(ranges))
    if unknown:
        raise ValueError(f"labels names {unknown}, which have no range; the parameters are {sorted(ranges)}")
    try:
        signature = {key: p.default for key, p in inspect.signature(fn).parameters.items()}
    except (TypeError, ValueError):  # some compiled callables have no signature; then there are no defaults
        signature = {}
    controls = []
    for name, given in ranges.items():
        if isinstance(given, str) or not hasattr(given, "__iter__"):
            raise ValueError(
                f"{name} is {given!r}; give the list of values it may take, as in {name}=[1, 2, 4]"
            )
        # .item() turns numpy and torch scalars into Python's own numbers
        values = tuple(value.item() if hasattr(value, "item") else value for value in given)
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} is {list(values)!r}; it needs at least one value, and no value twice")
        for value in values:
            if not isinstance(value, str | int | float) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                raise ValueError(f"{name} holds {value!r}; values are finite numbers or texts")
        control = Control(name, labels.get(name, name.replace("_", " ")), values, 0)
        default = signature.get(name, inspect.Parameter.empty)
        if isinstance(default, str | int | float) and default in values:
            start = values.index(default)
        else:
            start = (len(values) - 1) // 2 if control.is_slider else 0
        controls.append(Control(name, control.label, values, start))
    return controls


def _every_plot(fn: Callable[..., Plot], controls: Sequence[Control]) -> list[Plot]:
    settings = math.prod(len(control.values) for control in controls)
    plots: list[Plot] = []
    for values in itertools.product(*(control.values for control in controls)):
        setting = {control.name: value for control, value in zip(controls, values, strict=True)}
        plot = fn(**setting)
        if not isinstance(plot, Plot):
            raise TypeError(
                f"fn returned a {type(plot).__name__} at {setting}; it must return papercore.lab.figures.Plot"
            )
        plots.append(plot)
        if len(plots) == 1:
            # A grid that cannot fit is refused now rather than after hours: a number takes at least two bytes.
            least = 2 * settings * len(plot.x) * len(plot.series)
            if least > 4 * JSON_LIMIT:
                raise ValueError(_too_large(plots, settings, least))
    return plots


def _too_large(plots: Sequence[Plot], settings: int, size: int) -> str:
    points, series = len(plots[0].x), len(plots[0].series)
    fits = max(int(points * JSON_LIMIT / size), 1)
    return (
        f"the data of this figure take {size / 1000:.0f} kB ({settings} settings x {series} series x {points} points); "
        f"at most {JSON_LIMIT / 1000:.0f} kB may lie in a page. Give fewer values in a range, or thin each series to "
        f"about {fits} points, as in x[::{-(-points // fits)}]"
    )


def _page_html(
    plots: Sequence[Plot],
    axes: tuple[Axis, Axis],
    controls: Sequence[Control],
    *,
    name: str,
    alt: str,
    caption: str,
) -> str:
    start = 0
    for control in controls:
        start = start * len(control.values) + control.start
    spec = specification(plots, axes)
    spec["alt"] = alt
    spec["controls"] = [
        {"label": c.label, "slider": c.is_slider, "values": c.texts, "start": c.start} for c in controls
    ]
    # "<" would end the script element if a label held "</script>".
    data = json.dumps(spec, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )
    size = len(data.encode())
    if size > JSON_LIMIT:
        raise ValueError(_too_large(plots, len(plots), size))
    setting = ", ".join(f"{c.label} = {c.texts[c.start]}" for c in controls)
    text = {**spec["shared"], **spec["frames"][start]}.get("text", "")
    lines = [
        f'<figure class="pc-explore" id="explore-{name}">',
        '<div class="pc-controls"></div>',
        legend_html(spec),
        svg(spec, start, name=name, alt=f"{alt} Shown: {setting}."),
        f'<p class="pc-text">{escape(text)}</p>',
        f'<p class="pc-still">Drawn at {escape(setting)}. '
        "The controls work in the built book with scripts on, and in a running notebook.</p>",
        f"<figcaption>{_inline(caption)}</figcaption>" if caption else "",
        f'<script type="application/json">{data}</script>',
        "</figure>",
    ]
    return "\n".join(line for line in lines if line)


def _inline(text: str) -> str:
    """Return `text` as HTML, with `code` and $formulas$; the class lets the page's MathJax find the formula."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\$([^$]+)\$", r'<span class="math notranslate">\\(\1\\)</span>', text)


def _live_view(
    plots: Sequence[Plot], axes: tuple[Axis, Axis], controls: Sequence[Control], *, alt: str, caption: str
) -> Any | None:
    """Return the view data of the ipywidgets controls and figure, or None where ipywidgets is not installed."""
    try:
        widgets = importlib.import_module("ipywidgets")
    except ImportError:
        return None
    inputs = []
    for control in controls:
        kind = widgets.SelectionSlider if control.is_slider else widgets.Dropdown
        options = [(text, place) for place, text in enumerate(control.texts)]
        inputs.append(kind(options=options, value=control.start, description=control.label))
        inputs[-1].style.description_width = "initial"
    looks = shared_looks(plots)
    output, text = widgets.Output(), widgets.HTML()
    drawn: dict[int, str] = {}

    def redraw(_change: Any = None) -> None:
        number = 0
        for control, chooser in zip(controls, inputs, strict=True):
            number = number * len(control.values) + chooser.value
        if number not in drawn:
            png = png_bytes(draw(plots[number], axes, looks), small=False)
            drawn[number] = base64.b64encode(png).decode("ascii")
        # Set whole rather than captured: a fast slider then never shows two figures or an empty box.
        picture = {"image/png": drawn[number], "text/plain": alt}
        metadata = {"image/png": {"alt": alt, "width": round(96 * WIDTH)}}  # CSS pixels
        output.outputs = ({"output_type": "display_data", "data": picture, "metadata": metadata},)
        text.value = escape(plots[number].text)

    for chooser in inputs:
        chooser.observe(redraw, names="value")
    redraw()
    note = [widgets.HTMLMath(_inline(caption))] if caption else []
    box = widgets.VBox([*inputs, output, text, *note])
    bundle = box._repr_mimebundle_(include=None, exclude=None)
    return bundle[_VIEW]


def draw(plot: Plot, axes: tuple[Axis, Axis], looks: Looks) -> Figure:
    """Return `plot` as a matplotlib figure on the axes that all settings share.

    Args:
        plot: what to draw.
        axes: the x and y axis, from `shared_axes`.
        looks: the style of every series, from `shared_looks`.
    """
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, 3.6))
        ax = figure.subplots()
        ax.set(xscale=axes[0].scale, yscale=axes[1].scale, xlabel=axes[0].label, ylabel=axes[1].label)
        for name, y in plot.series.items():
            ax.plot(plot.x, y, label=name, **series_style(looks.series[name], points=len(plot.x)))
        for name, (xs, ys) in plot.reported.items():
            index, marker = looks.reported[name]
            chosen = reported_style(index) | {"marker": MARKERS[marker % len(MARKERS)]}
            ax.plot(xs, ys, label=f"{name}, reported", **chosen)
        line: dict[str, Any] = {"color": GREY, "linewidth": 1.0, "linestyle": ":"}
        for label, value in plot.hlines.items():
            ax.axhline(value, **line, marker="none")
            ax.annotate(label, (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        for label, value in plot.vlines.items():
            ax.axvline(value, **line, marker="none")
            ax.annotate(
                label, (value, 0.98), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top"
            )
        for axis, setting in ((ax.xaxis, axes[0]), (ax.yaxis, axes[1])):
            axis.set_ticks([value for value, _ in setting.ticks], [text for _, text in setting.ticks])
            axis.set_ticks([], minor=True)
        ax.set(xlim=(axes[0].lo, axes[0].hi), ylim=(axes[1].lo, axes[1].hi))
        figure.legend(loc="outside upper left", ncols=3)
        return figure
