"""Every chapter keeps the order, the parameters and the manners that readers and tools rely on."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from papercore import experiments
from tooling.clean import RANDOM_ID, READABLE_ID
from tooling.contents import SCOREBOARD, notebooks

BOOK = Path(__file__).resolve().parents[1] / "book"
NOTEBOOKS = notebooks(BOOK)
CHAPTERS = [path for path in NOTEBOOKS if path.stem != SCOREBOARD]
SECTIONS = [
    "The paper",
    "The kernel, piece by piece",
    "The experiment",
    "Reported beside measured",
    "Play",
    "Run it bigger",
    "What this does not show",
    "Exercises",
]
WIDEST = 76
LONGEST_DEFINITION = 30  # lines: a screen

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells(path, kind=None):
    return [cell for cell in nbformat.read(path, as_version=4).cells if kind in (None, cell.cell_type)]


@every_chapter
def test_papermill_reads_the_parameters_with_types_and_help(path):
    papermill = pytest.importorskip("papermill")
    found = papermill.inspect_notebook(str(path))
    told = {name: (p["inferred_type_name"], p["default"], p["help"]) for name, p in found.items()}
    assert told == {
        "scale": ("str", '"quick"', "quick | standard | paper"),
        "device": ("str", '"auto"', "auto | cpu | cuda"),
        "seed": ("int", "0", "added to every seed"),
        "overrides": ("dict", "{}", "Config fields by name"),
    }


@every_chapter
def test_parameters_come_first_and_the_next_cell_refuses_wrong_ones(path):
    first, second = cells(path, "code")[:2]
    assert first.metadata["tags"] == ["parameters"]
    for given, message in (
        ({"scale": "quik"}, "quik"),
        ({"device": "tpu"}, "tpu"),
        ({"overrides": {"stepz": 5}}, "stepz"),
    ):
        names: dict = {}
        exec(first.source, names)
        names |= given
        with pytest.raises(ValueError, match=message):
            exec(second.source, names)


@every_chapter
def test_title_and_sections_stand_in_their_order(path):
    heads = [
        m[1] for cell in cells(path, "markdown") for m in re.finditer(r"^## (.+)$", cell.source, re.MULTILINE)
    ]
    assert heads == SECTIONS
    assert cells(path)[0].source.startswith(f"# {experiments.CHAPTERS[path.stem].title}\n")


@every_notebook
def test_ids_are_readable_and_different(path):
    names = [cell.id for cell in cells(path)]
    assert len(set(names)) == len(names)
    assert all(READABLE_ID.fullmatch(name) and not RANDOM_ID.fullmatch(name) for name in names)


@every_notebook
def test_code_fits_a_phone_and_a_screen(path):
    for cell in cells(path, "code"):
        for line in cell.source.splitlines():
            assert len(line) <= WIDEST, f"{cell.id}: {len(line)} characters: {line}"
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.end_lineno - node.lineno < LONGEST_DEFINITION, f"{cell.id}: {node.name}"


@every_notebook
def test_no_training_loop_stands_in_a_notebook(path):
    """Loops of a step or two on a toy are the lesson; backpropagation through epochs belongs to papercore."""
    for cell in cells(path, "code"):
        loops = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, (ast.For, ast.While))]
        for loop in loops:
            called = {
                node.func.attr
                for node in ast.walk(loop)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            }
            assert "backward" not in called, cell.id
            assert len(loop.body) <= 5, f"{cell.id}: a loop of {len(loop.body)} statements"


@every_notebook
def test_checked_cells_show_no_widget_and_no_picture(path):
    for cell in cells(path, "code"):
        if "nbval-check-output" in cell.metadata.get("tags", []):
            mimes = {mime for output in cell.get("outputs", []) for mime in output.get("data", {})}
            assert not mimes & {"image/png", "text/html", "application/vnd.jupyter.widget-view+json"}, cell.id
            assert "explore(" not in cell.source and "figures.show" not in cell.source


@every_chapter
def test_exercises_have_solutions_that_run_and_are_folded(path):
    found = cells(path)
    start = next(i for i, cell in enumerate(found) if cell.source.startswith("## Exercises"))
    asked = re.findall(
        r"^\*\*\d\. ",
        "\n".join(cell.source for cell in found[start:] if cell.cell_type == "markdown"),
        re.MULTILINE,
    )
    solved = [cell for cell in found[start:] if cell.cell_type == "code"]
    assert 2 <= len(asked) <= 3 and len(solved) == len(asked)
    assert all("hide-cell" in cell.metadata["tags"] for cell in solved)


@every_chapter
def test_figures_and_controls_are_there(path):
    source = "\n".join(cell.source for cell in cells(path, "code"))
    assert source.count("page.show(figures.") >= 5
    assert source.count("explore(\n") >= 1
    assert "experiments.execute(config)" in source and "page.verdicts(record)" in source
