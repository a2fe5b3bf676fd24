"""The stored form of an `explore` figure: its numbers, its still picture, its limits, and its live controls."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from papercore.lab.explore import JSON_LIMIT, explore
from papercore.lab.page_svg import rounded
from papercore.lab.plot import Plot, number_text, shared_axes, ticks


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Call explore as a program without Jupyter does; return the HTML that it writes."""
    monkeypatch.setenv("PAPERCORE_FIGURES", str(tmp_path))

    def write(fn, *, name="play", alt="Loss falls.", **more):
        explore(fn, name=name, alt=alt, **more)
        return (tmp_path / f"{name}.html").read_text(encoding="utf-8")

    return write


def decay(rate=0.5, kind="exponential"):
    t = np.arange(1, 9)
    y = rate**t if kind == "exponential" else rate / t
    return Plot(
        t, {"left": y, "half": 0 * t + 0.5}, "step", "share", text=f"rate {rate}", hlines={"floor": 0.1}
    )


def spec_of(html):
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(text)


def svg_of(html):
    return ElementTree.fromstring(re.search(r'<svg class="pc-plot".*?</svg>', html, flags=re.DOTALL)[0])


class Balance(HTMLParser):
    """Counts open elements, to see that every one is closed in order."""

    void = frozenset({"input", "br", "img"})

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_grid_holds_the_plot_of_every_setting(page):
    rates, kinds = [0.2, 0.5, 0.9], ["exponential", "harmonic"]
    spec = spec_of(page(decay, rate=rates, kind=kinds))
    assert [c["values"] for c in spec["controls"]] == [["0.2", "0.5", "0.9"], kinds]
    assert [c["slider"] for c in spec["controls"]] == [True, False]
    assert len(spec["frames"]) == 6
    number = 0
    for rate in rates:
        for kind in kinds:
            frame = {**spec["shared"], **spec["frames"][number]}
            expected = decay(rate, kind)
            assert frame["x"] == expected.x.tolist()
            assert frame["y"][0] == pytest.approx(expected.series["left"], rel=1e-3)
            assert frame["text"] == f"rate {rate}"
            number += 1
    assert spec["shared"]["h"] == [["floor", 0.1]], "what all settings share stands once"
    assert "x" in spec["shared"] and "y" not in spec["shared"]


def test_start_is_the_default_of_the_function_else_the_middle_else_the_first(page):
    def plot(a, b=4, c="z"):
        return Plot([0, 1], {"y": [0, 1]}, "x", "y", text=f"{a} {b} {c}")

    spec = spec_of(page(plot, a=[1, 2, 3], b=[1, 2, 4], c=["u", "v"]))
    assert [c["start"] for c in spec["controls"]] == [1, 2, 0]


def test_page_is_closed_self_contained_html_with_a_still_picture(page):
    html = page(decay, caption="Move `rate`: $r<1$ & see.", rate=[0.2, 0.5], labels={"rate": "rate r"})
    assert "http" not in html and "src=" not in html and "//" not in re.sub(r"<script.*?</script>", "", html)
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    svg = svg_of(html)
    assert svg.get("role") == "img" and svg.get("aria-label") == "Loss falls. Shown: rate r = 0.5."
    assert svg.find("desc").text == svg.get("aria-label")
    texts = [node.text for node in svg.iter("text")]
    assert {"step", "share", "floor"} <= set(texts)
    assert not any(tag == "input" for tag, _ in parser.seen), "a control without its script would do nothing"
    assert '<code>rate</code>: <span class="math notranslate">\\(r&lt;1\\)</span> &amp; see.' in html


