"""The strict build of a small book: pages that need nothing from elsewhere, and warnings that stop it."""

from pathlib import Path

import nbformat
import pytest

from tests.tooling.mini_book import code, figure, notebook, text, write_book
from tooling.render import render
from tooling.scan import scan


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = notebook(
        text("title", "# Page\n\nSee {numref}`fig-one`.\n\n$$ x^2 $$ (eq-one)"),
        code("fig", "show(fig)", figure(caption="A dot, as in {eq}`eq-one`.")),
    )
    return write_book(tmp_path_factory.mktemp("small") / "book", page=page)


def test_the_pages_are_whole_and_load_nothing_from_elsewhere(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = render(None, book=book, build=book.parent / "_build")
    html = (pages / "page.html").read_text()
    assert 'alt="A dot."' in html and 'id="fig-one"' in html and "A dot, as in" in html
    assert "_static/mathjax/tex-chtml-full.js" in html
    assert (pages / "_static" / "mathjax" / "NOTICE.txt").is_file()
    assert len(list((pages / "_static" / "mathjax").rglob("*.woff"))) >= 20
    assert scan(pages) == []
    capsys.readouterr()

    assert render(None, book=book, build=book.parent / "_build") == pages
    assert "unchanged since the last strict build, and reused" in capsys.readouterr().out


def test_a_warning_stops_the_build_and_is_told(book: Path) -> None:
    page = nbformat.read(book / "page.ipynb", as_version=4)
    page.cells[0].source += "\n\nSee {numref}`fig-that-is-not-there`."
    other = write_book(book.parent / "other" / "book", page=page)
    with pytest.raises(
        RuntimeError, match=r"(?s)the strict build failed:.*page.*fig-that-is-not-there.*html\.log"
    ):
        render(None, book=other, build=other.parent / "_build")


def test_pages_need_an_execution(tmp_path: Path) -> None:
    book = write_book(tmp_path / "book", page=notebook(text("title", "# Page")))
    with pytest.raises(RuntimeError, match=r"page\.ipynb is missing: execute the notebooks first"):
        render(tmp_path / "executed", book=book, build=tmp_path / "_build")
