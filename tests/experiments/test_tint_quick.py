"""The TinT chapter at quick scale on tiny settings: the record that its claims read, its figures, tables, controls and paragraphs."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib").use("agg")
pytest.importorskip("transformers")

from papercore.experiments import tint  # noqa: E402
from papercore.experiments.tint import figures, play, tables  # noqa: E402
from papercore.experiments.tint.config import Config  # noqa: E402
from papercore.lab import page  # noqa: E402
from papercore.lab.claims import judge, load_claims  # noqa: E402
from papercore.lab.explore import explore  # noqa: E402
from papercore.lab.picture import png_bytes  # noqa: E402
from papercore.lab.record import Record  # noqa: E402

TINY = {
    "seeds": 2, "words": 6, "names": 2, "topics": 2, "new_topics": 2, "length": 16, "train_documents": 24, "choose_documents": 8, "documents": 6,
    "width": 12, "heads": 2, "stack": 4, "steps": 3, "batch": 4, "warmup": 1, "rates": (1e-3, 1e-2), "most_steps": 2, "resamples": 100,
    "timing_rounds": 1,
}  # fmt: skip
DRAWN = figures.__all__
WITHOUT_RECORD = ("idea", "layout")
VALUES = (tables.kept, tables.errors, tables.timed, tables.rounding)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERCORE_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


@pytest.fixture(scope="module")
def record(runs):
    return tint.run(Config.quick(device="cpu", **TINY))


@pytest.fixture(scope="module")
def drawn(record):
    return {name: getattr(figures, name)(record) for name in DRAWN}


def test_the_record_holds_what_the_claims_read(record, tmp_path):
    rows = {row.id: row for row in (judge(claim, "quick", record) for claim in load_claims("tint"))}
    assert not [row.id for row in rows.values() if row.verdict in ("not run", "stale")]
    assert all("does not hold" not in row.why and "?" not in row.shown for row in rows.values())
    # What no training decides holds at any size; what needs tasks is not asked.
    assert {rows[f"tint/{c}"].verdict for c in ("C1", "C2", "C3", "C4", "C5", "C10")} == {"holds"}
    assert rows["tint/C8"].verdict == "not tested at this scale"
    again = Record.load(record.save(tmp_path / "quick.json"))
    assert again.metrics.keys() == record.metrics.keys()


def test_a_second_run_uses_the_finished_parts(record):
    threads = torch.get_num_threads()
    again = tint.run(Config.quick(device="cpu", **TINY))
    assert again.metrics == record.metrics and torch.get_num_threads() == threads


def test_sizes_are_the_closed_forms(record):
    m = record.metrics
    assert m["params_opt_125m"] == 12 * (21 * 5_013_504 + (3072**2 // 12 + 12 * 3072) + 6 * 3072 * 12)
    assert m["params_opt_125m_not_shared"] == m["params_opt_125m"] + m["params_opt_125m_forward"]
    # Whole projections: 4 D_sim^2 in place of 4 Q_split in each of 21 modules, and one for the activation.
    q = 4 * 3072**2 + 3 * 2240 * 3072 // 12
    assert m["params_opt_125m_unsplit"] == 12 * (21 * q + 3072**2 + 6 * 3072 * 12)


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_draws_and_has_words(drawn, name):
    figure = drawn[name]
    assert figure.name == f"fig-tint-{name}"
    assert len(figure.alt) > 60 and len(figure.caption) > 60 and "nan" not in figure.alt
    assert len(png_bytes(figure.fig, dpi=figure.dpi, colours=figure.colours)) < 45_000


def test_figures_of_the_claims_exist(drawn):
    assert {claim.figure for claim in load_claims("tint") if claim.figure} <= {f.name for f in drawn.values()}


@pytest.mark.parametrize("name", [name for name in DRAWN if name not in WITHOUT_RECORD])
def test_words_follow_the_record(record, drawn, name):
    """With other numbers the alternative text is another one: nothing in it was typed."""
    other = copy.deepcopy(record)
    other.arrays = {
        k: v * 0.5 if v.dtype.kind == "f" and k not in ("rates", "fractions") else v
        for k, v in other.arrays.items()
    }
    other.metrics = {k: v * 0.5 for k, v in other.metrics.items()}
    for table in other.tables.values():
        table["rows"] = [
            [c * 0.5 if isinstance(c, float) and c not in (0.3, 0.5, 0.7, 0.9) else c for c in row]
            for row in table["rows"]
        ]
    for row in other.tables["sizes"]["rows"]:
        row[8] *= 2
    assert getattr(figures, name)(other).alt != drawn[name].alt


def test_reported_values_are_hollow_and_the_mismatch_is_named(drawn):
    ax = drawn["size"].fig.axes[0]
    hollow = [ln for ln in ax.get_lines() if ln.get_markerfacecolor() == "white"]
    assert [round(float(y) / 1e9, 1) for y in hollow[0].get_ydata()] == [1.2, 3.4, 10.8, 21.8]
    assert any("mismatch -7%" in text.get_text() for text in ax.texts)


def test_a_record_of_another_scale_is_named_in_a_sentence(record):
    other = copy.deepcopy(record)
    other.scale, other.tables, other.arrays, other.metrics = "standard", {}, {}, {}
    made = [getattr(figures, name) for name in DRAWN if name not in WITHOUT_RECORD]
    made += [
        tables.auxiliaries,
        tables.attribution,
        tables.perplexity,
        tables.sizes,
        tables.flop,
        tables.beside,
        *VALUES,
    ]
    made += [play.perplexity, play.cosines, play.settings]
    for make in made:
        with pytest.raises(page.NotMeasured, match="a record at standard scale does not hold"):
            make(other)


def test_tables_say_what_is_recalled(record):
    text = tables.beside(record)
    assert text.count("(recalled, unconfirmed)") == 2 and "less than 2 billion" in text and "25.9" not in text
    assert "-6.6% (mismatch)" in tables.sizes(record)
    assert "| no update | TinT | dynamic |" in tables.perplexity(record)
    assert tables.attribution(record).count("\n") == 10


def test_controls_fit_in_a_page(record, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_FIGURES", str(tmp_path))
    explore(play.perplexity(record), name="p", alt="x", **play.settings(record))
    explore(
        play.cosines(record), name="c", alt="x", weights=["trained", "random"], epsilon=list(play.EPSILONS)
    )
    explore(
        play.trace(),
        name="t",
        alt="x",
        role=["forward", "backward"],
        head=list(range(8)),
        step=list(play.STEPS),
    )
    assert all(0 < (tmp_path / f"{name}.html").stat().st_size < 60_000 for name in "pct")


def test_the_trace_ends_at_the_product():
    shown = play.trace()("backward", 3, play.STEPS[-1])
    _, found, true = play.traced("backward")
    assert shown.series["numbers"] == pytest.approx(true[0].numpy(), abs=5e-3)
    assert found.scores.shape == (1, 8, 3, 2)


def test_paragraphs_of_the_notebook_find_their_numbers(record):
    """Every name in braces that the notebook's prose uses is in a quick record or in the tables' numbers."""
    import nbformat

    notebook = nbformat.read(Path(__file__).parents[2] / "book" / "tint.ipynb", as_version=4)
    told = [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and "page.tell(record" in cell.source
    ]
    assert len(told) >= 5
    more = {name: value for make in VALUES for name, value in make(record).items()}
    for source in told:
        text = re.search(r'"""(.*?)"""', source, re.DOTALL)[1]
        assert "{" not in page.filled(record, text, **more)
