"""Plot: what a function given to `explore` returns, and the axes that all its settings share.

The same plot is drawn three times: by matplotlib under a kernel, by Python as SVG for a page without scripts, and by
the page's own script when a slider moves. So it holds plain numbers and plain text, and the axes (limits, ticks and
their labels) are worked out here, once, for all of them. Axes are the same at every setting: a curve that moves
while its axis moves too shows nothing.

Glossary
    x          [T], positions shared by all series of one plot
    series     name -> [T]; a value that is not finite, or not positive on a log axis, is a gap
    lo, hi     ends of an axis in its own unit
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SCALES = ("linear", "log")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TICKS_WANTED = 5


@dataclass(frozen=True)
class Plot:
    """One or more series over common positions, with their axes.

    Args:
        x: [T] finite numbers.
        series: name -> [T] numbers; at least one. A value that is not finite is drawn as a gap.
        xlabel, ylabel: names of the axes with their units. Plain text: write η or 10⁻³, not TeX.
        xscale, yscale: "linear" or "log".
        text: a line to print below the plot, such as the number that the setting gives.
        hlines, vlines: label -> value, thin reference lines across the plot.
        reported: label -> (xs, ys), values that a paper reports, drawn as hollow markers. A label that is also a
            series takes that series' colour and marker.
        xlim, ylim: (low, high) of an axis; None takes them from the data of all settings.

    Raises:
        ValueError: on shapes that disagree, an unknown scale, no series, an empty label, or TeX in a label.

    Example:
        >>> plot = Plot([1, 2, 4], {"loss": [0.9, 0.5, 0.3]}, "step", "loss", yscale="log")
        >>> plot.series["loss"].shape
        (3,)
    """

    x: Any
    series: Mapping[str, Any]
    xlabel: str
    ylabel: str
    xscale: str = "linear"
    yscale: str = "linear"
    text: str = ""
    hlines: Mapping[str, float] = field(default_factory=dict)
    vlines: Mapping[str, float] = field(default_factory=dict)
    reported: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    xlim: tuple[float, float] | None = None
    ylim: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for what in ("xscale", "yscale"):
            if getattr(self, what) not in SCALES:
                raise ValueError(
                    f"{what} is {getattr(self, what)!r}; choose one of {', '.join(map(repr, SCALES))}"
                )
        labels = [("xlabel", self.xlabel), ("ylabel", self.ylabel)]
        for group in ("series", "hlines", "vlines", "reported"):
            labels += [(f"a label of {group}", label) for label in getattr(self, group)]
        for what, label in labels:
            if not isinstance(label, str) or not label.strip():
                raise ValueError(f"{what} is {label!r}; it must be a text that is not empty")
            if "$" in label:
                raise ValueError(
                    f"{what} is {label!r}; the page's script knows no TeX: write the symbol itself, as η or 10⁻³"
                )
        x = _numbers(self.x, "x")
        if not np.isfinite(x).all():
            raise ValueError("x holds a value that is not finite; only the series may have gaps")
        if not self.series:
            raise ValueError("series is empty; give at least one, as in {'loss': values}")
        series = {name: _numbers(y, f"series {name!r}", x.size) for name, y in self.series.items()}
        reported = {}
        for name, pair in self.reported.items():
            if len(pair) != 2:
                raise ValueError(f"reported {name!r} has {len(pair)} parts; give (xs, ys)")
            xs = _numbers(np.atleast_1d(pair[0]), f"reported xs of {name!r}")
            reported[name] = (xs, _numbers(np.atleast_1d(pair[1]), f"reported ys of {name!r}", xs.size))
        for what in ("xlim", "ylim"):
            _check_limits(what, getattr(self, what), getattr(self, what[0] + "scale"))
        for group, scale in (("hlines", self.yscale), ("vlines", self.xscale)):
            for label, value in getattr(self, group).items():
                if not math.isfinite(value) or (scale == "log" and value <= 0):
                    above = " and above 0, since the axis is logarithmic" if scale == "log" else ""
                    raise ValueError(f"{group} {label!r} is at {value!r}; it must be finite{above}")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "series", series)
        object.__setattr__(self, "reported", reported)


def _numbers(values: Any, what: str, size: int | None = None) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is not a sequence of numbers: {error}") from None
    if array.ndim != 1 or not array.size or (size is not None and array.size != size):
        wanted = "[T] with T >= 1" if size is None else f"[{size}], as many values as x"
        raise ValueError(f"{what} has shape {list(array.shape)}; expected {wanted}")
    return array


def _check_limits(what: str, limits: tuple[float, float] | None, scale: str) -> None:
    if limits is None:
        return
    low, high = limits
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (scale == "log" and low <= 0):
        above = " above 0" if scale == "log" else ""
        raise ValueError(f"{what} is {limits!r}; expected (low, high) with low < high, both finite{above}")


@dataclass(frozen=True)
class Axis:
    """One axis: its label, scale ("linear" or "log"), ends, and ticks as (value, text)."""

    label: str
    scale: str
    lo: float
    hi: float
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Looks:
    """Which style belongs to which name, at every setting of a figure.

    Attributes:
        series: name -> index of its style; a series keeps it where another one is absent.
        reported: name -> (index of the series it stands beside or None, index of its marker).
    """

    series: dict[str, int]
    reported: dict[str, tuple[int | None, int]]


def shared_looks(plots: Sequence[Plot]) -> Looks:
    """Return the styles of every series and every reported set of `plots`, in order of first appearance."""
    series = {name: i for i, name in enumerate(dict.fromkeys(n for plot in plots for n in plot.series))}
    reported: dict[str, tuple[int | None, int]] = {}
    alone = 3  # the diamond first, as in reported_style()
    for name in dict.fromkeys(n for plot in plots for n in plot.reported):
        reported[name] = (series[name], series[name]) if name in series else (None, alone)
        alone += name not in series
    return Looks(series, reported)


def shared_axes(plots: Sequence[Plot]) -> tuple[Axis, Axis]:
    """Return the x and y axis that fit every one of `plots`.

    Raises:
        ValueError: if the plots differ in labels, scales or limits, or a log axis has no positive value to show.
    """
    return _axis(plots, "x"), _axis(plots, "y")


def _axis(plots: Sequence[Plot], which: str) -> Axis:
    first = plots[0]
    for what in (which + "label", which + "scale", which + "lim"):
        if any(getattr(plot, what) != getattr(first, what) for plot in plots):
            given = sorted({repr(getattr(plot, what)) for plot in plots})
            raise ValueError(
                f"{what} differs between settings ({', '.join(given[:3])}); it must be the same at all of them"
            )
    label, scale, limits = (getattr(first, which + what) for what in ("label", "scale", "lim"))
    lo, hi = limits if limits is not None else _limits(plots, which, scale)
    return Axis(label, scale, float(lo), float(hi), tuple(ticks(lo, hi, scale)))


def _limits(plots: Iterable[Plot], which: str, scale: str) -> tuple[float, float]:
    parts: list[np.ndarray] = []
    for plot in plots:
        parts += [plot.x] if which == "x" else list(plot.series.values())
        parts += [pair[which == "y"] for pair in plot.reported.values()]
        lines = plot.vlines if which == "x" else plot.hlines
        parts.append(np.asarray(list(lines.values()), dtype=float))
    values = np.concatenate(parts)
    values = values[np.isfinite(values) & ((values > 0) | (scale == "linear"))]
    if not values.size:
        raise ValueError(
            f"nothing to show on the {which} axis: no value is finite"
            + (" and above 0" if scale == "log" else "")
        )
    if scale == "log":
        values = np.log10(values)
    low, high = float(values.min()), float(values.max())
    # A flat series still needs a height to be drawn in.
    pad = 0.04 * (high - low) if high > low else max(abs(low) * 0.1, 0.1)
    low, high = low - pad, high + pad
    return (10.0**low, 10.0**high) if scale == "log" else (low, high)


def ticks(lo: float, hi: float, scale: str) -> list[tuple[float, str]]:
    """Return about five round values between `lo` and `hi` with their texts.

    >>> ticks(0.0, 1.0, "linear")[1]
    (0.2, '0.2')
    >>> [text for _, text in ticks(1e-6, 1e-2, "log")]
    ['10⁻⁶', '10⁻⁵', '10⁻⁴', '10⁻³', '10⁻²']
    """
    if scale == "log":
        first, last = math.ceil(math.log10(lo) - 1e-9), math.floor(math.log10(hi) + 1e-9)
        if last - first >= 2:
            powers = range(first, last + 1, -(-(last - first) // 6))
            plain = first >= -2 and last <= 3
            return [
                (10.0**p, f"{10.0**p:g}" if plain else "10" + str(p).translate(_SUPERSCRIPT)) for p in powers
            ]
        values = [m * 10.0**p for p in range(first - 1, last + 1) for m in (1, 2, 5)]
        values = [v for v in values if lo * (1 - 1e-9) <= v <= hi * (1 + 1e-9)]
        if len(values) >= 3:
            return [(v, number_text(v)) for v in values]
    raw = (hi - lo) / _TICKS_WANTED
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    values = [float(f"{k * step:.12g}") for k in range(first, last + 1)]
    largest = max((abs(v) for v in values), default=0.0)
    texts = [number_text(v) for v in values]
    # Powers of ten keep long numbers short, unless the ticks differ only beyond their four digits.
    if (largest >= 1e5 or (largest and largest < 1e-3)) and len(set(texts)) == len(texts):
        return list(zip(values, texts, strict=True))
    decimals = max(len(f"{v:.10f}".rstrip("0").partition(".")[2]) for v in values)
    return [(v, f"{v:.{decimals}f}".replace("-", "−")) for v in values]


def number_text(value: float) -> str:
    """Return `value` with at most four significant digits, powers of ten as superscripts.

    >>> number_text(0.25), number_text(2e-05), number_text(1_000_000)
    ('0.25', '2×10⁻⁵', '10⁶')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}".replace("-", "−") if abs(value) < 1e4 else f"{value:.0f}".replace("-", "−")
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    return power if mantissa == "1" else f"{mantissa.replace('-', '−')}×{power}"