def test_still_picture_places_the_points_of_the_first_setting(page):
    def line(slope=1):
        return Plot([0, 10], {"y": [0, 10 * slope]}, "x", "y", xlim=(0, 10), ylim=(0, 20))

    svg = svg_of(page(line, slope=[1, 2]))
    frame = next(
        n.get("d")
        for n in svg.iter("path")
        if "opacity" in n.attrib and "H" in n.get("d") and "V" in n.get("d")
    )
    left, top, bottom, right = map(
        float, re.fullmatch(r"M([\d.]+),([\d.]+)V([\d.]+)H([\d.]+)", frame).groups()
    )
    curve = next(n.get("d") for n in svg.iter("path") if n.get("stroke-width") == "2")
    x0, y0, x1, y1 = map(float, re.fullmatch(r"M([\d.]+),([\d.]+)L([\d.]+),([\d.]+)", curve).groups())
    assert (x0, y0, x1) == pytest.approx((left, bottom, right))
    assert y1 == pytest.approx((top + bottom) / 2, abs=0.1), "10 of 20 is half-way up"


def test_gaps_and_log_axes_leave_out_what_cannot_be_drawn(page):
    def holes(k=1):
        return Plot([1, 10, 100, 1000], {"y": [1e-3, np.nan, 0.0, k]}, "x", "y", "log", "log")

    html = page(holes, k=[1, 10])
    spec = spec_of(html)
    assert spec["frames"][0]["y"][0] == [0.001, None, None, 1]
    assert [text for _, text in spec["axes"]["x"]["ticks"]] == ["1", "10", "100", "1000"]
    curve = next(n.get("d") for n in svg_of(html).iter("path") if n.get("stroke-width") == "2")
    assert curve.count("M") == 2 and "L" not in curve, "no line across a gap"


def test_labels_cannot_break_out_of_the_page(page):
    evil = "</script><script>alert(1)</script>"

    def plot(k=1):
        return Plot([0, 1], {evil: [0, k]}, evil, evil, text=evil)

    html = page(plot, alt=f'"{evil}', caption=evil, k=[1, 2])
    assert html.count("<script") == 1 and html.count("</script>") == 1
    assert spec_of(html)["series"][0]["name"] == evil
    assert svg_of(html).get("aria-label").startswith(f'"{evil}')


def test_reported_values_are_hollow_in_their_series_colour(page):
    def plot(k=1):
        return Plot(
            [0, 1], {"a": [0, 1], "b": [1, k]}, "x", "y", reported={"b": (0.5, 0.7), "other": ([0], [1])}
        )

    html = page(plot, k=[1, 2])
    spec = spec_of(html)
    beside, alone = spec["reported"]
    assert (beside["colour"], beside["mark"]) == (spec["series"][1]["colour"], spec["series"][1]["mark"])
    assert "currentColor" in alone["colour"]
    assert spec["shared"]["r"] == [[[0.5], [0.7]], [[0], [1]]]
    assert html.count("fill:var(--pc-ground,#fff)") == 4, "two in the picture, two in the legend"
    assert "b, reported" in html


def test_same_call_gives_the_same_bytes(page):
    assert page(decay, rate=[0.2, 0.5]) == page(decay, rate=[0.2, 0.5])


def test_more_than_50_kb_is_refused_with_size_and_cure(page, tmp_path):
    rng = np.random.default_rng(0)

    def noise(seed):
        return Plot(np.arange(400), {"y": rng.normal(size=400)}, "x", "y")

    with pytest.raises(
        ValueError, match=r"take \d+ kB \(40 settings x 1 series x 400 points\); at most 50 kB.* thin each"
    ):
        page(noise, seed=list(range(40)))
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    html = page(noise, seed=list(range(12)))
    assert 20_000 < len(json.dumps(spec_of(html), separators=(",", ":"))) <= JSON_LIMIT


def test_a_hopeless_grid_is_refused_after_one_call():
    calls = []

    def plot(**setting):
        calls.append(setting)
        return Plot(np.arange(100), {"y": np.arange(100)}, "x", "y")

    values = list(range(50))
    with pytest.raises(ValueError, match="at most 50 kB"):
        explore(plot, name="play", alt="A line.", a=values, b=values, c=values)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({}, "no range is given"),
        ({"rate": 0.5}, "give the list of values"),
        ({"rate": "fast"}, "give the list of values"),
        ({"rate": []}, "at least one value"),
        ({"rate": [0.5, 0.5]}, "no value twice"),
        ({"rate": [0.5, float("nan")]}, "finite numbers or texts"),
        ({"rate": [0.5, (1,)]}, "finite numbers or texts"),
        ({"rate": [0.5], "labels": {"speed": "v"}}, "labels names"),
    ],
)
def test_wrong_ranges_are_refused(ranges, message):
    with pytest.raises(ValueError, match=message):
        explore(decay, name="play", alt="Loss falls.", **ranges)


