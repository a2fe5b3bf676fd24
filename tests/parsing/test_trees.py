"""Trees: brackets there and back, spans, and F1 against counts by brute force and NLTK's precision and recall."""

from __future__ import annotations

from collections import Counter

import nltk
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.metrics import f_measure, precision, recall

from papercore.parsing import Tree, branching, tree_f1

LABELS = st.sampled_from(["S", "NP", "@X+Y", "PRP$", "-LRB-"])
WORDS = st.sampled_from(["a", "dog", "-RRB-", "3.5", "don't", ",", "--"])
LEAVES = st.builds(lambda label, word: Tree(label, (word,)), LABELS, WORDS)
TREES = st.recursive(
    LEAVES,
    lambda below: st.builds(
        lambda label, kids: Tree(label, tuple(kids)), LABELS, st.lists(below, min_size=1, max_size=4)
    ),
    max_leaves=12,
)


@given(TREES)
def test_brackets_there_and_back(tree: Tree) -> None:
    assert Tree.from_string(str(tree)) == tree
    assert Tree.from_string(f"( {tree} )") == tree
    assert Tree.from_string(str(tree).replace(" ", "\n   ")) == tree
    assert str(nltk.Tree.fromstring(str(tree))).split() == str(tree.to_nltk()).split()
    assert tree.to_nltk().leaves() == tree.leaves()


@given(TREES)
def test_nodes_and_spans_are_those_of_nltk(tree: Tree) -> None:
    theirs = tree.to_nltk()
    assert [(node.label, node.leaves()) for _, _, node in tree.nodes()] == [
        (t.label(), t.leaves()) for t in theirs.subtrees()
    ]
    words = tree.leaves()
    assert len(tree) == len(words)
    assert all(words[start:end] == node.leaves() for start, end, node in tree.nodes())
    assert tree.spans(min_width=1) == {(i, j, node.label) for i, j, node in tree.nodes()}
    assert tree.spans() == {(i, j, node.label) for i, j, node in tree.nodes() if j - i >= 2}


