"""The chapter's figures, tables and paragraphs are drawn from a record alone, and say its numbers."""

import copy
import json
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib").use("agg")

from papercore.experiments.mezo import figures, tables  # noqa: E402
from papercore.lab import page  # noqa: E402
from papercore.lab.claims import load_claims, reported_value  # noqa: E402
from papercore.lab.picture import png_bytes  # noqa: E402
from tests.experiments.mezo_made_record import benchmark_rows, made_record  # noqa: E402

DRAWN = (
    "adapters",
    "bars",
    "checkpoints",
    "hours",
    "idea",
    "memory",
    "moments",
    "prompt",
    "rates",
    "storage",
    "variations",
)


@pytest.fixture(scope="module")
def record():
    return made_record()


@pytest.fixture(scope="module")
def drawn(record):
    return {name: getattr(figures, name)(record) for name in DRAWN}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_draws_and_has_words(drawn, name):
    figure = drawn[name]
    assert figure.name == f"fig-mezo-{name}"
    assert len(figure.alt) > 60 and len(figure.caption) > 60
    png = png_bytes(figure.fig, dpi=figure.dpi, colours=figure.colours)
    assert png.startswith(b"\x89PNG") and len(png) < 40_000
    assert all(ax.get_xlabel() or ax.get_ylabel() for ax in figure.fig.axes)


def test_figures_of_the_claims_exist(drawn):
    wanted = {claim.figure for claim in load_claims("mezo") if claim.figure}
    assert wanted <= {figure.name for figure in drawn.values()} | {"fig-mezo-steptime"}


def _moved(cell, column):
    """A number of its own for every column; small whole numbers, which name rows, stay."""
    if isinstance(cell, float):
        return cell * (1.5 + 0.1 * column)
    return cell * 3 if type(cell) is int and cell > 99 else cell


@pytest.mark.parametrize("name", [name for name in DRAWN if name != "idea"])
def test_words_follow_the_record(record, drawn, name):
    """With other numbers the alternative text is another one: nothing in it was typed."""
    other = copy.deepcopy(record)
    for array in other.arrays.values():
        if array.dtype.kind == "f":
            array *= 0.5
    other.metrics = {key: value * 2 for key, value in other.metrics.items()}
    for stored in other.tables.values():
        stored["rows"] = [[_moved(cell, column) for column, cell in enumerate(row)] for row in stored["rows"]]
    changed = getattr(figures, name)(other)
    assert changed.alt != drawn[name].alt


def test_curves_show_what_the_record_holds(record, drawn):
    ax = drawn["prompt"].fig.axes[0]
    line = next(line for line in ax.get_lines() if line.get_label() == "prompt")
    np.testing.assert_allclose(line.get_xdata(), 2 * record.arrays["eval_at"])
    np.testing.assert_allclose(line.get_ydata(), record.arrays["curve_full"].mean(axis=0))
    assert (
        "0.96" in drawn["prompt"].alt
        and f"{record.arrays['curve_full'].mean(axis=0)[-1]:.2f}" in drawn["prompt"].alt
    )


def test_reported_values_are_hollow_and_the_papers_own(drawn):
    expected = {
        "prompt": {
            reported_value("mezo", "Table 5 (prompt ablation, k=16, 10K fwd)", "Prompt", "TREC") / 100
        },
        "bars": {reported_value("mezo", "Table 18 (RoBERTa-large) k=16", "MeZO", "TREC") / 100},
        "memory": {26.0, 316.0},
        "storage": {38e6, 12e6},
        "variations": {73.0 - 92.7},
    }
    for name, values in expected.items():
        hollow = [
            line
            for ax in drawn[name].fig.axes
            for line in ax.get_lines()
            if line.get_markerfacecolor() == "white"
        ]
        shown = {
            round(float(v), 6)
            for line in hollow
            for data in (line.get_xdata(), line.get_ydata())
            for v in np.asarray(data, dtype=float)
        }
        assert {round(value, 6) for value in values} <= shown, name


def test_a_record_of_another_scale_is_named_in_a_sentence(record):
    other = copy.deepcopy(record)
    other.scale, other.tables, other.arrays, other.metrics = "standard", {}, {}, {}
    for name in DRAWN:
        if name != "idea":
            with pytest.raises(page.NotMeasured, match="a record at standard scale does not hold"):
                getattr(figures, name)(other)
    for make in (
        tables.beside,
        tables.drift,
        tables.costs,
        tables.gaps,
        tables.speeds,
        tables.limits,
        tables.differences,
        tables.one_point,
        tables.standard,
    ):
        with pytest.raises(page.NotMeasured):
            make(other)


