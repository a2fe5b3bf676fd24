"""Parse trees: labels, spans, brackets, and the F1 score with its convention spelled out.

A tree's inner nodes are in-terminals with two or more children, or pre-terminals with one word. Spans are (start, end, label),
start counted from 0 and end exclusive, as in Python's slices.

F1 depends on what is counted: the whole-sentence span (always right), spans of one word (always right), punctuation, unary
chains. Numbers under different conventions are not comparable, so `tree_f1` returns a `TreeScore` that says its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Tree", "TreeScore", "branching", "tree_f1"]

_TOKENS = re.compile(r"\(|\)|[^\s()]+")


@dataclass(frozen=True)
class Tree:
    """A node: a label and children, which are trees or words.

    >>> tree = Tree.from_string("(S (NP (D the) (N dog)) (V barks))")
    >>> sorted(tree.spans())
    [(0, 2, 'NP'), (0, 3, 'S')]
    >>> str(tree), tree.leaves()
    ('(S (NP (D the) (N dog)) (V barks))', ['the', 'dog', 'barks'])
    """

    label: str
    children: tuple[Tree | str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.children, str) or not self.children:
            raise ValueError(
                f"node {self.label!r} needs at least one child, a tree or a word; got {self.children!r}."
            )
        object.__setattr__(self, "children", tuple(self.children))

    @classmethod
    def from_string(cls, text: str) -> Tree:
        """Read one tree in brackets. An outer pair of brackets without a label, as in treebank files, is taken off.

        Raises ValueError with the place of the damage.
        """
        tokens = list(_TOKENS.finditer(text))
        open_nodes: list[tuple[str, list[Tree | str]]] = []
        done: Tree | None = None
        place = 0
        while place < len(tokens):
            token = tokens[place].group()
            if done is not None:
                raise ValueError(
                    f"a second tree starts at character {tokens[place].start()} of {text[:60]!r}."
                )
            if token == "(":
                label = tokens[place + 1].group() if place + 1 < len(tokens) else ")"
                named = label not in "()"
                open_nodes.append((label if named else "", []))
                place += 1 + named
                continue
            if not open_nodes:
                raise ValueError(
                    f"{token!r} stands outside brackets at character {tokens[place].start()} of {text[:60]!r}."
                )
            if token == ")":
                label, children = open_nodes.pop()
                if not label and len(children) == 1 and isinstance(children[0], Tree):
                    node: Tree = children[0]
                elif not label:
                    raise ValueError(
                        f"a node without a label closes at character {tokens[place].start()} of {text[:60]!r}."
                    )
                else:
                    node = cls(label, tuple(children))
                if open_nodes:
                    open_nodes[-1][1].append(node)
                else:
                    done = node
            else:
                open_nodes[-1][1].append(token)
            place += 1
        if not tokens:
            raise ValueError("there is no tree in an empty text: expected brackets such as (S (A a) (B b)).")
        if done is None or open_nodes:
            raise ValueError(
                f"{len(open_nodes) or 'all'} brackets are still open at the end of {text[:60]!r}."
            )
        return done

    @property
    def is_preterminal(self) -> bool:
        """A label over one word."""
        return len(self.children) == 1 and isinstance(self.children[0], str)

    def leaves(self) -> list[str]:
        """The words, in order."""
        return [
            word
            for child in self.children
            for word in ([child] if isinstance(child, str) else child.leaves())
        ]

    def __len__(self) -> int:
        """Number of words."""
        return len(self.leaves())

    def nodes(self) -> Iterator[tuple[int, int, Tree]]:
        """(start, end, node) of every node, parents before children."""
        stack: list[tuple[int, Tree]] = [(0, self)]
        while stack:
            start, node = stack.pop()
            yield start, start + len(node), node
            at, later = start, []
            for child in node.children:
                if isinstance(child, str):
                    at += 1
                else:
                    later.append((at, child))
                    at += len(child)
            stack.extend(reversed(later))

    def spans(self, *, min_width: int = 2) -> set[tuple[int, int, str]]:
        """{(start, end, label)} of the nodes over at least `min_width` words; 1 adds the pre-terminals."""
        return {(start, end, node.label) for start, end, node in self.nodes() if end - start >= min_width}

    def map_labels(self, change: Callable[[str], str]) -> Tree:
        """The same tree with every label changed."""
        kids = tuple(c if isinstance(c, str) else c.map_labels(change) for c in self.children)
        return Tree(change(self.label), kids)

    def __str__(self) -> str:
        return f"({self.label} {' '.join(map(str, self.children))})"

    def to_nltk(self) -> Any:
        """The same tree as an nltk.Tree. Raises ValueError if NLTK is not installed."""
        try:
            import nltk
        except ImportError:
            raise ValueError("Tree.to_nltk needs NLTK: pip install nltk") from None
        return nltk.Tree(self.label, [c if isinstance(c, str) else c.to_nltk() for c in self.children])


def branching(words: Sequence[str], *, side: str = "right", label: str = "X") -> Tree:
    """The tree that always branches to one side: the baseline that any parser must beat.

    >>> str(branching(["a", "b", "c"]))
    '(X (X a) (X (X b) (X c)))'
    """
    if side not in ("left", "right"):
        raise ValueError(f"side {side!r}: expected 'left' or 'right'.")
    leaves = [Tree(label, (word,)) for word in words]
    if not leaves:
        raise ValueError("a tree needs at least one word.")
    if side == "right":
        tree = leaves.pop()
        while leaves:
            tree = Tree(label, (leaves.pop(), tree))
        return tree
    tree = leaves[0]
    for leaf in leaves[1:]:
        tree = Tree(label, (tree, leaf))
    return tree


class TreeScore(float):
    """An F1 from 0 to 1 that knows its precision, recall, number of sentences and convention; prints as "0.714 (corpus F1, ...)"."""

    precision: float
    recall: float
    sentences: int
    convention: str

    @classmethod
    def _made(cls, f1: float, precision: float, recall: float, sentences: int, convention: str) -> TreeScore:
        self = cls(f1)
        self.precision, self.recall, self.sentences, self.convention = (
            precision,
            recall,
            sentences,
            convention,
        )
        return self

    def __str__(self) -> str:
        return f"{float(self):.3f} ({self.convention}, {self.sentences} sentences)"

    def __repr__(self) -> str:
        return str(self)


def tree_f1(
    gold: Sequence[Tree],
    predicted: Sequence[Tree],
    *,
    labelled: bool = False,
    average: str = "corpus",
    drop_root: bool = False,
    drop_punctuation: bool = False,
) -> TreeScore:
    """How many constituents two sets of trees share.

    Counted are spans of two or more words; a unary chain over one span counts once where labels are not compared.

    Args:
        gold, predicted: trees over the same words, in the same order.
        labelled: labels must agree too.
        average: "corpus": counts of all sentences together (micro); "sentence": mean of the sentences' F1 (macro).
        drop_root: leave out the span of the whole sentence, which every tree has.
        drop_punctuation: take words without a letter or digit out of both trees first, as evalb does.

    Returns:
        The F1 as a float that also holds `precision`, `recall`, `sentences` and `convention`. A sentence without any span to
        count is left out.

    Raises:
        ValueError: different numbers of trees, different words, or an unknown average.
    """
    if average not in ("corpus", "sentence"):
        raise ValueError(f"average {average!r}: expected 'corpus' or 'sentence'.")
    if len(gold) != len(predicted):
        raise ValueError(
            f"{len(gold)} gold trees and {len(predicted)} predicted ones: expected the same number."
        )
    hits, found, wanted, scores = 0, 0, 0, []
    for number, (right, guess) in enumerate(zip(gold, predicted, strict=True)):
        if right.leaves() != guess.leaves():
            raise ValueError(
                f"sentence {number}: the gold tree has the words {' '.join(right.leaves())!r}, the predicted one {' '.join(guess.leaves())!r}."
            )
        ours = _counted(right, labelled, drop_root, drop_punctuation)
        theirs = _counted(guess, labelled, drop_root, drop_punctuation)
        if not ours and not theirs:
            continue
        both = sum((ours & theirs).values())
        hits, found, wanted = hits + both, found + theirs.total(), wanted + ours.total()
        scores.append((_share(both, theirs.total()), _share(both, ours.total())))
    convention = (
        f"{'labelled' if labelled else 'unlabelled'} {average} F1 over spans of two or more words"
        f"{', whole sentence left out' if drop_root else ''}{', punctuation left out' if drop_punctuation else ''}"
    )
    if average == "corpus":
        precision, recall = _share(hits, found), _share(hits, wanted)
        f1 = _harmonic(precision, recall)
    else:
        count = max(len(scores), 1)
        precision, recall = (sum(s[which] for s in scores) / count for which in (0, 1))
        f1 = sum(_harmonic(*s) for s in scores) / count
    return TreeScore._made(f1, precision, recall, len(scores), convention)


def _counted(
    tree: Tree, labelled: bool, drop_root: bool, drop_punctuation: bool
) -> Counter[tuple[int, int, str]]:
    words = tree.leaves()
    kept = [not drop_punctuation or any(c.isalnum() for c in word) for word in words]
    before = [0]
    for keep in kept:
        before.append(before[-1] + keep)
    spans: Counter[tuple[int, int, str]] = Counter()
    for start, end, node in tree.nodes():
        span = (before[start], before[end], node.label if labelled else "")
        if span[1] - span[0] >= 2 and not (drop_root and span[1] - span[0] == before[-1]):
            spans[span] += 1
    return spans if labelled else Counter(set(spans))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
