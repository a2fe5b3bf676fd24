"""Treebank trees made into trees of the strict form, and back.

The strict form (Zhao et al., 2023, arXiv 2303.08117, section 2.1) has nodes with two children, or with one word. From a treebank's
tree to it:

    1. traces (-NONE-) and what is empty without them go, and so do function tags: NP-SBJ-1 becomes NP          clean
    2. a chain of nodes over one span becomes one node: (S (VP ...)) becomes (S+VP ...), (NP (NN x)) becomes (NP+NN x)    clean
    3. longer nodes are split from the left: (X A B C D) becomes (X A (@X B (@X C D)))                          binarise

Steps 2 and 3 lose nothing: `debinarise` takes them back. Step 1 does, as treebank parsing always does.

Markovisation. With horizontal = h the split nodes remember the h last children before them: (X A (@X:A B (@X:B C D))) for h = 1.
With vertical = v phrases remember v ancestors: NP^S for v = 1. More memory makes a sharper grammar with more symbols.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from papercore.parsing.trees import Tree

__all__ = ["as_tree", "binarise", "clean", "debinarise"]

_TOPS = {"TOP", "ROOT", "S1", "VROOT", ""}
_CUT = re.compile(r"(?<=.)[-=|].*")


def as_tree(tree: Any) -> Tree:
    """A Tree from one of ours, from one of NLTK's, or from text in brackets. TypeError for anything else."""
    if isinstance(tree, Tree):
        return tree
    if isinstance(tree, str):
        return Tree.from_string(tree)
    if callable(getattr(tree, "label", None)):
        if not len(tree):
            raise ValueError(f"a node {tree.label()!r} without children: expected a tree or a word below it.")
        return Tree(str(tree.label()), tuple(c if isinstance(c, str) else as_tree(c) for c in tree))
    raise TypeError(f"expected a Tree, an nltk.Tree or text in brackets, got {type(tree).__name__}.")


def clean(tree: Any, *, collapse: bool = True) -> Tree | None:
    """Steps 1 and 2 above; None if the tree holds no word but traces.

    Args:
        tree: ours, NLTK's, or text.
        collapse: make chains one node, joined by "+".

    >>> str(clean("(S (NP-SBJ (NNP Ann)) (VP (VBZ hopes) (S (NP-SBJ (-NONE- *)) (VP (TO to) (VP (VB win))))))"))
    '(S (NP+NNP Ann) (VP (VBZ hopes) (S+VP (TO to) (VP+VB win))))'
    """
    stripped = _stripped(as_tree(tree))
    if stripped is None:
        return None
    while stripped.label in _TOPS and len(stripped.children) == 1 and isinstance(stripped.children[0], Tree):
        stripped = stripped.children[0]
    return _collapsed(stripped) if collapse else stripped


def _stripped(tree: Tree) -> Tree | None:
    if tree.label == "-NONE-":
        return None
    kept = [child if isinstance(child, str) else _stripped(child) for child in tree.children]
    children = tuple(child for child in kept if child is not None)
    label = tree.label if tree.label.startswith("-") else _CUT.sub("", tree.label)
    return Tree(label, children) if children else None


def _collapsed(tree: Tree) -> Tree:
    labels = [tree.label]
    while len(tree.children) == 1 and isinstance(tree.children[0], Tree):
        tree = tree.children[0]
        labels.append(tree.label)
    return Tree("+".join(labels), tuple(c if isinstance(c, str) else _collapsed(c) for c in tree.children))


def binarise(tree: Tree, *, horizontal: int = 0, vertical: int = 0) -> Tree:
    """Step 3 above, on a tree without chains (`clean`).

    Args:
        horizontal, vertical: how many earlier siblings split nodes, and how many ancestors phrases, carry in their label.

    Raises:
        ValueError: a chain of two nodes over one span, or a node that mixes words with nodes.

    >>> tree = Tree.from_string("(S (A a) (B b) (C c) (D d))")
    >>> str(binarise(tree)), str(binarise(tree, horizontal=1))
    ('(S (A a) (@S (B b) (@S (C c) (D d))))', '(S (A a) (@S:A (B b) (@S:B (C c) (D d))))')
    """
    for name, value in (("horizontal", horizontal), ("vertical", vertical)):
        if value < 0:
            raise ValueError(f"{name} = {value}: expected 0 or more.")
    return _binarised(tree, horizontal, vertical, ())


def _binarised(tree: Tree, horizontal: int, vertical: int, ancestors: tuple[str, ...]) -> Tree:
    if tree.is_preterminal:
        return tree
    if len(tree.children) < 2 or any(isinstance(child, str) for child in tree.children):
        raise ValueError(
            f"cannot make {str(tree)[:60]!r} binary: expected two or more nodes, or one word, below every node; "
            "clean(tree) joins chains of nodes."
        )
    below = (tree.label, *ancestors)
    children = [_binarised(c, horizontal, vertical, below) for c in tree.children if isinstance(c, Tree)]
    names = [child.label for child in tree.children if isinstance(child, Tree)]
    label = "^".join([tree.label, *ancestors[:vertical]])
    right = children[-1]
    for k in range(len(children) - 2, 0, -1):
        memory = names[max(0, k - horizontal) : k] if horizontal else []
        right = Tree(f"@{label}{':' if memory else ''}{'_'.join(memory)}", (children[k], right))
    return Tree(label, (children[0], right))


def debinarise(tree: Tree, *, expand: bool = False) -> Tree:
    """The inverse of `binarise`: nodes named @... are spliced out, and marks ^... are cut off.

    Args:
        expand: take chains X+Y apart too, which undoes the joining of `clean`.

    A parser that maximises marginals may put @X at the root or under a node Y; it is spliced out all the same (at the root, it
    becomes X).

    >>> str(debinarise(Tree.from_string("(S^TOP (NP+A a) (@S (B b) (@S (C c) (D d))))"), expand=True))
    '(S (NP (A a)) (B b) (C c) (D d))'
    """
    children = _spliced(tree.children)
    labels = _plain(tree.label).split("+") if expand else [_plain(tree.label)]
    if expand and "" in labels:  # a tag "+" of its own
        labels = [_plain(tree.label)]
    restored = tuple(c if isinstance(c, str) else debinarise(c, expand=expand) for c in children)
    for label in reversed(labels):
        restored = (Tree(label, restored),)
    (whole,) = restored
    assert isinstance(whole, Tree)
    return whole


def _spliced(children: Sequence[Tree | str]) -> list[Tree | str]:
    flat: list[Tree | str] = []
    for child in children:
        if isinstance(child, Tree) and child.label.startswith("@") and not child.is_preterminal:
            flat.extend(_spliced(child.children))
        else:
            flat.append(child)
    return flat


def _plain(label: str) -> str:
    if label.startswith("@") and len(label) > 1:
        label = label[1:].split(":", 1)[0]
    return label.split("^", 1)[0].removesuffix("<word>") or label