def test_alt_name_and_return_are_checked():
    with pytest.raises(ValueError, match="alt is empty"):
        explore(decay, name="play", alt="", rate=[0.5])
    with pytest.raises(ValueError, match="letters, digits"):
        explore(decay, name="a b", alt="Loss falls.", rate=[0.5])
    with pytest.raises(TypeError, match="must return papercore.lab.figures.Plot"):
        explore(lambda rate: [rate], name="play", alt="Loss falls.", rate=[0.5])


def test_settings_must_share_their_axes():
    def plot(k):
        return Plot([0, 1], {"y": [0, k]}, "x", f"y over {k}")

    with pytest.raises(ValueError, match="ylabel differs between settings"):
        explore(plot, name="play", alt="A line.", k=[1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"series": {}}, "series is empty"),
        ({"series": {"y": [1, 2, 3]}}, "as many values as x"),
        ({"x": [0, np.inf]}, "x holds a value that is not finite"),
        ({"x": []}, "T >= 1"),
        ({"yscale": "logit"}, "'linear', 'log'"),
        ({"xlabel": r"$\eta$"}, "knows no TeX"),
        ({"series": {"": [1, 2]}}, "not empty"),
        ({"ylim": (2, 1)}, "low < high"),
        ({"yscale": "log", "ylim": (0, 1)}, "above 0"),
        ({"yscale": "log", "hlines": {"zero": 0.0}}, "logarithmic"),
        ({"reported": {"a": ([1, 2], [1])}}, "reported ys"),
    ],
)
def test_plot_refuses_what_it_cannot_draw(change, message):
    arguments = {"x": [0, 1], "series": {"y": [1, 2]}, "xlabel": "x", "ylabel": "y"} | change
    with pytest.raises(ValueError, match=message):
        Plot(**arguments)


def test_axes_hold_all_settings():
    x, y = shared_axes([Plot([0, 1], {"y": [0, k]}, "x", "y", hlines={"top": 7.0}) for k in (1, 5)])
    assert x.lo < 0 < 1 < x.hi and y.lo < 0 < 7 < y.hi
    _, flat = shared_axes([Plot([0, 1], {"y": [3, 3]}, "x", "y")])
    assert flat.lo < 3 < flat.hi
    with pytest.raises(ValueError, match="no value is finite and above 0"):
        shared_axes([Plot([0, 1], {"y": [0, -1]}, "x", "y", yscale="log")])


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize(
    ("lo", "hi"), [(0.011, 0.93), (3.0, 4.0), (1e-7, 2e3), (99_990.0, 100_020.0), (1e-9, 3e-9)]
)
def test_ticks_lie_inside_are_few_and_differ(lo, hi, scale):
    found = ticks(lo, hi, scale)
    values, texts = zip(*found, strict=True)
    assert 2 <= len(found) <= 12
    slack = 1e-6 * (hi - lo if scale == "linear" else lo)
    assert all(lo - slack <= value <= hi + slack for value in values)
    assert list(values) == sorted(set(values)) and len(set(texts)) == len(texts)


def test_numbers_are_short_but_positions_stay_apart():
    assert rounded(np.array([1 / 3, 2e-7 / 3, 123_456.0])) == [0.3333, 6.667e-08, 123500]
    steps = np.arange(20_000.0, 20_050.0)
    assert rounded(steps, apart=True) == steps.astype(int).tolist()
    assert all(len(str(v)) <= 9 for v in rounded(np.logspace(-6, 0, 50), apart=True))
    assert [number_text(v) for v in (0, -0.5, 12_345, 1e5, -2.5e-7)] == [
        "0",
        "−0.5",
        "12345",
        "10⁵",
        "−2.5×10⁻⁷",
    ]
