"""The table and the chart of verdicts: what a reader sees without scripts, and what a hostile text cannot do."""

import re
from html.parser import HTMLParser

import pytest

from papercore.lab.scoreboard import ROW_KEYS, VERDICTS, verdict_bar, verdict_table_html


def row(slug="mezo", claim="C1", scale="quick", verdict="holds", **more):
    basis = dict.fromkeys(ROW_KEYS) | {"text": "MeZO comes close to Adam.", "where": "Table 1"}
    return basis | {"slug": slug, "id": f"{slug}/{claim}", "scale": scale, "verdict": verdict} | more


class Table(HTMLParser):
    """Reads the data rows back, as a screen reader would."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.links, self.open, self.cell = [], [], [], None
        self.feed(html)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        attributes = dict(attrs)
        if tag == "tr" and "data-verdict" in attributes:
            self.rows.append((attributes, []))
        elif tag == "td":
            self.rows[-1][1].append("")
            self.cell = len(self.open)
        elif tag == "a":
            self.links.append(attributes["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "td":
            self.cell = None

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][1][-1] += data


def test_every_row_is_there_with_its_words():
    rows = [
        row(verdict=verdict, claim=f"C{i}", reported=0.912345, measured=1.5e-6)
        for i, verdict in enumerate(VERDICTS)
    ]
    found = Table(verdict_table_html(rows)).rows
    assert [attributes["data-verdict"] for attributes, _ in found] == list(VERDICTS)
    for (_, cells), verdict in zip(found, VERDICTS, strict=True):
        assert cells[:3] == ["quick", "0.9123", "1.5×10⁻⁶"]
        assert cells[3].endswith(verdict), "the verdict is a word, not a colour alone"


def test_a_claim_stands_once_with_a_line_for_each_scale():
    rows = [
        row(scale="quick", verdict="fails", why="the model is too small", rule="> 0.9"),
        row(
            scale="standard",
            verdict="holds",
            rule="> 0.8",
            record="mezo/standard-cuda.json",
            figure="fig-loss",
        ),
        row(slug="qsr", verdict="not run"),
    ]
    html = verdict_table_html(rows)
    assert html.count("MeZO comes close to Adam.") == 2, "once for each claim"
    assert "<b>Why (quick):</b> the model is too small" in html
    assert "Rule (quick)</dt><dd><code>&gt; 0.9</code>" in html
    assert "Record (standard)" in html
    assert Table(html).links == ["mezo.html", "mezo.html#fig-loss", "qsr.html"]
    assert "2 claims, 3 verdicts" in html


def test_values_may_be_missing_words_or_whole_numbers():
    cells = [
        Table(verdict_table_html([row(measured=value)])).rows[0][1][2]
        for value in (None, float("nan"), 12_345_678, "7 of 11", True)
    ]
    assert cells == ["–", "–", "12345678", "7 of 11", "True"]


def test_hostile_texts_stay_texts():
    evil = '"><script>alert(1)</script>'
    texts = dict.fromkeys(("text", "where", "measured", "reported", "rule", "why", "record", "scale"), evil)
    html = verdict_table_html([row(**texts, figure="javascript:alert(1)")])
    assert "<script" not in html
    html = verdict_table_html(
        [row(figure="https://example.org/x"), row(figure="//example.org/x", claim="C2")]
    )
    assert Table(html).links == ["mezo.html"], "an address outside the book is shown, not linked"


def test_page_asks_for_nothing_outside_and_hides_controls_that_need_the_script():
    html = verdict_table_html([row()])
    assert not re.search(r"http|src=|url\(", html)
    assert re.search(r"<form [^>]*\bhidden\b", html)
    assert not re.search(r"<(table|tbody|tr|details)[^>]*\bhidden\b", html), "without scripts all rows show"


def test_filters_list_scales_and_verdicts_in_their_own_order():
    html = verdict_table_html(
        [row(scale="paper", verdict="stale"), row(scale="quick"), row(scale="standard")]
    )
    options = re.findall(r'<option value="([^"]*)">', html)
    assert options == ["", "mezo", "", "quick", "standard", "paper", "", "holds", "stale"]


def test_wrong_rows_are_refused():
    with pytest.raises(
        ValueError, match=r"row 0 \(mezo/C1\) has the verdict 'passes'; it must be one of holds"
    ):
        verdict_table_html([row(verdict="passes")])
    with pytest.raises(ValueError, match="row 1 lacks rule, why"):
        verdict_table_html([row(), {k: v for k, v in row().items() if k not in ("rule", "why")}])


def test_no_rows_make_an_empty_board():
    assert Table(verdict_table_html([])).rows == []


def test_bar_counts_each_verdict_and_differs_by_hatch():
    pytest.importorskip("matplotlib")
    rows = [row(claim=f"C{i}") for i in range(3)]
    rows += [
        row(claim="C9", verdict="fails"),
        row("qsr", verdict="stale"),
        row("qsr", verdict="holds", scale="paper"),
    ]
    figure = verdict_bar(rows, scale="quick")
    (ax,) = figure.axes
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in ax.containers}
    assert widths == {"holds": [3, 0], "fails": [1, 0], "stale": [0, 1]}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["mezo", "qsr"]
    assert [text.get_text() for text in ax.texts] == ["3", "1", "1"]
    assert len({bars[0].get_hatch() for bars in ax.containers}) == 3
    assert [bar.get_width() for bar in verdict_bar(rows).axes[0].containers[0]] == [3, 1]
    with pytest.raises(ValueError, match="the scales of the rows are: quick, paper"):
        verdict_bar(rows, scale="standard")
    with pytest.raises(ValueError, match="no row to count"):
        verdict_bar([])
