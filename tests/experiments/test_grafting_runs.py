"""The grafting chapter from end to end on tiny settings: record, claims, figures, tables, controls, prose."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib").use("agg")

from papercore.experiments import grafting  # noqa: E402
from papercore.experiments.grafting import figures, play, quick, tables  # noqa: E402
from papercore.experiments.grafting.config import Config  # noqa: E402
from papercore.lab import page  # noqa: E402
from papercore.lab.claims import judge, load_claims  # noqa: E402
from papercore.lab.explore import explore  # noqa: E402
from papercore.lab.picture import png_bytes  # noqa: E402
from papercore.lab.record import Record  # noqa: E402
from papercore.lab.stages import Stages  # noqa: E402

TINY = {
    "seeds": 2, "per_class": 8, "tests": 60, "size": 16, "sgd_steps": 30, "multi_steps": 30, "adam_lr": 4e-3, "ks": (10, 400, 5000), "mask_steps": 3, "paper_steps": 3,
    "paper_ks": (400,), "deranged_ks": (100, 3000), "over_train": 12, "over_steps": 20, "over_k": 300, "stage_steps": 4, "paper_lr": 1e9,
    "stage_lr": 1e9,
}  # fmt: skip
DRAWN = ("away", "calibration", "curves", "deranged", "law", "overlaps", "stages", "unions", "where")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERCORE_RUNS", str(tmp_path_factory.mktemp("runs")))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        made = grafting.run(Config.quick(device="cpu", **TINY))
        assert torch.get_num_threads() == 1
        torch.set_num_threads(threads)
        # The parts are on disk: a second run computes nothing and finds the same.
        patch.setattr(quick, "_part", lambda *_: pytest.fail("a finished part was computed again"))
        assert grafting.run(Config.quick(device="cpu", **TINY)).metrics == made.metrics
    return made


@pytest.fixture(scope="module")
def drawn(record):
    return {"idea": figures.idea(), **{name: getattr(figures, name)(record) for name in DRAWN}}


def test_the_record_holds_what_every_claim_reads(record, tmp_path):
    rows = {row.id: row for row in (judge(claim, "quick", record) for claim in load_claims("grafting"))}
    assert not [row.id for row in rows.values() if row.verdict in ("not run", "stale")]
    assert {rows[f"grafting/{c}"].verdict for c in ("G7", "G11")} == {"not tested at this scale"}
    assert rows["grafting/G2"].verdict == "holds"
    assert all("?" not in row.shown for row in rows.values())
    again = Record.load(record.save(tmp_path / "quick.json"))
    assert again.metrics.keys() == record.metrics.keys() and again.compare(record) == []


def test_parts_are_named_once_and_seeds_do_not_meet():
    config = Config.quick()
    items = quick.parts(config, Stages(Path("nowhere")))
    names = [quick.name_of(item) for item in items]
    assert len(set(names)) == len(names) == config.seeds * 7 + 1
    assert "curve style 2" in names and "tasks 0" in names


def test_other_scales_say_that_they_are_not_there():
    for scale in ("standard", "paper"):
        with pytest.raises(NotImplementedError, match=f"no {scale} scale yet: run it with --scale quick"):
            grafting.run(Config.at(scale))
    assert set(grafting.NEEDS) == {"quick", "standard", "paper"}


def test_every_figure_draws_and_has_words(drawn):
    for name, figure in drawn.items():
        assert figure.name == f"fig-grafting-{name}"
        assert len(figure.alt) > 60 and len(figure.caption) > 60
        png = png_bytes(figure.fig, dpi=figure.dpi, colours=figure.colours)
        assert png.startswith(b"\x89PNG") and len(png) < 45_000, name


def test_figures_of_the_claims_exist(drawn):
    wanted = {claim.figure for claim in load_claims("grafting") if claim.figure}
    assert wanted <= {figure.name for figure in drawn.values()}


@pytest.mark.parametrize("name", DRAWN)
def test_words_follow_the_record(record, drawn, name):
    """With other numbers the alternative text is another one: nothing in it was typed."""
    other = copy.deepcopy(record)
    other.arrays = {k: v * 0.5 if v.dtype.kind == "f" else v for k, v in other.arrays.items()}
    assert getattr(figures, name)(other).alt != drawn[name].alt


def test_a_record_of_another_scale_is_named_in_a_sentence(record):
    other = copy.deepcopy(record)
    other.scale, other.tables, other.arrays, other.metrics = "standard", {}, {}, {}
    makers = [getattr(figures, name) for name in DRAWN]
    makers += [tables.unions, tables.trust, tables.beside, tables.ratios, tables.trusted, tables.staged]
    for make in [*makers, play.union, play.sparsity, play.sizes]:
        with pytest.raises(page.NotMeasured, match="a record at standard scale does not hold"):
            make(other)


def test_tables_hold_reported_beside_measured(record):
    text = tables.beside(record)
    assert "0.01 % of the parameters" in text and "40 to 90 %" in text and "recalled, unconfirmed" in text
    assert "| none |" in tables.unions(record) and "| WiSE-FT |" in tables.trust(record)
    assert tables.trusted(record)["p_away_graft_minus_tuned"] == pytest.approx(
        100 * record.metrics["away_graft_minus_tuned"]
    )


def test_grafting_all_and_nothing_are_the_ends(record):
    shown = play.union(record)
    nothing = shown("off", "off", "off", 50)
    np.testing.assert_allclose(nothing.series["grafted"], nothing.series["pre-trained"], atol=0.3)
    assert nothing.text.startswith("0 entries")
    one, less = shown("on", "off", "off", 100), shown("on", "off", "off", 10)
    entries = [int(plot.text.split(" ")[0].replace(",", "")) for plot in (one, less)]
    assert (
        entries[0] == len(record.arrays["graft_sentiment_index"]) and 0 < entries[1] <= entries[0] // 10 + 1
    )


def test_controls_fit_in_a_page(record, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_FIGURES", str(tmp_path))
    monkeypatch.setattr(play, "DOCUMENTS", 20)
    explore(play.union(record), name="u", alt="x", sentiment=["on", "off"], style=["off", "on"], topic=["off", "on"], share=list(play.SHARES))  # fmt: skip
    explore(play.sparsity(record), name="s", alt="x", task=["sentiment", "style"], entries=play.sizes(record))
    assert all(0 < (tmp_path / f"{name}.html").stat().st_size < 60_000 for name in "us")


def test_paragraphs_of_the_notebook_find_their_numbers(record):
    """Every name in braces that the notebook's prose uses is in a quick record or in the tables' numbers."""
    import nbformat

    notebook = nbformat.read(Path(__file__).parents[2] / "book" / "grafting.ipynb", as_version=4)
    told = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "page.tell(record" in cell.source]  # fmt: skip
    assert len(told) >= 5
    more = tables.ratios(record) | tables.trusted(record) | tables.staged(record)
    for source in told:
        text = re.search(r'"""(.*?)"""', source, re.DOTALL)[1]
        assert "{" not in page.filled(record, text, **more)
