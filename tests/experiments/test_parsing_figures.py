"""The chapter's figures, tables, controls and paragraphs are drawn from a record alone, and say its numbers."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib").use("agg")

from papercore.experiments.parsing import figures, play, tables  # noqa: E402
from papercore.lab import page  # noqa: E402
from papercore.lab.claims import load_claims  # noqa: E402
from papercore.lab.explore import explore  # noqa: E402
from papercore.lab.picture import png_bytes  # noqa: E402
from tests.experiments.parsing_made_record import benchmark_rows, made_record  # noqa: E402

DRAWN = ("charts", "idea", "layers", "learning", "probes", "size", "tokens", "truncation")
WITHOUT_RECORD = ("idea", "layers")


@pytest.fixture(scope="module")
def record():
    return made_record()


@pytest.fixture(scope="module")
def drawn(record):
    return {name: getattr(figures, name)(record) for name in DRAWN}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_draws_and_has_words(drawn, name):
    figure = drawn[name]
    assert figure.name == f"fig-parsing-{name}"
    assert len(figure.alt) > 60 and len(figure.caption) > 60
    png = png_bytes(figure.fig, dpi=figure.dpi, colours=figure.colours)
    assert png.startswith(b"\x89PNG") and len(png) < 45_000


def test_figures_of_the_claims_exist(drawn):
    wanted = {claim.figure for claim in load_claims("parsing") if claim.figure}
    assert wanted <= {figure.name for figure in drawn.values()}


@pytest.mark.parametrize("name", [name for name in DRAWN if name not in WITHOUT_RECORD])
def test_words_follow_the_record(record, drawn, name):
    """With other numbers the alternative text is another one: nothing in it was typed."""
    other = copy.deepcopy(record)
    other.arrays = {k: v * 0.5 if v.dtype.kind == "f" else v for k, v in other.arrays.items()}
    other.arrays["token_model"] = other.arrays["token_model"] ** 2
    other.metrics = {k: v * 2 if k != "in_terminals" else v for k, v in other.metrics.items()}
    assert getattr(figures, name)(other).alt != drawn[name].alt


def test_curves_show_what_the_record_holds(record, drawn):
    line = next(ln for ln in drawn["learning"].fig.axes[0].get_lines() if ln.get_label().startswith("masked"))
    np.testing.assert_allclose(line.get_ydata(), record.arrays["check_ce"])
    assert "2.60" in drawn["learning"].alt and "3.70" in drawn["learning"].alt


def test_reported_sizes_are_hollow(drawn):
    ax = drawn["size"].fig.axes[0]
    hollow = {float(ln.get_ydata()[0]) for ln in ax.get_lines() if ln.get_markerfacecolor() == "white"}
    assert hollow == {80_000.0, 1275.0}


def test_a_record_of_another_scale_is_named_in_a_sentence(record):
    other = copy.deepcopy(record)
    other.scale, other.tables, other.arrays, other.metrics = "standard", {}, {}, {}
    for name in DRAWN:
        if name not in WITHOUT_RECORD:
            with pytest.raises(page.NotMeasured, match="a record at standard scale does not hold"):
                getattr(figures, name)(other)
    for make in (
        tables.predictors,
        tables.beside,
        tables.truncation,
        tables.merged,
        tables.learned,
        tables.probed,
        tables.lost,
        tables.standard,
        tables.models,
        play.blank,
        play.chart,
        play.kept,
        play.widths,
    ):
        with pytest.raises(page.NotMeasured):
            make(other)
    other.notes["models"] = "Not trained here."
    with pytest.raises(page.NotMeasured, match="Not trained here"):
        tables.models(other)


def test_speed_reads_the_benchmarks_and_says_when_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("papercore.lab.benchmarks.record_folders", lambda: [tmp_path])
    with pytest.raises(page.NotMeasured, match="make bench"):
        figures.speed()
    file = tmp_path / "benchmarks" / "parsing.json"
    file.parent.mkdir()
    file.write_text("[]")
    with pytest.raises(ValueError, match="not a benchmark record"):
        figures.speed()
    file.write_text(json.dumps({"rows": benchmark_rows(), "rounds": 5, "model": "a grammar"}))
    found = figures.speed()
    assert "torch-struct SentCFG, all marginals 120" in found.alt and "5 interleaved rounds" in found.caption


def test_tables_hold_reported_beside_measured(record):
    text = tables.beside(record)
    assert "| exact construction, numbers a token | 80,000 | 80,000 |" in text
    assert tables.MISSING in text and "recalled, unconfirmed" in text and "more than 70 %" in text
    assert "| inside-outside | 2.600 | 0.000 |" in tables.predictors(record)
    assert "| 20 | 0.769 |" in tables.truncation(record)
    assert "| 15 | 829 | 22 | 0.800 |" in tables.merged(record)


def test_numbers_of_the_prose(record):
    assert tables.lost(record)["drop"] == pytest.approx(7.0)
    assert tables.lost(record)["merged_to"] == 15 and tables.lost(record)["merged_most"] == 20
    assert tables.learned(record)["window_closed"] == pytest.approx(1 - 1.1 / 2.5)
    gain = record.metrics["parse_linear_gain"]
    assert tables.probed(record)["p_parse_linear_gain"] == pytest.approx(100 * gain)


def test_controls_show_the_record_and_fit_in_a_page(record, tmp_path, monkeypatch):
    shown = play.blank(record)(play.sentences(record)[1])
    assert shown.series["inside-outside"].tolist() == [0.5, 0.25, 0.167] and "2 word2" in shown.text
    assert "is not the tree" in play.chart(record)().text
    assert "is also the tree" in play.chart(record)(play.texts()[1], 3).text
    assert play.kept(record)(36).series["F1 of the trees"][-1] == pytest.approx(0.93 * 36 / 42, abs=1e-3)
    monkeypatch.setenv("PAPERCORE_FIGURES", str(tmp_path))
    explore(play.blank(record), name="b", alt="x", sentence=play.sentences(record))
    explore(play.chart(record), name="c", alt="x", sentence=play.texts(), width=play.widths(record))
    explore(play.kept(record), name="k", alt="x", pre_terminals=play.pre_terminals(record))
    assert all(0 < (tmp_path / f"{name}.html").stat().st_size < 60_000 for name in "bck")


def test_paragraphs_of_the_notebook_find_their_numbers(record):
    """Every name in braces that the notebook's prose uses is in a quick record or in the tables' numbers."""
    import nbformat

    notebook = nbformat.read(Path(__file__).parents[2] / "book" / "parsing.ipynb", as_version=4)
    told = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "page.tell(record" in cell.source]  # fmt: skip
    assert len(told) >= 5
    more = tables.learned(record) | tables.probed(record) | tables.lost(record)
    for source in told:
        text = re.search(r'"""(.*?)"""', source, re.DOTALL)[1]
        given = dict.fromkeys(("where", "source", "torch"), "x") if "where=" in source else {}
        assert "{" not in page.filled(record, text, **more, **given)