def test_labels_can_be_changed() -> None:
    tree = Tree.from_string("(S (A a) (B b))")
    assert str(tree.map_labels(str.lower)) == "(s (a a) (b b))"
    assert {tree: 1}[Tree.from_string("(S (A a) (B b))")] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(S (A a)", "1 brackets are still open at the end of '.S .A a.'"),
        ("", "there is no tree in an empty text"),
        ("word", "'word' stands outside brackets at character 0"),
        (") (S a)", r"'\)' stands outside brackets at character 0"),
        ("(S (A a)) (S b)", "a second tree starts at character 10"),
        ("(S (A a) ((B b) (C c)))", "a node without a label closes at character"),
        ("(S (A))", "node 'A' needs at least one child, a tree or a word"),
        ("()", "a node without a label closes at character 1"),
    ],
)
def test_damaged_brackets(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tree.from_string(text)


def test_nodes_need_children() -> None:
    with pytest.raises(ValueError, match=r"node 'S' needs at least one child, a tree or a word; got \(\)"):
        Tree("S", ())
    with pytest.raises(ValueError, match="got 'word'"):
        Tree("S", "word")  # type: ignore[arg-type]


def test_branching() -> None:
    assert str(branching(["a", "b", "c", "d"], label="Y")) == "(Y (Y a) (Y (Y b) (Y (Y c) (Y d))))"
    assert str(branching(["a", "b", "c"], side="left")) == "(X (X (X a) (X b)) (X c))"
    assert str(branching(["a"])) == "(X a)"
    with pytest.raises(ValueError, match="side 'up': expected 'left' or 'right'"):
        branching(["a"], side="up")
    with pytest.raises(ValueError, match="a tree needs at least one word"):
        branching([])


def random_pair(data: st.DataObject) -> tuple[Tree, Tree]:
    """Two trees over the same words."""
    words = data.draw(st.lists(WORDS, min_size=1, max_size=9))

    def grown(start: int, end: int) -> Tree:
        label = data.draw(LABELS)
        if end - start == 1:
            leaf = Tree(label, (words[start],))
            return Tree(data.draw(LABELS), (leaf,)) if data.draw(st.booleans()) else leaf
        cuts = sorted(data.draw(st.sets(st.integers(start + 1, end - 1), min_size=1)))
        whole = Tree(label, tuple(grown(i, j) for i, j in zip([start, *cuts], [*cuts, end], strict=True)))
        return Tree(data.draw(LABELS), (whole,)) if data.draw(st.booleans()) else whole

    return grown(0, len(words)), grown(0, len(words))


def counted(
    tree: Tree, labelled: bool, drop_root: bool, drop_punctuation: bool
) -> Counter[tuple[object, ...]]:
    """Constituents as sets of word positions, from NLTK's tree: another way to the same spans."""
    kept = [any(c.isalnum() for c in w) or not drop_punctuation for w in tree.leaves()]
    numbered = tree.to_nltk()
    for k, place in enumerate(numbered.treepositions("leaves")):
        numbered[place] = k
    found: Counter[tuple[object, ...]] = Counter()
    for node in numbered.subtrees():
        members = tuple(k for k in node.leaves() if kept[k])
        if len(members) >= 2 and not (drop_root and len(members) == sum(kept)):
            found[(members, node.label()) if labelled else (members,)] += 1
    return found if labelled else Counter(dict.fromkeys(found, 1))


@given(st.data(), st.booleans(), st.booleans(), st.booleans())
def test_f1_by_brute_force(
    data: st.DataObject, labelled: bool, drop_root: bool, drop_punctuation: bool
) -> None:
    pairs = [random_pair(data) for _ in range(data.draw(st.integers(1, 3)))]
    gold, guess = [a for a, _ in pairs], [b for _, b in pairs]
    options = {"labelled": labelled, "drop_root": drop_root, "drop_punctuation": drop_punctuation}
    each = []
    for a, b in pairs:
        x, y = counted(a, **options), counted(b, **options)
        if x or y:
            each.append((sum((x & y).values()), sum(x.values()), sum(y.values())))
    hits, wanted, found = (sum(row[k] for row in each) for k in range(3))
    score = tree_f1(gold, guess, **options)
    assert score.sentences == len(each)
    if wanted + found:
        assert score == pytest.approx(2 * hits / (wanted + found))
        macro = tree_f1(gold, guess, average="sentence", **options)
        assert macro == pytest.approx(sum(2 * h / (w + f) for h, w, f in each) / len(each))
    if found:
        assert score.precision == pytest.approx(hits / found)
    if wanted:
        assert score.recall == pytest.approx(hits / wanted)


@given(st.data())
def test_f1_of_nltk_where_it_counts_alike(data: st.DataObject) -> None:
    """Sets of labelled spans of one sentence: NLTK's precision, recall and F measure."""
    gold, guess = random_pair(data)
    a, b = gold.spans(), guess.spans()
    repeats = any(
        c > 1
        for tree in (gold, guess)
        for c in Counter((i, j, n.label) for i, j, n in tree.nodes() if j - i > 1).values()
    )
    if a and b and not repeats:
        score = tree_f1([gold], [guess], labelled=True)
        assert score.precision == pytest.approx(precision(a, b))
        assert score.recall == pytest.approx(recall(a, b))
        assert score == pytest.approx(f_measure(a, b) or 0.0)


def test_scores_say_their_convention() -> None:
    gold = [Tree.from_string("(S (NP (D the) (N dog)) (V barks) (. .))")]
    guess = [branching(["the", "dog", "barks", "."])]
    assert (
        str(tree_f1(gold, gold))
        == "1.000 (unlabelled corpus F1 over spans of two or more words, 1 sentences)"
    )
    assert repr(
        tree_f1(gold, guess, labelled=True, average="sentence", drop_root=True, drop_punctuation=True)
    ) == (
        "0.000 (labelled sentence F1 over spans of two or more words, whole sentence left out, punctuation left out, 1 sentences)"
    )
    # Gold: whole, the-dog. Right branching: whole, dog-barks-., barks-.
    assert tree_f1(gold, guess) == pytest.approx(2 * 1 / 5)
    # Without the full stop: whole, the-dog against whole, dog-barks.
    assert tree_f1(gold, guess, drop_punctuation=True) == pytest.approx(2 * 1 / 4)


def test_f1_refusals() -> None:
    one, other = Tree.from_string("(S (A a) (B b))"), Tree.from_string("(S (A a) (B c))")
    with pytest.raises(ValueError, match="average 'micro': expected 'corpus' or 'sentence'"):
        tree_f1([one], [one], average="micro")
    with pytest.raises(ValueError, match="1 gold trees and 0 predicted ones: expected the same number"):
        tree_f1([one], [])
    with pytest.raises(
        ValueError, match="sentence 0: the gold tree has the words 'a b', the predicted one 'a c'"
    ):
        tree_f1([one], [other])
