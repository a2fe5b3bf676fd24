"""Claims: every field is checked, every verdict comes out as defined, and the claims of the chapters are whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from papercore.lab import claims as module
from papercore.lab.claims import (
    VERDICTS,
    Claim,
    Row,
    judge,
    left_out,
    load_claims,
    reported,
    reported_value,
    slugs,
    totals,
)
from papercore.lab.config import SCALES
from papercore.lab.record import Record

CLAIM = {
    "id": "toy/C1",
    "text": "Twice is\n  more.",
    "where": "Table 1",
    "reported": 2.5,
    "metric": "eps_1e-4",
    "scales": ["quick", "standard"],
    "rule": ">= 0.9",
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write claims of a chapter `toy` where the package looks for them."""
    folder = tmp_path / "claims"
    folder.mkdir()
    monkeypatch.setattr(module.resources, "files", lambda package: tmp_path)

    def written(*claims, text=None, **more):
        for cache in (module.load_claims, module._document, module.reported):
            cache.cache_clear()
        document = {"chapter": "toy", "claims": list(claims), **more}
        (folder / "toy.yml").write_text(yaml.safe_dump(document) if text is None else text, encoding="utf-8")
        return folder

    yield written
    for cache in (module.load_claims, module._document, module.reported):
        cache.cache_clear()


def _record(scale="quick", **metrics):
    made = Record(
        "toy",
        scale,
        {"scale": scale, "device": "cpu", "seed": 0},
        metrics={k.replace("__", "-"): v for k, v in metrics.items()},
    )
    made.path = Path("runs/toy/quick.json")
    return made


def test_every_field_is_read(write):
    write(
        {
            **CLAIM,
            "shows": "{eps_1e_4:.1f}",
            "why": "Because\nof it.",
            "expected": "fails",
            "figure": "fig-toy",
            "confidence": "memory",
        }
    )
    (claim,) = load_claims("toy")
    everywhere = {"quick": ">= 0.9", "standard": ">= 0.9"}
    assert claim == Claim(
        id="toy/C1", text="Twice is more.", where="Table 1", reported="2.5",
        metric=dict.fromkeys(everywhere, "eps_1e-4"), shows=dict.fromkeys(everywhere, "{eps_1e_4:.1f}"),
        scales=("quick", "standard"), rule=everywhere, why=dict.fromkeys(SCALES, "Because of it."),
        expected=dict.fromkeys(everywhere, "fails"), figure="fig-toy", confidence="memory",
    )  # fmt: skip
    assert claim.slug == "toy" and claim.parsed_rule("quick").names == ["eps_1e_4"]
    assert slugs() == ["toy"] and left_out("toy") == []


def test_what_is_left_out_has_its_defaults(write):
    write(CLAIM, {"id": "toy/C2", "text": "b", "where": "", "reported": "no number", "scales": []})
    first, second = load_claims("toy")
    assert (first.shows, first.why, first.expected, first.figure, first.confidence) == (
        {},
        {},
        {},
        None,
        "paper",
    )
    assert (second.metric, second.scales, second.rule) == ({}, (), {})


def test_a_field_may_differ_by_scale(write):
    different = {
        "rule": {"quick": ">= 0.9", "standard": "> 2"},
        "metric": {"quick": "a", "standard": "b"},
        "shows": {"standard": "{b:.1f}"},
        "why": {"standard": "Too small."},
        "expected": {"standard": "fails"},
    }
    write({**CLAIM, **different})
    (claim,) = load_claims("toy")
    assert {field: getattr(claim, field) for field in different} == different
    assert claim.parsed_rule("quick").names == ["a"] and claim.parsed_rule("standard").names == ["b"]
    at = {
        scale: judge(claim, scale, _record(scale, a=1.0, b=1.0), fresh=True)
        for scale in ("quick", "standard")
    }
    assert (at["quick"].verdict, at["quick"].shown, at["quick"].why, at["quick"].unexpected) == (
        "holds",
        "1",
        "",
        False,
    )
    assert (at["standard"].label, at["standard"].shown, at["standard"].why) == (
        "fails (expected)",
        "1.0",
        "Too small.",
    )


