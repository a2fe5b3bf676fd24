"""Small sentence-classification sets in English: TREC, MR, Subj and CR, cleaned and split the same way everywhere.

All four are NLTK corpora (found by `papercore.lab.data.corpus`, read as latin-1); NLTK itself is not needed.

Glossary
    trec    questions by what they ask for: 6 coarse classes; official split of 5,452 / 500      corpus qc
    mr      sentences of film reviews: negative, positive                                        sentence_polarity
    subj    film sentences: objective plot (0), subjective opinion (1)                           subjectivity
    cr      sentences of product reviews: complaint, praise                                      product_reviews_1, _2
    k       examples a class in a few-shot sample; as many again are held out to choose checkpoints (the paper's k)

TREC's official files are kept as they are by `read`; `TREC.without_leaks()` drops training questions that occur twice or
also in the test set. MR, Subj and CR have no official test set: exact duplicates go first, then `test_size` sentences are
drawn by seed.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papercore.lab.data import corpus_files, corpus_text

__all__ = ["CORPORA", "Corpus", "few_shot", "read", "sample"]

Example = tuple[str, int]

TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")

# A short text for each class, for classifiers that match texts with descriptions.
DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "trec": (
        "a question about an abbreviation",
        "a question asking for a description or definition",
        "a question about a thing or entity",
        "a question about a person",
        "a question about a location",
        "a question about a number, date or quantity",
    ),
    "mr": ("a terrible, bad movie.", "a great, wonderful movie."),
    "subj": ("a plot summary describing what happens in the story.", "a critic's opinion about the movie."),
    "cr": ("a complaint about a bad product.", "praise for a great product."),
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts and int64 labels of a training and a test part; `fine` holds TREC's 50 finer labels as text."""

    name: str
    classes: tuple[str, ...]
    descriptions: tuple[str, ...]
    train_texts: tuple[str, ...]
    train_labels: NDArray[np.int64]
    test_texts: tuple[str, ...]
    test_labels: NDArray[np.int64]
    train_fine: tuple[str, ...] = ()
    test_fine: tuple[str, ...] = ()

    def without_leaks(self) -> Corpus:
        """The same with training texts that occur twice, or also in the test part, dropped (first one kept)."""
        seen = set(self.test_texts)
        keep = [i for i, text in enumerate(self.train_texts) if not (text in seen or seen.add(text))]  # type: ignore[func-returns-value]
        return dataclasses.replace(
            self,
            train_texts=tuple(self.train_texts[i] for i in keep),
            train_labels=self.train_labels[keep],
            train_fine=tuple(self.train_fine[i] for i in keep) if self.train_fine else (),
        )


def read(
    name: str, *, seed: int = 0, test_size: int | None = None, path: str | os.PathLike[str] | None = None
) -> Corpus:
    """One of the four sets. `seed` and `test_size` (1,000; CR 800) draw the test part of MR, Subj and CR.

    Raises `papercore.lab.data.Missing` when the corpus is nowhere, `ValueError` for an unknown name, a test size that
    leaves nothing to train on, or TREC with a test size (its split is official).
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}: expected one of {', '.join(CORPORA)}")
    if name == "trec":
        if test_size is not None:
            raise ValueError("TREC has an official test set of 500 questions: leave test_size out")
        return _trec(path)
    examples = _without_duplicates(CORPORA[name](path))
    size = (800 if name == "cr" else 1000) if test_size is None else test_size
    if not 0 < size < len(examples):
        raise ValueError(f"test_size must lie between 1 and {len(examples) - 1} for {name!r}, got {size}")
    order = np.random.default_rng([seed, len(examples)]).permutation(len(examples))
    test, train = order[:size], order[size:]
    classes = {"mr": ("negative", "positive"), "subj": ("plot", "opinion"), "cr": ("complaint", "praise")}[
        name
    ]
    return Corpus(name, classes, DESCRIPTIONS[name], *_columns(examples, train), *_columns(examples, test))


def few_shot(
    labels: Sequence[int] | NDArray[np.int64], k: int, *, seed: int, held_out: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of `k` training examples a class, and of `held_out` others a class (as many as k unless said).

    Raises `ValueError` naming the class that has too few examples.

    >>> few_shot([0, 0, 1, 1, 1], 1, seed=0)[0].shape
    (2,)
    """
    labels, held_out = np.asarray(labels), k if held_out is None else held_out
    if k < 1 or held_out < 0:
        raise ValueError(f"k must be at least 1 and held_out at least 0, got k={k}, held_out={held_out}")
    generator = np.random.default_rng([seed, k])
    train, held = [], []
    for label in np.unique(labels):
        where = generator.permutation(np.flatnonzero(labels == label))
        if len(where) < k + held_out:
            raise ValueError(
                f"class {label} has {len(where)} examples; k={k} for training and {held_out} held out need {k + held_out}"
            )
        train.append(where[:k])
        held.append(where[k : k + held_out])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held))


