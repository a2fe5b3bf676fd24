"""What the documents say is there, is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "book").glob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for address in LINK.findall(text) + PICTURE.findall(text):
        if not re.match(r"[a-z]+:|#", address):
            assert (path.parent / address.partition("#")[0]).exists(), f"{path.name} links to {address}"


@pytest.mark.parametrize("path", DOCUMENTS[:2], ids=lambda path: path.name)
def test_targets_that_are_named_exist(path: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(
            r"\bmake ([a-z]+)\b", " ".join(re.findall(r"`[^`]+`|```.*?```", path.read_text(), re.DOTALL))
        )
    )
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