def test_step_time_reads_the_benchmarks_and_says_when_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("papercore.lab.benchmarks.record_folders", lambda: [tmp_path])
    with pytest.raises(page.NotMeasured, match="make bench"):
        figures.step_time()
    file = tmp_path / "benchmarks" / "mezo.json"
    file.parent.mkdir()
    file.write_text("[]")
    with pytest.raises(ValueError, match="not a benchmark record"):
        figures.step_time()
    file.write_text(json.dumps({"rows": benchmark_rows(), "rounds": 7, "model": "decoder of 5 weights"}))
    found = figures.step_time()
    assert "signs 1.20" in found.alt and "6.00" in found.alt and "7 rounds" in found.caption
    assert [text.get_text() for text in found.fig.axes[0].get_yticklabels()] == [
        "MeZO, numba, signs",
        "paper's code, re-implemented, Gaussian",
    ]


def test_standard_figure_and_table():
    record = made_record()
    record.scale, record.metrics, record.arrays = "standard", {}, {}
    for name, value in (
        ("zero_shot", 0.3),
        ("chance", 1 / 6),
        ("test_questions", 500),
        ("full_mean", 0.61),
        ("full_std", 0.02),
        ("full_parameters", 1000),
    ):
        record.metric(f"standard_{name}", value)
    record.array("standard_k_full_steps", np.array([100, 200]))
    record.array("standard_k_full_accuracy", np.array([[0.4, 0.6], [0.5, 0.62]]))
    assert "all weights 0.61" in figures.standard(record).alt
    assert "| MeZO, all weights | 1,000 | 61.0 | 2.0 |" in tables.standard(record)


def test_tables_hold_reported_beside_measured(record):
    text = tables.beside(record)
    row = next(line for line in text.splitlines() if line.startswith("| MeZO all weights"))
    assert row == "| MeZO all weights | 91.4 | 76.9 | 70.0 | 2.0 |"
    assert "| in-context | 87.0 |  | 55.0 | 2.0 |" in text
    assert "| float16 | 1.30 | 0.40 | 1.10 | 0.39 | 0 |" in tables.drift(record)
    assert "| SNLI | 57.3 | 68.5 | +11.2 |" in tables.black_box(record)


def test_numbers_of_the_prose(record):
    costs = tables.costs(record)
    assert costs["hours_30b"] == pytest.approx(0.517, abs=1e-3) and costs[
        "hours_66b_strict"
    ] == pytest.approx(2.37, abs=0.01)
    gaps = tables.gaps(record)
    assert gaps["passes"] == 128 and gaps["passes_end"] == 192 and gaps["lost_end"] == pytest.approx(47)
    assert tables.speeds(record) == {"sizes": pytest.approx(120_192 / 1280), "steps": pytest.approx(25 / 12)}
    assert tables.differences(record)["over_icl"] == pytest.approx(12.3)


def test_paragraphs_of_the_notebook_find_their_numbers(record):
    """Every name in braces that the notebook's prose uses is in a quick record or in the tables' numbers."""
    from pathlib import Path

    import nbformat

    notebook = nbformat.read(Path(__file__).parents[2] / "book" / "mezo.ipynb", as_version=4)
    told = [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and "page.tell(record" in cell.source
    ]
    assert len(told) > 5
    more = (
        tables.limits(record) | tables.speeds(record) | tables.differences(record) | tables.one_point(record)
    )
    for source in told:
        text = re.search(r'"""(.*?)"""', source, re.DOTALL)[1]
        given = dict.fromkeys(("where", "source", "torch"), "x") if "where=" in source else {}
        assert "{" not in page.filled(record, text, **more, **given)


def test_failed_seeds_are_named(record):
    other = copy.deepcopy(record)
    table = other.tables["few_shot"]
    table["columns"] += ["seed 0", "seed 1"]
    table["rows"] = [
        [*row, 0.9, 0.2 if row[0] == "MeZO prefix" and row[1] == 16 else 0.8] for row in table["rows"]
    ]
    assert "Ended below 0.5: 1 of 2 runs of MeZO prefix at k = 16." in figures.bars(other).caption
    assert "No MeZO run ended below 0.5." in figures.bars(record).caption
    other.arrays["losses_lora"][0] = 2.0
    assert "above the dotted line: 1 of 5 with LoRA." in figures.adapters(other).caption
