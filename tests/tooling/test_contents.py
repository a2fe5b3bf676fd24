from pathlib import Path

import pytest

from tests.tooling.mini_book import notebook, text, write_book
from tooling.contents import notebooks, pages

PAGE = notebook(text("title", "# Page"))


def test_pages_come_in_reading_order_and_the_scoreboard_last(tmp_path: Path) -> None:
    book = write_book(tmp_path, scoreboard=PAGE, beta=PAGE, alpha=PAGE)
    assert [page.name for page in pages(book)] == [
        "index.md",
        "scoreboard.ipynb",
        "beta.ipynb",
        "alpha.ipynb",
    ]
    assert [page.stem for page in notebooks(book)] == ["beta", "alpha", "scoreboard"]


def test_parts_and_sections_are_followed(tmp_path: Path) -> None:
    book = write_book(tmp_path, alpha=PAGE, beta=PAGE)
    (book / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nparts:\n  - caption: One\n    chapters:\n      - file: alpha\n        sections:\n          - file: beta\n"
    )
    assert [page.stem for page in pages(book)] == ["index", "alpha", "beta"]


def test_a_page_without_file_is_named(tmp_path: Path) -> None:
    book = write_book(tmp_path, alpha=PAGE)
    (book / "alpha.ipynb").unlink()
    with pytest.raises(ValueError, match=r"_toc.yml names 'alpha', and neither of alpha.ipynb and alpha.md"):
        pages(book)


def test_a_page_named_twice_is_refused(tmp_path: Path) -> None:
    book = write_book(tmp_path, alpha=PAGE)
    with (book / "_toc.yml").open("a") as toc:
        toc.write("  - file: alpha\n")
    with pytest.raises(ValueError, match="names alpha more than once"):
        pages(book)