def sample(
    total: int, n: int, *, seed: int, held_out: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of `n` examples out of `total`, and of `held_out` others, without regard to class."""
    if n < 1 or held_out < 0 or n + held_out > total:
        raise ValueError(f"{n} examples and {held_out} held out do not fit into {total}")
    order = np.random.default_rng([seed, n, total]).permutation(total)
    return np.sort(order[:n]), np.sort(order[n : n + held_out])


def _trec(path: str | os.PathLike[str] | None) -> Corpus:
    parts: list[Any] = []
    fines = []
    for file in ("train.txt", "test.txt"):
        fine, texts = [], []
        for number, line in enumerate(_lines("qc", file, path), 1):
            label, space, text = line.partition(" ")  # "DESC:manner How did ..."
            if not space or label.partition(":")[0] not in TREC_CLASSES:
                raise ValueError(
                    f"qc/{file}, line {number}: expected 'CLASS:fine question', got {line[:60]!r}"
                )
            fine.append(label)
            texts.append(text.strip())
        parts += [
            tuple(texts),
            np.array([TREC_CLASSES.index(f.partition(":")[0]) for f in fine], dtype=np.int64),
        ]
        fines.append(tuple(fine))
    return Corpus("trec", TREC_CLASSES, DESCRIPTIONS["trec"], *parts, *fines)


def _mr(path: str | os.PathLike[str] | None) -> list[Example]:
    files = ("rt-polarity.neg", "rt-polarity.pos")
    return [
        (text, label) for label, file in enumerate(files) for text in _lines("sentence_polarity", file, path)
    ]


def _subj(path: str | os.PathLike[str] | None) -> list[Example]:
    files = ("plot.tok.gt9.5000", "quote.tok.gt9.5000")
    return [(text, label) for label, file in enumerate(files) for text in _lines("subjectivity", file, path)]


def _cr(path: str | os.PathLike[str] | None) -> list[Example]:
    """Lines "feature[+2], other[-1]##sentence": kept when all marks have one sign; unmarked and mixed ones are dropped."""
    examples = []
    for name in ("product_reviews_1", "product_reviews_2"):
        for file in corpus_files(name, path=path):
            if not file.endswith(".txt") or file.upper().startswith("README"):
                continue
            for line in _lines(name, file, path):
                marks, separator, text = line.partition("##")
                signs = set(re.findall(r"\[([+-])\d\]", marks))
                if separator and len(signs) == 1 and text.strip():
                    examples.append((text.strip(), int(signs == {"+"})))
    return examples


CORPORA: dict[str, Callable[..., Any]] = {"trec": _trec, "mr": _mr, "subj": _subj, "cr": _cr}


def _lines(name: str, file: str, path: str | os.PathLike[str] | None) -> list[str]:
    # split at line feeds alone: latin-1 text holds bytes that splitlines() would take for line ends (0x85)
    return [line.strip() for line in corpus_text(name, file, path=path).split("\n") if line.strip()]


def _without_duplicates(examples: list[Example]) -> list[Example]:
    """Exact duplicates of a text are removed, the first kept."""
    first: dict[str, int] = {}
    for text, label in examples:
        first.setdefault(text, label)
    return list(first.items())


def _columns(examples: list[Example], which: NDArray[np.int64]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    return tuple(examples[i][0] for i in which), np.array([examples[i][1] for i in which], dtype=np.int64)
