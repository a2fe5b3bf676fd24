"""Made corpora in the formats of the real ones: NLTK's zips and WikiText-2's text, a few hundred lines each."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

VOCABULARY = (
    "the a film story plot was is good bad great dull of and in on it person place number thing reason year war city game "
    "said people country who what where many why short view opinion review sentiment question answer"
)
WORDS = VOCABULARY.split()
TREC = ("ABBR:abb", "DESC:def", "ENTY:animal", "HUM:ind", "LOC:city", "NUM:count")


def sentence(rng: np.random.Generator, n: int = 8) -> str:
    """n words with a rare number among them, so that no two are equal."""
    return " ".join([*rng.choice(WORDS, n), str(rng.integers(10**6))])


def write_zip(root: Path, name: str, files: dict[str, str]) -> None:
    """One corpus as NLTK ships it: a zip with one folder of its own name."""
    place = root / "corpora"
    place.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(place / f"{name}.zip", "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{name}/{file}", text.encode("latin-1"))


def make_text(root: Path) -> Path:
    """All that the `standard` scale reads, under `root` (a $PAPERCORE_DATA)."""
    rng = np.random.default_rng(0)
    nltk = root / "nltk_data"

    def lines(n: int) -> str:
        return "\n".join(sentence(rng) for _ in range(n))

    tagged = "\n\n".join(" ".join(f"{w}/nn" for w in sentence(rng).split()) + " ./." for _ in range(40))
    write_zip(
        nltk, "brown", {"README": "not text", "ca01": tagged, "cr09": "``/`` He/pps and/or/cc she/pps ''/''"}
    )
    write_zip(nltk, "inaugural", {"README": "not text", "1789-A.txt": lines(40)})
    write_zip(nltk, "state_union", {"1945-T.txt": lines(40)})
    write_zip(nltk, "webtext", {"wine.txt": lines(40) + " caf\xe9"})
    write_zip(
        nltk, "movie_reviews", {"README": "x", "neg/cv000_1.txt": lines(30), "pos/cv000_2.txt": lines(30)}
    )
    speech = "".join(
        f"<SPEECH>\n<SPEAKER>HAMLET</SPEAKER>\n<LINE>{sentence(rng)}</LINE>\n</SPEECH>\n" for _ in range(20)
    )
    write_zip(nltk, "shakespeare", {"hamlet.xml": f'<?xml version="1.0"?>\n<PLAY>\n{speech}</PLAY>', "play.dtd": "x"})  # fmt: skip
    write_zip(nltk, "sentence_polarity", {"README": "x", "rt-polarity.neg": lines(700), "rt-polarity.pos": lines(700)})  # fmt: skip
    write_zip(nltk, "qc", {
        "README": "x",
        **{f"{part}.txt": "\n".join(f"{TREC[i % 6]} {sentence(rng)}" for i in range(120)) for part in ("train", "test")},
    })  # fmt: skip
    place = root / "wikitext-2"
    place.mkdir(parents=True)
    for file in ("valid.txt", "test.txt"):
        text = "".join(f" \n = Title {i} = \n \n {sentence(rng, 30)} \n" for i in range(60))
        (place / file).write_text(text, encoding="utf-8")
    return root


def use_text(monkeypatch: pytest.MonkeyPatch, root: Path, runs: Path) -> None:
    """Point the environment at `root`."""
    monkeypatch.setenv("PAPERCORE_DATA", str(root))
    monkeypatch.setenv("PAPERCORE_RUNS", str(runs))
    monkeypatch.delenv("NLTK_DATA", raising=False)