WITHOUT = object()
BAD = {
    "unknown field": ({"rules": ">= 1"}, r"toy/C1: unknown fields \['rules'\]; known are \['confidence', 'expected', "),
    "no text": ({"text": WITHOUT}, r"toy/C1: missing \['text'\]"),
    "no id": ({"id": WITHOUT}, r"a claim without id: missing \['id'\]"),
    "another chapter's id": ({"id": "qsr/C1"}, r"qsr/C1: the id must begin with toy/"),
    "unknown scale": ({"scales": ["quick", "huge"]}, r"toy/C1: scales \['quick', 'huge'\], expected some of \['quick', 'standard', 'paper'\]"),
    "no rule": ({"rule": WITHOUT}, r"toy/C1: no rule for scale quick"),
    "no rule for one scale": ({"rule": {"quick": ">= 1"}}, r"toy/C1: no rule for scale standard"),
    "a rule for an unknown scale": ({"rule": {"quick": ">= 1", "standrd": ">= 1"}}, r"toy/C1: rule by scale has keys \['quick', 'standrd'\], expected some of"),
    "a rule that does not parse": ({"rule": ">= "}, r"toy/C1: rule '>=' does not parse"),
    "a rule that is no test": ({"rule": "x + 1"}, r"toy/C1: rule 'x \+ 1' is not a test"),
    "a rule that calls": ({"rule": "open(x) > 1"}, r"toy/C1: rule 'open\(x\) > 1' uses Call"),
    "a rule about nothing": ({"metric": WITHOUT}, r"toy/C1: rule '>= 0.9' begins with a comparison but its claim names no metric"),
    "expected without why": ({"expected": "fails"}, r"toy/C1: `expected` takes `fails`, and needs a `why` for scale quick"),
    "expected without why at one scale": ({"expected": "fails", "why": {"quick": "so"}}, r"toy/C1: .*needs a `why` for scale standard"),
    "expected with an empty why": ({"expected": "fails", "why": " "}, r"toy/C1: .*needs a `why` for scale quick"),
    "expected to hold": ({"expected": "holds", "why": "so"}, r"toy/C1: `expected` takes `fails`"),
    "shows an attribute": ({"shows": "{x.real}"}, r"toy/C1: shows '\{x.real\}' is not a template over metrics: \{x.real\} is no metric's name"),
    "shows a position": ({"shows": "{} and {}"}, r"toy/C1: .* is no metric's name"),
    "shows text as a number": ({"shows": "{x:d}"}, r"toy/C1: shows '\{x:d\}' is not a template over metrics: Unknown format code 'd'"),
    "shows a torn brace": ({"shows": "{x"}, r"toy/C1: .* is not a template over metrics: expected '}'"),
    "unknown confidence": ({"confidence": "hearsay"}, r"toy/C1: confidence 'hearsay', expected one of paper, repo, third-party, derived, memory"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_claim_that_is_not_whole_is_refused_by_name(write, bad):
    change, message = BAD[bad]
    write({k: v for k, v in {**CLAIM, **change}.items() if v is not WITHOUT})
    with pytest.raises(ValueError, match=rf"^claims/toy\.yml, {message}"):
        load_claims("toy")


def test_documents_that_are_not_whole_are_refused(write):
    write(CLAIM, {**CLAIM, "text": "again"})
    with pytest.raises(ValueError, match=r"claims/toy\.yml: toy/C1 stands there 2 times"):
        load_claims("toy")
    write(CLAIM, left_out=[{"id": "toy/C1", "reason": "too large"}])
    with pytest.raises(ValueError, match=r"claims/toy\.yml: toy/C1 stands there 2 times"):
        load_claims("toy")
    write("C1")
    with pytest.raises(ValueError, match=r"claims/toy\.yml: a claim is a mapping of fields, got 'C1'"):
        load_claims("toy")
    write(CLAIM, left_out=[{"id": "toy/C2"}])
    with pytest.raises(
        ValueError, match=r"claims/toy\.yml: left_out entries have id and reason, got \['id'\]"
    ):
        load_claims("toy")
    for text in ("claims: 3", "- a\n- b", ""):
        write(text=text)
        with pytest.raises(ValueError, match=r"claims/toy\.yml: expected a mapping with a list `claims`"):
            load_claims("toy")
    with pytest.raises(ValueError, match="no claims for chapter 'tay': chapters with claims are toy"):
        load_claims("tay")


def test_left_out_claims_are_kept_with_their_reason(write):
    write(CLAIM, left_out=[{"id": "toy/C2", "reason": "needs 30 GPUs"}])
    assert len(load_claims("toy")) == 1 and left_out("toy") == [{"id": "toy/C2", "reason": "needs 30 GPUs"}]


@pytest.fixture
def claim(write):
    write(
        {
            **CLAIM,
            "shows": "{eps_1e_4:.2f}, {other:+.1f}",
            "why": "It is small.",
            "expected": {"standard": "fails"},
            "figure": "fig-toy",
        }
    )
    return load_claims("toy")[0]


@pytest.mark.parametrize(
    ("scale", "metrics", "fresh", "verdict", "unexpected", "label"),
    [
        ("quick", {"eps_1e__4": 0.95}, True, "holds", False, "holds"),
        ("quick", {"eps_1e__4": 0.85}, True, "fails", True, "fails"),
        ("quick", {"eps_1e__4": math.nan}, True, "fails", True, "fails"),
        ("quick", {"eps_1e__4": 0.85}, False, "stale", False, "stale"),
        ("quick", {"other": 0.85}, True, "not run", False, "not run"),
        ("quick", {"other": 0.85}, False, "stale", False, "stale"),
        ("quick", None, True, "not run", False, "not run"),
        ("paper", {"eps_1e__4": 0.95}, True, "not tested at this scale", False, "not tested at this scale"),
        ("paper", None, True, "not tested at this scale", False, "not tested at this scale"),
        ("standard", {"eps_1e__4": 0.85}, True, "fails", False, "fails (expected)"),
        ("standard", {"eps_1e__4": 0.95}, True, "holds", True, "holds"),
        ("standard", {"eps_1e__4": 0.95}, False, "stale", False, "stale"),
    ],
)
def test_the_five_verdicts(claim, scale, metrics, fresh, verdict, unexpected, label):
    record = None if metrics is None else _record(scale, **metrics)
    row = judge(claim, scale, record, fresh=fresh)
    assert (row.verdict, row.unexpected, row.label) == (verdict, unexpected, label) and verdict in VERDICTS
    assert (row.slug, row.id, row.scale, row.figure, row.confidence) == (
        "toy",
        "toy/C1",
        scale,
        "fig-toy",
        "paper",
    )
    assert row.rule == ("" if scale == "paper" else ">= 0.9") and row.reported == "2.5"
    assert (row.record is None) == (metrics is None or scale == "paper")
    assert row.as_dict()["label"] == label and set(row.as_dict()) >= {
        "slug",
        "id",
        "scale",
        "verdict",
        "measured",
        "reported",
        "rule",
        "record",
    }


def test_a_record_is_asked_whether_it_is_fresh(claim, monkeypatch):
    monkeypatch.setattr(Record, "fresh", property(lambda self: False))
    assert judge(claim, "quick", _record(eps_1e__4=1.0)).verdict == "stale"
    monkeypatch.setattr(Record, "fresh", property(lambda self: True))
    assert judge(claim, "quick", _record(eps_1e__4=1.0)).verdict == "holds"


def test_measured_values_are_shown_with_a_mark_for_those_that_are_missing(claim, write):
    row = judge(claim, "quick", _record(eps_1e__4=0.95, other=2.0), fresh=True)
    assert (row.measured, row.shown, row.why) == (0.95, "0.95, +2.0", "It is small.")
    assert judge(claim, "quick", _record(eps_1e__4=0.95), fresh=True).shown == "0.95, ?"
    row = judge(claim, "quick", _record(other=2.0), fresh=True)
    assert (row.measured, row.shown, row.why) == (None, "?, +2.0", "the record does not hold eps_1e_4")
    row = judge(claim, "quick", _record(eps_1e__4=math.nan), fresh=True)
    assert (row.measured, row.shown) == (None, "?, ?")
    row = judge(claim, "quick", None, fresh=True)
    assert (row.measured, row.shown, row.record) == (None, "", None)
    write(CLAIM)
    assert judge(load_claims("toy")[0], "quick", _record(eps_1e__4=1 / 3), fresh=True).shown == "0.3333"


def _row(verdict, expected=False):
    return Row("toy", "toy/C1", "", "", "quick", verdict, expected, None, "", "", "paper", "", "", None, None)


def test_only_two_verdicts_can_surprise():
    surprising = {(v, e) for v in VERDICTS for e in (False, True) if _row(v, e).unexpected}
    assert surprising == {("fails", False), ("holds", True)}


def test_totals_count_each_label_once():
    rows = [
        _row("holds"),
        _row("fails"),
        _row("fails", True),
        _row("holds"),
        _row("stale"),
        _row("not run", True),
    ]
    assert totals(rows) == {"holds": 2, "fails": 1, "fails (expected)": 1, "stale": 1, "not run": 1}
    assert (
        list(totals(rows)) == ["holds", "fails", "fails (expected)", "stale", "not run"] and totals([]) == {}
    )


CSV = """\
paper,table,row,column,value,unit,source,confidence
toy,Table 1,MeZO,SST-2,92.7 (0.5),accuracy %,html,paper
toy,Table 1,MeZO,size,13B,weights,html,paper
toy,Table 1,MeZO,log,<0.1,MB,html,memory
toy,Table 1,"MeZO, large",ks,2;4;8,,html,derived
"""


def test_reported_numbers_are_read_from_their_table(write):
    folder = write(CLAIM)
    (folder / "toy.csv").write_text(CSV, encoding="utf-8")
    assert [reported_value("toy", "Table 1", "MeZO", column) for column in ("SST-2", "size", "log")] == [
        92.7,
        13.0,
        0.1,
    ]
    assert reported("toy")[3]["row"] == "MeZO, large"
    with pytest.raises(
        KeyError, match="toy: no reported number in table 'Table 2', row 'MeZO', column 'SST-2'"
    ):
        reported_value("toy", "Table 2", "MeZO", "SST-2")
    with pytest.raises(ValueError, match="could not convert"):
        reported_value("toy", "Table 1", "MeZO, large", "ks")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "paper,table",
            "paper,tables",
            r"toy\.csv has columns \['paper', 'tables', .*\], expected \['paper', 'table', ",
        ),
        (
            "toy,Table 1,MeZO,size",
            "mezo,Table 1,MeZO,size",
            r"toy\.csv, line 3: paper 'mezo', expected 'toy'",
        ),
        ("13B,weights,html,paper", "13B,weights,html", r"toy\.csv, line 3: expected 8 cells"),
        ("13B,weights,html,paper", "13B,weights,html,paper,more", r"toy\.csv, line 3: expected 8 cells"),
        ("html,memory", "html,rumour", r"toy\.csv, line 4: confidence 'rumour', expected one of paper, repo"),
        ("<0.1", " ", r"toy\.csv, line 4: no value"),
    ],
)
def test_a_damaged_table_of_reported_numbers_is_refused_with_its_line(write, before, after, message):
    folder = write(CLAIM)
    assert before in CSV
    (folder / "toy.csv").write_text(CSV.replace(before, after), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        reported("toy")
