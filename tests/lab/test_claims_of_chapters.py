"""The claims that the book ships are whole: every claim of a paper once, each with its rule, its figure or its reason."""

from __future__ import annotations

import re

import pytest

from papercore.experiments import CHAPTERS
from papercore.lab.claims import left_out, load_claims, reported, slugs
from papercore.lab.rules import identifier


def test_there_are_claims_for_every_chapter_and_no_other():
    assert set(slugs()) == set(CHAPTERS)


@pytest.mark.parametrize("slug", sorted(CHAPTERS))
def test_the_claims_of_a_chapter_are_whole(slug):
    claims = load_claims(slug)
    ids = [claim.id for claim in claims] + [entry["id"] for entry in left_out(slug)]
    numbers = sorted(int(re.fullmatch(rf"{slug}/[A-Z](\d+)", name)[1]) for name in ids)
    assert numbers == list(range(1, len(ids) + 1)), "claims are numbered without gap or double"
    for claim in claims:
        assert claim.text.endswith(".") and claim.where and claim.reported, claim.id
        for scale in claim.scales:
            names = claim.parsed_rule(scale).names
            assert names, claim.id
            assert identifier(claim.metric.get(scale, "")) in names or claim.shows.get(scale), (
                f"{claim.id} neither judges nor shows it"
            )
        assert claim.figure is None or re.fullmatch(rf"fig-{slug}-[a-z0-9-]+", claim.figure), claim.id
        if claim.scales:
            assert claim.figure, f"{claim.id} names no figure"
        else:
            assert claim.why, f"{claim.id} is never tested and does not say why"
    assert reported(slug)


def test_the_first_chapter_has_the_eighteen_claims_of_its_paper():
    ids = {claim.id for claim in load_claims("mezo")} | {entry["id"] for entry in left_out("mezo")}
    assert ids == {f"mezo/C{i}" for i in range(1, 19)}


@pytest.mark.parametrize("slug", sorted(CHAPTERS))
def test_no_reported_number_stands_there_twice(slug):
    cells = [(row["table"], row["row"], row["column"]) for row in reported(slug)]
    assert len(cells) == len(set(cells))
