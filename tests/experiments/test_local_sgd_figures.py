"""The chapter's figures, tables and paragraphs are drawn from a record alone, and say its numbers."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

pytest.importorskip("matplotlib").use("agg")

from papercore.experiments.local_sgd import figures, tables  # noqa: E402
from papercore.experiments.local_sgd.standard_forms import REDUCED  # noqa: E402
from papercore.lab import page  # noqa: E402
from papercore.lab.claims import judge, load_claims  # noqa: E402
from papercore.lab.picture import png_bytes  # noqa: E402
from tests.experiments.local_sgd_made_record import made_record, made_standard_record  # noqa: E402

DRAWN = ("conditions", "diffusion", "flatness", "idea", "plane", "post", "rates", "scratch", "slow_time")


@pytest.fixture(scope="module")
def record():
    return made_record()


@pytest.fixture(scope="module")
def standard():
    return made_standard_record()


@pytest.fixture(scope="module")
def drawn(record):
    return {name: getattr(figures, name)(record) for name in DRAWN}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_draws_and_has_words(drawn, name):
    figure = drawn[name]
    assert figure.name == f"fig-local_sgd-{name.replace('_', '-')}"
    assert len(figure.alt) > 60 and len(figure.caption) > 60
    png = png_bytes(figure.fig, dpi=figure.dpi, colours=figure.colours)
    assert png.startswith(b"\x89PNG") and len(png) < 40_000
    assert all(ax.get_xlabel() or ax.get_ylabel() for ax in figure.fig.axes)


def test_figures_of_the_claims_exist(drawn):
    wanted = {claim.figure for claim in load_claims("local_sgd") if claim.figure}
    assert wanted <= {figure.name for figure in drawn.values()} | {"fig-local_sgd-standard"}


@pytest.mark.parametrize("name", [name for name in DRAWN if name != "idea"])
def test_words_follow_the_record(record, drawn, name):
    """With other numbers the alternative text is another one: nothing in it was typed."""
    other = copy.deepcopy(record)
    for array in other.arrays.values():
        if array.dtype.kind == "f":
            array *= 0.5
    other.metrics = {key: value * 2 for key, value in other.metrics.items()}
    for stored in other.tables.values():
        stored["rows"] = [
            [1.5 * cell if isinstance(cell, float) else cell for cell in row] for row in stored["rows"]
        ]
    assert getattr(figures, name)(other).alt != drawn[name].alt


def test_curves_show_what_the_record_holds(record, drawn):
    ax = drawn["post"].fig.axes[0]
    line = next(line for line in ax.get_lines() if line.get_label() == "H = 64")
    np.testing.assert_allclose(line.get_ydata(), record.arrays["post_h64_test_accuracy"].mean(axis=0))
    np.testing.assert_allclose(line.get_xdata(), 800 + record.arrays["post_steps"])
    points = drawn["rates"].fig.axes[0].containers[0].lines[0]
    np.testing.assert_allclose(
        np.asarray(points.get_ydata(), dtype=float),
        [row["simulated"] for row in page.rows(record, "rates") if row["eta"] == 0.02],
    )


def test_a_record_of_another_scale_is_named_in_a_sentence(record):
    other = copy.deepcopy(record)
    other.scale, other.tables, other.arrays, other.metrics = "standard", {}, {}, {}
    for name in (*DRAWN, "standard"):
        if name != "idea":
            with pytest.raises(page.NotMeasured, match="a record at standard scale does not hold"):
                getattr(figures, name)(other)
    for make in (
        tables.settings,
        tables.communication,
        tables.post,
        tables.scratch,
        tables.standard,
        tables.longest,
        tables.controls,
    ):
        with pytest.raises(page.NotMeasured):
            make(other)


def test_standard_figure_table_and_verdicts(standard):
    shown = figures.standard(standard)
    first, last = REDUCED.periods[0], REDUCED.periods[-1]
    gain = standard.metrics[f"standard_post_h{last}_gain"]
    assert f"H = {last}: {gain:+.2f}" in shown.alt and "K = 8" in shown.caption
    text = tables.standard(standard)
    arms = (1 + len(REDUCED.periods)) + 2 + (1 + len(REDUCED.noise_periods))
    assert text.count("\n") == 1 + arms and f"| post-local, small η | H = {first} |" in text
    verdicts = {
        claim.id: judge(claim, "standard", standard, fresh=True).verdict for claim in load_claims("local_sgd")
    }
    tested = {name: verdict for name, verdict in verdicts.items() if verdict != "not tested at this scale"}
    assert set(tested) == {f"local_sgd/L{i}" for i in (1, 6, 7, 8, 10)}
    assert set(tested.values()) <= {"holds", "fails"}
    # Made so that long rounds help at the small rate and hardly at the large one, and more with time.
    assert [tested[f"local_sgd/L{i}"] for i in (1, 6, 8, 10)] == ["holds"] * 4


def test_conditions_compare_equal_numbers_of_steps(standard):
    short = standard.metrics["standard_main_short_steps"]
    h = int(standard.metrics["standard_main_h"])
    assert (
        short in standard.arrays[f"standard_post_h{h}_step"][0]
        and short in standard.arrays["standard_post_h1_step"][0]
    )
    assert 0.1 * 2000 <= short < 2000


def test_quick_verdicts_of_a_record_in_which_everything_is_as_the_theory_says(record):
    verdicts = {
        claim.id: judge(claim, "quick", record, fresh=True).label for claim in load_claims("local_sgd")
    }
    assert (
        verdicts["local_sgd/L3"] == "fails (expected)"
        and verdicts["local_sgd/L10"] == "not tested at this scale"
    )
    assert all(verdicts[f"local_sgd/L{i}"] == "holds" for i in (1, 2, 4, 5, 6, 7, 8, 9))


def test_tables_hold_the_papers_settings(record):
    text = tables.settings(record)
    assert "| workers K | 32 | 256 | 8 |" in text and "| η H | 192 | 4.16 | 19.2 |" in text
    assert "| CIFAR-10 post-local | 3,000 | 600 | 5 | 5 | 0.167 | 0.167 |" in tables.communication(record)
    assert "| ImageNet post-local | 7,800 | 26 | 300 | 300 | 3.846 | 3.846 |" in tables.communication(record)


def test_paragraphs_of_the_notebook_find_their_numbers(record):
    """Every name in braces that the notebook's prose uses is in a quick record or in the tables' numbers."""
    notebook = nbformat.read(Path(__file__).parents[2] / "book" / "local_sgd.ipynb", as_version=4)
    told = [c.source for c in notebook.cells if c.cell_type == "code" and "page.tell(record" in c.source]
    assert len(told) > 5
    more = (
        tables.longest(record)
        | tables.controls(record)
        | {"where": "x", "source": "x", "torch": "x", "first": 100}
    )
    for source in told:
        text = re.search(r'"""(.*?)"""', source, re.DOTALL)[1].encode().decode("unicode_escape")
        filled = page.filled(record, text, **more)
        assert not re.search(r"\{[a-z]\w*[:}]", filled.replace("{cite}", ""))
