"""The picture of an `explore` figure in a page: its data as plain JSON, its legend, and an SVG drawn from them.

The page's script (book/_static/explore.js) draws the same JSON again whenever a control moves; what is drawn here is
what a reader without scripts sees. All that needs thought (axes, ticks, styles, rounding) is settled in the JSON,
so that the script only has to place it.

Glossary
    spec       the JSON: axes, styles of the series, frames
    frame      what one setting of the controls shows: x, y (one row per series, None where absent), text, lines
    mark       SVG path of a marker about its own centre, in pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from papercore.lab.figure_style import COLOURS, DASHES
from papercore.lab.plot import Axis, Looks, Plot, shared_looks

# One path per marker of figure_style.MARKERS, in the same order.
_MARKS = (
    "M-3.6,0a3.6,3.6 0 1,0 7.2,0a3.6,3.6 0 1,0 -7.2,0z",
    "M-3.2,-3.2h6.4v6.4h-6.4z",
    "M0,-4.2L4,3.2H-4z",
    "M0,-4.6L4.2,0L0,4.6L-4.2,0z",
    "M0,4.2L4,-3.2H-4z",
    "M-1.4,-4h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z",
    "M-4,-2.2L-2.2,-4L0,-1.8L2.2,-4L4,-2.2L1.8,0L4,2.2L2.2,4L0,1.8L-2.2,4L-4,2.2L-1.8,0z",
)
_INK = "var(--pc-ink,currentColor)"
STATIC_WIDTH, STATIC_HEIGHT = 500, 300


def specification(plots: Sequence[Plot], axes: tuple[Axis, Axis]) -> dict[str, Any]:
    """Return everything that drawing `plots` needs, as dicts, lists, numbers and texts for JSON.

    What all frames have in common stands once, under "shared".
    """
    looks = shared_looks(plots)
    frames = [_frame(plot, looks) for plot in plots]
    keys = dict.fromkeys(key for frame in frames for key in frame)
    shared = {
        key: frames[0].get(key)
        for key in keys
        if all(frame.get(key) == frames[0].get(key) for frame in frames)
    }
    return {
        "axes": {
            which: {
                "label": axis.label,
                "log": axis.scale == "log",
                "lo": axis.lo,
                "hi": axis.hi,
                "ticks": [list(tick) for tick in axis.ticks],
            }
            for which, axis in zip("xy", axes, strict=True)
        },
        "series": [{"name": name, **_look(i)} for name, i in looks.series.items()],
        "reported": [
            {"name": name, "colour": _INK if i is None else _colour(i), "mark": _MARKS[mark % len(_MARKS)]}
            for name, (i, mark) in looks.reported.items()
        ],
        "shared": shared,
        "frames": [{key: value for key, value in frame.items() if key not in shared} for frame in frames],
    }


def _colour(index: int) -> str:
    # A style sheet may brighten the colour for a dark ground; without one the palette's own is used.
    i = index % len(COLOURS)
    return f"var(--pc-series-{i},{COLOURS[i]})"


def _look(index: int) -> dict[str, Any]:
    i = index % len(COLOURS)
    dash = DASHES[i]
    return {
        "colour": _colour(i),
        "dash": "" if dash is None else " ".join(f"{1.4 * part:.3g}" for part in dash),
        "mark": _MARKS[i],
        # Where in a step the marked points begin: curves on top of each other mark different points.
        "phase": math.ceil(1000 * i / len(COLOURS)) / 1000,
    }


def _frame(plot: Plot, looks: Looks) -> dict[str, Any]:
    logs = plot.xscale == "log", plot.yscale == "log"
    pairs = [plot.reported.get(name) for name in looks.reported]
    frame: dict[str, Any] = {
        "x": rounded(plot.x, log=logs[0], apart=True),
        "y": [
            rounded(plot.series[name], log=logs[1]) if name in plot.series else None for name in looks.series
        ],
        "text": " ".join(plot.text.split()),
        "h": [[label, _short(value)] for label, value in plot.hlines.items()],
        "v": [[label, _short(value)] for label, value in plot.vlines.items()],
        "r": [
            None if pair is None else [rounded(pair[0], log=logs[0]), rounded(pair[1], log=logs[1])]
            for pair in pairs
        ],
    }
    return {key: value for key, value in frame.items() if value}


def rounded(values: np.ndarray, *, log: bool = False, apart: bool = False) -> list[float | int | None]:
    """Return `values` at four significant digits; values that cannot be drawn are None.

    Args:
        values: [T] numbers.
        log: they are for a log axis, where a value that is not positive is a gap.
        apart: they are positions: keep as many more digits (nine at most) as leave their spacing visible.

    >>> rounded(np.array([0.123456, np.nan, 2.0]))
    [0.1235, None, 2]
    >>> rounded(np.array([10_001.0, 10_002.0]), apart=True)
    [10001, 10002]
    """
    ok = np.isfinite(values) & ((values > 0) if log else True)
    digits = 4
    while apart and digits < 9 and not _spacing_kept(values[ok], digits):
        digits += 1
    return [_short(float(v), digits) if good else None for v, good in zip(values, ok, strict=True)]


def _spacing_kept(values: np.ndarray, digits: int) -> bool:
    error = np.abs(np.array([_short(float(v), digits) for v in values], dtype=float) - values)
    gaps = np.abs(np.diff(values))
    moved = np.maximum(error[1:], error[:-1])
    return bool((moved <= 0.05 * gaps).all())


def _short(value: float, digits: int = 4) -> float | int:
    number = float(f"{value:.{digits}g}")
    return int(number) if number.is_integer() and abs(number) < 1e9 else number


def legend_html(spec: dict[str, Any]) -> str:
    """Return the legend as a list that wraps at any width: a sample of each line with its marker, and its name."""
    items = []
    for look in spec["series"]:
        dash = f' stroke-dasharray="{look["dash"]}"' if look["dash"] else ""
        items.append(
            _legend_item(
                f'<path d="M1,7H41" fill="none" stroke-width="2"{dash} style="stroke:{look["colour"]}"/>'
                f'<path d="{look["mark"]}" transform="translate(21,7)" style="fill:{look["colour"]}"/>',
                look["name"],
            )
        )
    for look in spec["reported"]:
        items.append(_legend_item(_hollow(look, 21, 7), f"{look['name']}, reported"))
    rule = "display:flex;flex-wrap:wrap;gap:.1em 1.2em;list-style:none;padding:0;margin:.4em 0"
    return f'<ul class="pc-legend" style="{rule}">{"".join(items)}</ul>'


def _legend_item(sample: str, name: str) -> str:
    return f'<li><svg width="42" height="14" aria-hidden="true">{sample}</svg> {escape(name)}</li>'


def _hollow(look: dict[str, Any], x: float, y: float) -> str:
    return (
        f'<path d="{look["mark"]}" transform="translate({x:.1f},{y:.1f}) scale(1.25)" stroke-width="1.3" '
        f'style="fill:var(--pc-ground,#fff);stroke:{look["colour"]}"/>'
    )


def svg(spec: dict[str, Any], number: int, *, name: str, alt: str) -> str:
    """Return frame `number` of `spec` as an SVG element with `alt` as its accessible name."""
    frame = {**spec["shared"], **spec["frames"][number]}
    x_axis, y_axis = spec["axes"]["x"], spec["axes"]["y"]
    left = 34 + 7 * max((len(text) for _, text in y_axis["ticks"]), default=1)
    right, top, bottom = STATIC_WIDTH - 16, 14, STATIC_HEIGHT - 46
    place = _placer(x_axis, left, right), _placer(y_axis, bottom, top)
    clip = f"pc-clip-{name}"
    parts = [
        f'<svg class="pc-plot" viewBox="0 0 {STATIC_WIDTH} {STATIC_HEIGHT}" width="{STATIC_WIDTH}" role="img" '
        f'aria-label="{escape(alt)}" font-size="13" fill="currentColor" style="max-width:100%;height:auto">',
        f'<desc>{escape(alt)}</desc><clipPath id="{clip}">'
        f'<rect x="{left}" y="{top - 6}" width="{right - left + 6}" height="{bottom - top + 12}"/></clipPath>',
    ]
    for value, text in x_axis["ticks"]:
        at = place[0](value)
        parts.append(f'<path d="M{at:.1f},{top}V{bottom}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>')
    for value, text in y_axis["ticks"]:
        at = place[1](value)
        parts.append(f'<path d="M{left},{at:.1f}H{right}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    parts.append(f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="currentColor" opacity=".6"/>')
    middle = (top + bottom) / 2
    parts.append(
        f'<text x="{(left + right) / 2:.1f}" y="{STATIC_HEIGHT - 8}" text-anchor="middle">{escape(x_axis["label"])}</text>'
    )
    parts.append(
        f'<text transform="translate(15,{middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y_axis["label"])}</text>'
    )
    parts.append(f'<g clip-path="url(#{clip})">')
    rule = 'stroke="currentColor" stroke-dasharray="2 3" opacity=".75"'
    for label, value in frame.get("h", []):
        at = place[1](value)
        side = 14 if at < top + 12 else -5  # under a line that runs along the top
        parts.append(
            f'<path d="M{left},{at:.1f}H{right}" {rule}/>'
            f'<text x="{right - 4}" y="{at + side:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    for label, value in frame.get("v", []):
        at = place[0](value)
        side, anchor = (-5, "end") if at > (left + right) / 2 else (5, "start")
        parts.append(
            f'<path d="M{at:.1f},{top}V{bottom}" {rule}/>'
            f'<text x="{at + side:.1f}" y="{top + 10}" text-anchor="{anchor}">{escape(label)}</text>'
        )
    for look, ys in zip(spec["series"], frame["y"], strict=True):
        parts.append("" if ys is None else _curve(look, frame["x"], ys, place))
    for look, pair in zip(spec["reported"], frame.get("r", []), strict=False):
        if pair is not None:
            points = [(a, b) for a, b in zip(*pair, strict=True) if a is not None and b is not None]
            parts += [_hollow(look, place[0](a), place[1](b)) for a, b in points]
    return "".join(parts) + "</g></svg>"


def _placer(axis: dict[str, Any], start: float, end: float) -> Any:
    scale = math.log10 if axis["log"] else float
    lo, hi = scale(axis["lo"]), scale(axis["hi"])
    return lambda value: start + (end - start) * (scale(value) - lo) / (hi - lo)


def _curve(look: dict[str, Any], xs: list[Any], ys: list[Any], place: Any) -> str:
    line, marks, pen_down = [], [], False
    step = 1 if len(xs) <= 25 else -(-len(xs) // 10)
    offset = int(look["phase"] * step)
    for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if x is None or y is None:
            pen_down = False
            continue
        at = f"{place[0](x):.1f},{place[1](y):.1f}"
        line.append(("L" if pen_down else "M") + at)
        pen_down = True
        if k % step == offset:
            marks.append(
                f'<path d="{look["mark"]}" transform="translate({at})" style="fill:{look["colour"]}"/>'
            )
    dash = f' stroke-dasharray="{look["dash"]}"' if look["dash"] else ""
    path = f'<path d="{"".join(line)}" fill="none" stroke-width="2" stroke-linejoin="round"{dash} style="stroke:{look["colour"]}"/>'
    return path + "".join(marks)
