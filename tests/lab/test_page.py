"""What a page says: texts filled from records, tables, verdicts without anything that moves between machines."""

import sys

import pytest

from papercore import experiments
from papercore.lab import page
from papercore.lab.claims import judge, load_claims
from papercore.lab.record import Record


@pytest.fixture
def record():
    record = Record.start(experiments.configure("mezo", "quick", "cpu"))
    record.metric("second_moment_worst_z", 1.25)
    record.metric("eps_1e-4_minus_full", -0.0125)
    record.table("t", ["name", "value"], [["a", 1], ["b", None]])
    return record.finish()


def test_text_is_filled_from_metrics_by_identifier(record):
    assert (
        page.filled(record, "  z {second_moment_worst_z:.1f}\n  and {eps_1e_4_minus_full:+.2%}")
        == "z 1.2\nand -1.25%"
    )
    assert page.filled(record, "{a} of {b:,}", a="one", b=1000) == "one of 1,000"


def test_what_is_not_measured_is_named(record):
    with pytest.raises(page.NotMeasured, match="at quick scale does not hold 'nothing' and 1 more"):
        page.filled(record, "{nothing} {zero}")
    with pytest.raises(page.NotMeasured, match="'missing'$"):
        page.rows(record, "missing")


def test_rows_are_dicts(record):
    assert page.rows(record, "t") == [{"name": "a", "value": 1}, {"name": "b", "value": None}]


def test_tables():
    text = page.table(["a|b", "n"], [["x|y", 1_234], [None, 0.5], ["z", True]], {"n": ".2f"})
    assert text.splitlines()[1:] == ["| --- | ---: |", "| x\\|y | 1234.00 |", "|  | 0.50 |", "| z | yes |"]
    assert "| 12,345 |" in page.table(["n"], [[12_345]])
    with pytest.raises(ValueError, match="a row of 2 cells under 1 heads"):
        page.table(["n"], [[1, 2]])
    with pytest.raises(ValueError, match="formats names"):
        page.table(["n"], [[1]], {"m": ".1f"})


def test_verdict_lines_hold_no_measured_digits(record):
    text = page.verdict_lines(record)
    assert "mezo/C11   holds" in text and "mezo/C1    not run" in text
    assert "1.25" not in text and text.splitlines()[-1].startswith("1 holds")


def test_board_rows_hide_folders_and_what_stands_beside_nothing(record, tmp_path):
    record.save(tmp_path / "quick.json")
    claims = {claim.id: claim for claim in load_claims("mezo")}
    found = [
        judge(claims[name], scale, record)
        for name in ("mezo/C11", "mezo/C17")
        for scale in ("quick", "paper")
    ]
    rows = page.board_rows(found, {"mezo": "A title"})
    assert rows[0]["record"] == "mezo/quick.json" and rows[0]["title"] == "A title"
    assert rows[0]["measured"] == "seven cases within 1.2 standard errors"
    assert rows[0]["reported"] and rows[1]["reported"] is None, "tested at quick alone"
    assert rows[2]["reported"] and rows[3]["reported"], "tested nowhere: what is reported is all there is"


def test_nothing_is_displayed_and_ipython_is_not_imported_without_jupyter(record, capsys):
    before = "IPython" in sys.modules
    page.tell(record, "{second_moment_worst_z}")
    page.show(lambda r: page.require(r, "nothing"), record)
    page.show_tables(record)
    page.verdicts(record)
    assert capsys.readouterr().out == "" and ("IPython" in sys.modules) == before


def test_outputs_in_a_shell(record, monkeypatch):
    shown = []
    monkeypatch.setattr(page, "interactive_shell", lambda: object())
    monkeypatch.setattr(page, "display_raw", lambda data, metadata: shown.append(data))
    page.tell(record, "z is {second_moment_worst_z:.2f}")
    page.tell(record, "{nothing}")
    page.show(lambda r: page.require(r, "nothing"), record)
    page.show_made(lambda r: page.table(["n"], [[1]]), record, caption="Head")
    page.show_tables(record)
    page.verdicts(record)
    texts = [data.get("text/markdown", "") for data in shown]
    assert texts[0] == "z is 1.25"
    assert texts[1] == "*No numbers here: a record at quick scale does not hold 'nothing'.*"
    assert texts[2].startswith("*No figure here:") and texts[3].startswith("**Head**\n\n| n |")
    assert (
        "**t**" in texts[4]
        and "<table>" in shown[5]["text/html"]
        and "pc-filters" not in shown[5]["text/html"]
    )


def test_a_figure_needs_words():
    for words in ({"alt": " ", "caption": "c"}, {"alt": "a", "caption": ""}):
        with pytest.raises(ValueError, match="is empty"):
            page.Drawn("fig-x", None, **words)
    with pytest.raises(ValueError, match="cannot be|becomes a label"):
        page.Drawn("fig x", None, alt="a", caption="c")
