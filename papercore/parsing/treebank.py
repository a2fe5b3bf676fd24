"""A grammar counted in parsed sentences.

    p(A -> B C) = count(A -> B C) / count(A)        in trees made binary (binarisation.py), for phrases and split nodes
    p(T -> w)   = count'(T, w) / count'(T)          for tags, and tags joined with the phrases above them, such as NP+NNP
    root(A)     = share of trees with A at the top

Unknown words. A word seen fewer than min_count times counts as a word class by its spelling: UNK-num, UNK-cap, UNK-ing, ... At
parsing time `replace_unknown` turns words that are not in the vocabulary into these classes.

Smoothing of tags. With kappa = smoothing, what a word has been seen as is mixed with what rare words of its class have been
seen as, and that with what all rare words have been seen as:

    q(T)         = count(T, rare) / count(rare)
    q(T | class) = (count(T, class) + kappa q(T)) / (count(class) + kappa)
    count'(T, w) = count(w) (count(T, w) + kappa q(T | class of w)) / (count(w) + kappa)

so that a word known as a noun may still be a verb. Rules are not smoothed: a sentence may be impossible under the grammar.

No treebank comes with this package. The sample of the Penn Treebank that NLTK offers ((C) 1995 Linguistic Data Consortium, about a
tenth of it) may be used for non-commercial purposes only, and so may a grammar counted in it: keep both out of what you publish.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papercore.parsing.binarisation import binarise, clean
from papercore.parsing.grammar import PCFG
from papercore.parsing.trees import Tree

__all__ = ["estimate", "read_treebank", "replace_unknown", "unknown_class"]

_SUFFIXES = (
    "ing",
    "ed",
    "ly",
    "ion",
    "ity",
    "ness",
    "ment",
    "able",
    "ous",
    "ive",
    "al",
    "ic",
    "est",
    "er",
    "s",
    "y",
)
_LICENCE = (
    "No treebank comes with papercore. Parsed files (.mrg) of your own copy of the Penn Treebank will do; NLTK offers a sample "
    "of a tenth (nltk.download('treebank'), (C) 1995 LDC, for non-commercial use only), a file corpora/treebank.zip."
)
_MOST_RULES = 1 << 30  # entries of the rule tensor


def read_treebank(path: str | Path) -> list[Tree]:
    """All trees of a treebank, in the order of file names, as they stand in the files.

    Args:
        path: a file of trees in brackets, a folder with .mrg files at any depth, or a zip file of such a folder, such as NLTK's
            corpora/treebank.zip.

    Raises:
        ValueError: nothing there, no .mrg file in it, or a file that holds no trees in brackets; with a note how to get a treebank
            and under which licence.
    """
    path = Path(path)
    trees: list[Tree] = []
    for name, text in _files(path):
        try:
            trees.extend(Tree.from_string(one) for one in _bracketed(text))
        except ValueError as error:
            raise ValueError(f"{name} is not a file of trees in brackets: {error} {_LICENCE}") from None
    if not trees:
        raise ValueError(f"{path} holds no trees in brackets. {_LICENCE}")
    return trees


def _files(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        found = sorted(path.rglob("*.mrg"))
        if not found:
            raise ValueError(f"no .mrg file under the folder {path}. {_LICENCE}")
        for file in found:
            yield file.name, file.read_text(encoding="utf-8", errors="replace")
    elif not path.is_file():
        raise ValueError(f"{path} does not exist. {_LICENCE}")
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".mrg"))
            if not names:
                raise ValueError(f"no .mrg file in {path}. {_LICENCE}")
            for name in names:
                yield name, archive.read(name).decode("utf-8", errors="replace")
    else:
        yield path.name, path.read_text(encoding="utf-8", errors="replace")


def _bracketed(text: str) -> Iterator[str]:
    """Pieces of text with balanced brackets."""
    depth, start = 0, 0
    for found in re.finditer(r"[()]", text):
        if found.group() == "(":
            if depth == 0:
                if stray := text[start : found.start()].strip():
                    raise ValueError(f"{stray[:40]!r} stands outside brackets.")
                start = found.start()
            depth += 1
        else:
            depth -= 1
            if depth < 0:
                raise ValueError(f"a bracket closes at character {found.start()} that was never opened.")
            if depth == 0:
                yield text[start : found.end()]
                start = found.end()
    if depth or text[start:].strip():
        raise ValueError(
            f"the text ends within a tree, or with words outside brackets: {text[start:].strip()[:40]!r}."
        )


def unknown_class(word: str) -> str:
    """The class of a word by its spelling.

    >>> [unknown_class(word) for word in ("1995", "Zanzibar", "Zebras", "unrolling", "blue-green", "xyzzq")]
    ['UNK-num', 'UNK-cap', 'UNK-cap-s', 'UNK-ing', 'UNK-hyphen', 'UNK']
    """
    if any(c.isdigit() for c in word):
        return "UNK-num"
    if not any(c.isalpha() for c in word):
        return "UNK-sign"
    if word[0].isupper():
        return "UNK-cap-s" if word.endswith("s") else "UNK-cap"
    if "-" in word:
        return "UNK-hyphen"
    return next((f"UNK-{suffix}" for suffix in _SUFFIXES if word.endswith(suffix)), "UNK")


def replace_unknown(words: Sequence[str], vocabulary: Iterable[str]) -> list[str]:
    """`words`, those that are not in the vocabulary turned into their class, or into UNK if the class is not in it either.

    >>> replace_unknown(["the", "zebras"], ["the", "UNK", "UNK-s"])
    ['the', 'UNK-s']
    """
    known = vocabulary if isinstance(vocabulary, (set, frozenset, dict)) else set(vocabulary)
    classes = ((word, unknown_class(word)) for word in words)
    return [word if word in known else kind if kind in known else "UNK" for word, kind in classes]


def estimate(
    trees: Iterable[Any],
    *,
    horizontal: int = 0,
    vertical: int = 0,
    min_count: int = 2,
    smoothing: float = 1.0,
    dtype: torch.dtype | None = None,
) -> PCFG:
    """Count a grammar in trees; see the head of this file.

    Args:
        trees: ours, NLTK's, or text in brackets. Trees of one word are left out: the grammar has none.
        horizontal, vertical: Markovisation, see `binarise`.
        min_count: words seen less often count as unknown; 1: there are no unknown words.
        smoothing: kappa above, in words; 0 for shares as counted. Without unknown words there is nothing to mix with, and it is
            not used.
        dtype: of the grammar, default torch.get_default_dtype().

    Raises:
        ValueError: no tree of two or more words; an option below its smallest value; more symbols than rule probabilities fit
            memory for (more Markovisation than the treebank carries).

    >>> grammar = estimate(["(S (NP (D the) (N dog)) (V barks))", "(S (N dogs) (V bark))"], min_count=1)
    >>> grammar.nonterminals, grammar.preterminals
    (('S', 'NP'), ('D', 'N', 'V'))
    >>> float(grammar.rules[0, 1, 4])
    0.5
    """
    if min_count < 1:
        raise ValueError(f"min_count = {min_count}: expected 1 or more.")
    if not 0 <= smoothing < float("inf"):
        raise ValueError(f"smoothing = {smoothing}: expected a number of 0 or more.")
    roots: Counter[str] = Counter()
    rules: Counter[tuple[str, str, str]] = Counter()
    tags: Counter[tuple[str, str]] = Counter()
    for tree in trees:
        cleaned = clean(tree)
        if cleaned is not None and not cleaned.is_preterminal:
            roots[_count(binarise(cleaned, horizontal=horizontal, vertical=vertical), rules, tags)] += 1
    if not roots:
        raise ValueError("no tree of two or more words to count in.")
    nonterminals = list(dict.fromkeys([*roots, *(parent for parent, _, _ in rules)]))
    preterminals = sorted({tag for tag, _ in tags})
    entries = len(nonterminals) * (len(nonterminals) + len(preterminals)) ** 2
    if entries > _MOST_RULES:
        raise ValueError(
            f"{len(nonterminals)} in-terminals and {len(preterminals)} pre-terminals make {entries:.2g} possible rules, more than the "
            f"{_MOST_RULES:.2g} that are held: use less Markovisation (horizontal = {horizontal}, vertical = {vertical})."
        )
    place = {name: k for k, name in enumerate([*nonterminals, *preterminals])}
    counts = torch.zeros(len(nonterminals), len(place), len(place), dtype=torch.float64)
    index = torch.tensor([[place[name] for name in rule] for rule in rules])
    counts[index[:, 0], index[:, 1], index[:, 2]] = torch.tensor(list(rules.values()), dtype=torch.float64)
    vocabulary, emitted = _emissions(tags, preterminals, min_count, smoothing)
    root = torch.tensor([float(roots[name]) for name in nonterminals], dtype=torch.float64)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return PCFG(
        (root / root.sum()).to(dtype),
        (counts / counts.sum((1, 2), keepdim=True)).to(dtype),
        (emitted / emitted.sum(1, keepdim=True)).to(dtype),
        nonterminals=nonterminals,
        preterminals=preterminals,
        vocabulary=vocabulary,
    )


def _count(tree: Tree, rules: Counter[tuple[str, str, str]], tags: Counter[tuple[str, str]]) -> str:
    """Count the rules of a binary tree; its label, in the grammar."""
    left, right = tree.children[0], tree.children[-1]
    if isinstance(left, str):
        tags[tree.label, left] += 1
        return tree.label
    assert isinstance(right, Tree)
    rules[tree.label, _count(left, rules, tags), _count(right, rules, tags)] += 1
    return tree.label


def _emissions(
    tags: Counter[tuple[str, str]], preterminals: list[str], min_count: int, kappa: float
) -> tuple[list[str], Tensor]:
    """Vocabulary and smoothed counts [P, V]."""
    seen: Counter[str] = Counter()
    for (_, word), count in tags.items():
        seen[word] += count
    counted: Counter[tuple[str, str]] = Counter()
    for (tag, word), count in tags.items():
        counted[tag, word if seen[word] >= min_count else unknown_class(word)] += count
    known = sorted(word for word, count in seen.items() if count >= min_count)
    classes = sorted({word for _, word in counted} - set(known))
    unknown = min_count > 1
    vocabulary = [*known, *classes, *(["UNK"] if unknown and "UNK" not in classes else [])]
    column = {word: k for k, word in enumerate(vocabulary)}
    row = {tag: k for k, tag in enumerate(preterminals)}
    counts = torch.zeros(len(preterminals), len(vocabulary), dtype=torch.float64)
    for (tag, word), count in counted.items():
        counts[row[tag], column[word]] += count
    if not unknown:
        return vocabulary, counts
    of_classes = counts[:, len(known) :]
    # Without any rare word, all words stand in for them.
    rare = (of_classes if classes else counts).sum(1, keepdim=True)
    pooled = rare / rare.sum()
    # UNK stands for classes never met: it needs a count of its own.
    kept = kappa if kappa > 0 else (0.0 if "UNK" in classes else 1e-3)
    shares = (of_classes + kept * pooled) / (of_classes.sum(0) + kept).clamp(min=1e-300)
    counts[:, len(known) :] += kept * pooled
    if kappa > 0:
        backoff = {word: shares[:, k] for k, word in enumerate(vocabulary[len(known) :])}
        mixed = (
            torch.stack([backoff.get(unknown_class(word), pooled.squeeze(1)) for word in known], 1)
            if known
            else counts[:, :0]
        )
        each = counts[:, : len(known)].sum(0)
        counts[:, : len(known)] = each * (counts[:, : len(known)] + kappa * mixed) / (each + kappa)
    return vocabulary, counts
