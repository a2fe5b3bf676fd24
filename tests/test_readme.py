"""The README is in step with the project: its scoreboard, its links, its commands."""

import re
from pathlib import Path

import pytest

from tooling.readme import END, START, with_summary

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_scoreboard_is_todays() -> None:
    assert with_summary(README) == README, "make refresh writes the table anew"


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        with_summary(README.replace(END, ""))
    assert START in README


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_relative_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"{page} links to {target}"


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"`([^`]+)`", README))):
        assert re.search(rf"^{target}:", makefile, re.M), f"the README names make {target}"
