import copy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_output

from tests.tooling.mini_book import code, figure, notebook, printed, text
from tooling.clean import LIMIT_BYTES, clean, main, problems, text_of

VIEW = "application/vnd.jupyter.widget-view+json"


def cleaned_cell(cell: Any) -> Any:
    return clean(notebook(cell)).cells[0]


def test_a_figure_s_words_move_into_the_cell() -> None:
    caption = new_output(
        "display_data", data={"text/markdown": "What to see."}, metadata={"papercore": {"role": "caption"}}
    )
    cell = cleaned_cell(code("fig-one", "show(fig)", figure(), caption))
    assert cell.metadata["mystnb"] == {
        "figure": {"name": "fig-one", "caption": "What to see."},
        "image": {"alt": "A dot."},
    }
    assert len(cell.outputs) == 1
    assert cell.outputs[0].metadata == {"image/png": {"alt": "A dot."}}


def test_two_figures_in_a_cell_are_refused() -> None:
    with pytest.raises(ValueError, match="cell both shows 2 figures"):
        clean(notebook(code("both", "show(a); show(b)", figure("fig-a"), figure("fig-b"))))


def test_a_cell_that_lost_its_figure_loses_its_words() -> None:
    cell = code("fig-one", "1", printed("one\n"))
    cell.metadata["mystnb"] = {"figure": {"name": "old"}, "image": {"alt": "old"}, "text_lexer": "none"}
    assert cleaned_cell(cell).metadata["mystnb"] == {"text_lexer": "none"}


def test_live_controls_go_and_what_stands_in_for_them_stays() -> None:
    told = {"papercore": {"role": "explore", "name": "play"}}
    both = new_output(
        "display_data",
        data={VIEW: {"model_id": "1"}, "text/html": "<figure>", "text/plain": "alt"},
        metadata=told,
    )
    bare = new_output("display_data", data={VIEW: {"model_id": "2"}, "text/plain": "IntSlider()"})
    cell = cleaned_cell(code("play", "explore(f)", both, bare))
    assert [dict(output.data) for output in cell.outputs] == [{"text/html": "<figure>", "text/plain": "alt"}]
    assert cell.outputs[0].metadata == {} and cell.metadata == {}


def test_what_differs_between_runs_goes() -> None:
    cell = code(
        "sum",
        "1 + 1   \n",
        new_output("execute_result", data={"text/plain": "2"}, execution_count=7),
        tags=("nbval-check-output",),
    )
    cell.execution_count = 7
    cell.metadata |= {
        "papermill": {"duration": 1.5},
        "execution": {"iopub.execute_input": "now"},
        "scrolled": True,
    }
    made = notebook(cell)
    made.metadata |= {
        "papermill": {"duration": 2},
        "widgets": {"state": {}},
        "language_info": {"version": "3.12.1"},
    }
    out = clean(made)
    assert (
        set(out.metadata) == {"kernelspec", "language_info"}
        and "version" not in out.metadata["language_info"]
    )
    assert out.cells[0].execution_count == out.cells[0].outputs[0].execution_count == 1
    assert out.cells[0].metadata == {"tags": ["nbval-check-output"]} and out.cells[0].source == "1 + 1"


def test_streams_are_joined_and_stderr_and_overdrawn_bars_go() -> None:
    bar = printed(" 10%\r 50%\r100%\ndone\n")
    warning = new_output("stream", name="stderr", text="UserWarning: somewhere on this machine\n")
    cell = cleaned_cell(code("loop", "run()", printed("a\n"), warning, printed("b\n"), bar))
    assert [(o.name, o.text) for o in cell.outputs] == [("stdout", "a\nb\n100%\ndone\n")]


def test_a_failed_cell_is_refused() -> None:
    error = new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=[])
    with pytest.raises(ValueError, match="cell broken failed: ZeroDivisionError: division by zero"):
        clean(notebook(code("broken", "1 / 0", error)))


def test_a_run_at_another_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="injected parameters"):
        clean(notebook(code("injected", "scale = 'standard'", tags=("injected-parameters",))))


def test_ids_that_a_person_gave_stay_and_random_ones_become_readable() -> None:
    made = notebook(
        text("intro", "# One"),
        text("0a1b2c3d", "## The step, in code"),
        code("deadbeef", "x = 1"),
        code("deadbee0", "x = 1"),
    )
    assert [cell.id for cell in clean(made).cells] == ["intro", "the-step-in-code", "x-1", "x-1-2"]


def test_cleaning_twice_changes_nothing() -> None:
    made = notebook(
        text("a", "# A"),
        code("fig-one", "show(fig)", figure(), printed("x\n")),
        code("0a1b2c3d", "y", printed("y")),
    )
    once = clean(made)
    assert text_of(clean(nbformat.reads(text_of(once), as_version=4))) == text_of(once)


def test_the_original_is_left_alone() -> None:
    made = notebook(code("fig-one", "show(fig)", figure()))
    before = copy.deepcopy(made)
    clean(made)
    assert made == before


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        (
            code("a", "f", printed("<object object at 0x7f3a12345678>\n")),
            "cell a prints an object's address: at 0x7f3a12345678",
        ),
        (
            code("a", "f", printed("saved to /home/someone/run.json\n")),
            "cell a prints a path of one machine: /home/someone",
        ),
        (code("a", "f", printed("x" * LIMIT_BYTES)), "300 kB, more than 300"),
        (code("Bad_Id", "f"), "cell 1 has the id 'Bad_Id': give it a readable one"),
        (code("0a1b2c3d", "f"), "cell 1 has the id '0a1b2c3d'"),
    ],
)
def test_problems_of_a_committed_notebook_are_told(tmp_path: Path, cell: Any, told: str) -> None:
    path = tmp_path / "page.ipynb"
    path.write_text(text_of(notebook(cell)))
    assert any(told in problem for problem in problems(path)), problems(path)


def test_check_says_what_is_not_clean_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.ipynb"
    nbformat.write(notebook(code("fig-one", "show(fig)", figure())), path)
    before = path.read_bytes()
    monkeypatch.setattr("sys.argv", ["clean", "--check", str(path)])
    assert main() == 1 and path.read_bytes() == before
    assert "not clean; run: python -m tooling.clean page.ipynb" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["clean", str(path)])
    assert main() == 0
    monkeypatch.setattr("sys.argv", ["clean", "--check", str(path)])
    assert main() == 0 and problems(path) == []
