"""The book's own files: contents, committed notebooks, what they cite and name."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml

from tooling.clean import problems
from tooling.contents import SCOREBOARD, notebooks, pages

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
NOTEBOOKS = notebooks(BOOK)
PARAMETERS = {
    "scale": ("str", '"quick"'),
    "device": ("str", '"auto"'),
    "seed": ("int", "0"),
    "overrides": ("dict", "{}"),
}


def test_every_page_is_in_the_contents() -> None:
    there = {path for path in BOOK.iterdir() if path.suffix in {".md", ".ipynb"} and path.name != "README.md"}
    assert there == set(pages(BOOK))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_are_clean(path: Path) -> None:
    assert problems(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_hold_outputs(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in cells)
    checked = [cell for cell in cells if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert checked and all(cell.outputs for cell in checked), "no cell whose stored output a test compares"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != SCOREBOARD], ids=lambda path: path.stem)
def test_parameters_cell_is_annotated_literals_with_help(path: Path) -> None:
    cells = [
        cell
        for cell in nbformat.read(path, as_version=4).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    assert len(cells) == 1 and cells[0].metadata["tags"] == ["parameters"]
    found = {}
    for line in cells[0].source.splitlines():
        match = re.fullmatch(r"(\w+): (\w+) = (\S+)  # \S.*", line)
        assert match, f"{line!r} is not `name: type = literal  # help`"
        found[match[1]] = (match[2], match[3])
    assert found == PARAMETERS


def test_the_scoreboard_has_no_parameters() -> None:
    for path in NOTEBOOKS:
        if path.stem == SCOREBOARD:
            assert not any(
                "parameters" in cell.metadata.get("tags", [])
                for cell in nbformat.read(path, as_version=4).cells
            )


def test_what_is_cited_is_in_the_bibliography_and_the_other_way_round() -> None:
    keys = re.findall(r"^@\w+\{([^,]+),", (BOOK / "references.bib").read_text(), re.MULTILINE)
    assert len(keys) == len(set(keys))
    text = "\n".join(_prose(path) for path in pages(BOOK))
    cited = {
        key.strip() for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for key in group.split(",")
    }
    assert cited <= set(keys), f"cited and not in references.bib: {sorted(cited - set(keys))}"
    assert set(keys) <= cited, f"in references.bib and never cited: {sorted(set(keys) - cited)}"


def test_figures_have_alternative_text_and_a_caption() -> None:
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
                told = cell.metadata.get("mystnb", {})
                assert told.get("image", {}).get("alt") and told.get("figure", {}).get("caption"), (
                    f"{path.name}, cell {cell.id}"
                )


def test_settings_of_the_builder_keep_their_promises() -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["execute"]["execute_notebooks"] == "off"
    assert config["only_build_toc_files"] is True
    assert not config["sphinx"]["config"]["mathjax_path"].startswith("http")
    assert config["sphinx"]["config"]["nb_ipywidgets_js"] == {}
    assert config["sphinx"]["config"]["suppress_warnings"] == []


def _prose(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text()
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
