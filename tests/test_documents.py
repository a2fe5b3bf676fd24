"""What CONTRIBUTING, the Makefile's help and the book's own pages say is there, is there (README: test_readme.py)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "book").glob("*.md"))
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for address in LINK.findall(text) + PICTURE.findall(text):
        if not re.match(r"[a-z]+:|#", address):
            assert (path.parent / address.partition("#")[0]).exists(), f"{path.name} links to {address}"


def test_targets_that_contributing_names_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make (\w+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named and named <= targets, sorted(named - targets)


def test_the_help_of_the_makefile_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()) - {"help", "python"}
    assert phony == set(
        re.findall(r"make (\w+)", "\n".join(re.findall(r"@echo '(.*)'", text.partition("python:\n")[0])))
    )


def test_folders_that_contributing_names_exist() -> None:
    for name in (
        "papercore",
        "papercore/lab",
        "papercore/experiments",
        "papercore/claims",
        "book",
        "book/records",
        "tooling",
        "tests",
    ):
        assert (ROOT / name).is_dir(), name
