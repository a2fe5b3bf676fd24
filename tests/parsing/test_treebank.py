"""Grammars counted in trees: cleaning, binarisation and back, counts by hand, unknown words, and a real treebank where there is one."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from pathlib import Path

import nltk
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papercore.parsing import (
    PCFG,
    Tree,
    binarise,
    clean,
    debinarise,
    estimate,
    inside_outside,
    labelled_recall,
    read_treebank,
    replace_unknown,
    tree_f1,
    unknown_class,
)

# Trees of our own.
ANN = (
    "( (S (NP-SBJ-1 (NNP Ann)) (VP (VBZ hopes) (S (NP-SBJ (-NONE- *-1)) (VP (TO to) (VP (VB win))))) (. .)) )"
)
DOG = "(S (NP (DT the) (JJ old) (JJ big) (NN dog)) (VP (VBZ sleeps)))"
CAT = "(S (NP (DT the) (NN cat)) (VP (VBZ sees) (NP (DT the) (NN dog))))"
RUN = "(S (NP (DT a) (NN run)) (VP (VBZ tires) (NP (NNS dogs))))"
LABELS = st.sampled_from(["S", "NP", "VP", "X", "PRP$", "-LRB-"])
WORDS = st.sampled_from(["a", "b", "-RRB-", "3.5", "don't"])
LEAVES = st.builds(lambda tag, word: Tree(tag, (word,)), st.sampled_from(["DT", "NN", "$", ","]), WORDS)
TREES = st.recursive(
    LEAVES,
    lambda below: st.builds(
        lambda label, kids: Tree(label, tuple(kids)), LABELS, st.lists(below, min_size=1, max_size=5)
    ),
    max_leaves=14,
)


def test_cleaning_by_hand() -> None:
    assert str(clean(ANN)) == "(S (NP+NNP Ann) (VP (VBZ hopes) (S+VP (TO to) (VP+VB win))) (. .))"
    assert (
        str(clean(ANN, collapse=False))
        == "(S (NP (NNP Ann)) (VP (VBZ hopes) (S (VP (TO to) (VP (VB win))))) (. .))"
    )
    assert clean("(S (NP (-NONE- *)))") is None
    assert str(clean("(TOP (S (-LRB- -LRB-) (NP=2 (PRP$ her)) (ADVP|PRT (RB up))))")) == (
        "(S (-LRB- -LRB-) (NP+PRP$ her) (ADVP+RB up))"
    )
    assert str(clean(nltk.Tree.fromstring(CAT))) == CAT.replace("(NP (NNS dogs))", "(NP+NNS dogs)")


def spans(tree: Tree) -> set[tuple[int, int]]:
    return {(i, j) for i, j, _ in tree.spans(min_width=2)}


@given(TREES, st.integers(0, 2), st.integers(0, 2))
def test_there_and_back(tree: Tree, horizontal: int, vertical: int) -> None:
    joined = clean(tree)
    assert joined is not None
    assert joined.leaves() == tree.leaves()
    assert spans(joined) == spans(tree)
    strict = binarise(joined, horizontal=horizontal, vertical=vertical)
    for _, _, node in strict.nodes():
        assert node.is_preterminal or (
            len(node.children) == 2 and not any(isinstance(c, str) for c in node.children)
        )
    assert debinarise(strict) == joined
    assert debinarise(strict, expand=True) == clean(tree, collapse=False)


def test_binarisation_is_that_of_nltk() -> None:
    """NLTK's chomsky_normal_form splits from the left too; its names for the split nodes differ."""
    for text in (DOG, CAT, "(A (B b) (C c) (D (E e) (F f) (G g) (H h)))"):
        theirs = nltk.Tree.fromstring(text)
        theirs.collapse_unary(collapsePOS=True, collapseRoot=True)
        theirs.chomsky_normal_form(factor="right", horzMarkov=0)
        joined = clean(text)
        assert joined is not None
        ours = binarise(joined)
        assert [t.leaves() for t in theirs.subtrees()] == [n.leaves() for _, _, n in ours.nodes()]
        renamed = [
            "@" + t.label()[:-3] if t.label().endswith("|<>") else t.label() for t in theirs.subtrees()
        ]
        assert renamed == [n.label for _, _, n in ours.nodes()]


def test_markovisation_by_hand() -> None:
    tree = Tree.from_string("(S (NP (A a) (B b) (C c) (D d) (E e)) (V v))")
    assert str(binarise(tree, horizontal=2, vertical=1)) == (
        "(S (NP^S (A a) (@NP^S:A (B b) (@NP^S:A_B (C c) (@NP^S:B_C (D d) (E e))))) (V v))"
    )


def test_counts_by_hand() -> None:
    grammar = estimate([ANN, DOG, CAT, RUN], min_count=1, dtype=torch.float64)
    s = {name: k for k, name in enumerate(grammar.symbols)}
    rule = lambda a, b, c: float(grammar.rules[s[a], s[b], s[c]])  # noqa: E731
    assert rule("S", "NP", "VP") == 0.5
    assert rule("S", "NP", "VP+VBZ") == 0.25
    assert rule("S", "NP+NNP", "@S") == 0.25
    assert rule("@S", "VP", ".") == 1.0
    assert rule("NP", "DT", "NN") == 0.75
    assert rule("@NP", "JJ", "@NP") == rule("@NP", "JJ", "NN") == 0.5
    assert grammar.root.tolist() == [1.0] + [0.0] * (len(grammar.nonterminals) - 1)
    tag = grammar.preterminals.index("NN")
    words = {w: float(p) for w, p in zip(grammar.vocabulary, grammar.emissions[tag], strict=True) if p > 0}
    assert words == {"dog": 0.5, "cat": 0.25, "run": 0.25}
    method = PCFG.from_treebank([ANN, DOG, CAT, RUN], min_count=1, dtype=torch.float64)
    assert torch.equal(method.rules, grammar.rules)


def test_same_shares_as_nltk_induces() -> None:
    texts = [DOG, CAT, RUN, CAT]
    joined = [binarise(c) for c in map(clean, texts) if c is not None]
    theirs = nltk.induce_pcfg(nltk.Nonterminal("S"), [p for t in joined for p in t.to_nltk().productions()])
    ours = estimate(texts, min_count=1, dtype=torch.float64)
    s = {name: k for k, name in enumerate(ours.symbols)}
    inner = len(ours.nonterminals)
    for p in theirs.productions():
        right = p.rhs()
        if isinstance(right[0], str):
            value = ours.emissions[s[str(p.lhs())] - inner, ours.vocabulary.index(right[0])]
        else:
            value = ours.rules[s[str(p.lhs())], s[str(right[0])], s[str(right[1])]]
        assert float(value) == pytest.approx(p.prob())
    assert len(theirs.productions()) == int((ours.rules > 0).sum() + (ours.emissions > 0).sum())


def test_unknown_words() -> None:
    grammar = estimate([ANN, DOG, CAT, RUN], min_count=2, smoothing=0)
    assert set(grammar.vocabulary) == {"the", "dog", "UNK", "UNK-cap", "UNK-s", "UNK-sign"}
    words = replace_unknown(["the", "cats", ",", "Bob", "walking"], grammar.vocabulary)
    assert words == ["the", "UNK-s", "UNK-sign", "UNK-cap", "UNK"]
    counts = Counter(unknown_class(w) for w in ("3,5", "--", "BBC", "Dogs", "so-so", "nicely", "", "É"))
    assert set(counts) == {"UNK-num", "UNK-sign", "UNK-cap", "UNK-cap-s", "UNK-hyphen", "UNK-ly"}
    assert counts["UNK-sign"] == 2


def test_smoothing_by_hand() -> None:
    """`dog` has been seen twice as a noun; rare words with no suffix were nouns, adjectives, ..."""
    trees, kappa = [ANN, DOG, CAT, RUN], 0.5
    tags: Counter[tuple[str, str]] = Counter()
    for text in trees:
        cleaned = clean(text)
        assert cleaned is not None
        tags.update((n.label, str(n.children[0])) for _, _, n in cleaned.nodes() if n.is_preterminal)
    seen: Counter[str] = Counter()
    for (_, word), count in tags.items():
        seen[word] += count
    rare = Counter({key: c for key, c in tags.items() if seen[key[1]] < 2})
    q: Counter[str] = Counter()
    of_class: Counter[str] = Counter()
    for (tag, word), count in rare.items():
        q[tag] += count
        if unknown_class(word) == "UNK":
            of_class[tag] += count
    total, in_class = sum(q.values()), sum(of_class.values())
    expected = {}
    for tag in {t for t, _ in tags}:
        share = (of_class[tag] + kappa * q[tag] / total) / (in_class + kappa)
        expected[tag] = 2 * (tags[tag, "dog"] + kappa * share) / (2 + kappa)
    assert sum(expected.values()) == pytest.approx(2)  # counts of a word move between tags, none is lost
    grammar = estimate(trees, smoothing=kappa, dtype=torch.float64)
    column = grammar.emissions[:, grammar.vocabulary.index("dog")]
    the = grammar.emissions[:, grammar.vocabulary.index("the")]
    for k, tag in enumerate(grammar.preterminals):
        share = (of_class[tag] + kappa * q[tag] / total) / (in_class + kappa)
        the_count = 3 * (tags[tag, "the"] + kappa * share) / (3 + kappa)
        if the_count > 0:
            assert float(column[k] / the[k]) == pytest.approx(expected[tag] / the_count)


def test_trees_of_one_word_and_of_traces_are_left_out() -> None:
    more = [CAT, "(INTJ (UH Yes))", "(S (NP (-NONE- *)))"]
    assert estimate(more, min_count=1).preterminals == estimate([CAT], min_count=1).preterminals
    with pytest.raises(ValueError, match="no tree of two or more words to count in"):
        estimate(more[1:])


def test_the_grammar_parses_its_own_trees() -> None:
    texts = [ANN, DOG, CAT, RUN]
    gold = [c for c in map(clean, texts) if c is not None]
    grammar = estimate(texts, min_count=1)
    words = [t.leaves() for t in gold]
    result = inside_outside(grammar, grammar.encode(words), lengths=[len(w) for w in words])
    found = [debinarise(t) for t in labelled_recall(result)]
    assert tree_f1(gold, found, labelled=True) == 1.0


def test_labels_of_a_parser_are_spliced_at_the_root_too() -> None:
    assert str(debinarise(Tree.from_string("(@S (@NP (A a) (B b)) (C<word> c))"))) == "(S (A a) (B b) (C c))"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate([CAT], min_count=0), "min_count = 0: expected 1 or more"),
        (lambda: estimate([CAT], smoothing=-1.0), "smoothing = -1.0: expected a number of 0 or more"),
        (lambda: estimate([CAT], smoothing=float("nan")), "smoothing = nan: expected"),
        (lambda: estimate([CAT], horizontal=-1), "horizontal = -1: expected 0 or more"),
        (lambda: binarise(Tree.from_string("(S (A (B b)) (C c))")), "cannot make '.A .B b..' binary: expected two or more nodes"),
        (lambda: binarise(Tree.from_string("(S (A a) b)")), "cannot make '.S .A a. b.' binary"),
        (lambda: clean(nltk.Tree("S", [])), "a node 'S' without children"),
    ],
)  # fmt: skip
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="expected a Tree, an nltk.Tree or text in brackets, got int"):
        estimate([3])
    from papercore.parsing import treebank

    monkeypatch.setattr(treebank, "_MOST_RULES", 100)
    message = (
        r"3 in-terminals and 3 pre-terminals make .* possible rules, more than .*: use less Markovisation"
    )
    with pytest.raises(ValueError, match=message):
        estimate([CAT])


def test_reading_files(tmp_path: Path) -> None:
    folder = tmp_path / "bank" / "deep"
    folder.mkdir(parents=True)
    (folder / "b.mrg").write_text(f"\n{CAT}\n\n{DOG}")
    (folder / "a.mrg").write_text(ANN)
    (folder / "notes.txt").write_text("no trees")
    trees = read_treebank(tmp_path / "bank")
    assert [len(t) for t in trees] == [6, 5, 5]
    assert str(trees[1]) == CAT
    packed = tmp_path / "bank.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"bank/{file.name}")
    assert read_treebank(str(packed)) == trees
    assert read_treebank(folder / "b.mrg") == trees[1:]


def test_reading_says_where_treebanks_come_from(tmp_path: Path) -> None:
    licence = r"No treebank comes with papercore.*non-commercial use only"
    with pytest.raises(ValueError, match=f"nothing.zip does not exist. {licence}"):
        read_treebank(tmp_path / "nothing.zip")
    with pytest.raises(ValueError, match=f"no .mrg file under the folder .*{licence}"):
        read_treebank(tmp_path)
    for text, message in (
        ("(S (A a)", "the text ends within a tree"),
        ("(S (A a)))", "a bracket closes at character 9 that was never opened"),
        ("plain text", "the text ends within a tree, or with words outside brackets: 'plain text'"),
        ("x (S (A a))", "'x' stands outside brackets"),
        ("(S ())", "needs at least one child|without a label"),
        ("", "holds no trees in brackets"),
    ):
        (tmp_path / "bad.mrg").write_text(text)
        with pytest.raises(ValueError, match=f"({message}).*{licence}"):
            read_treebank(tmp_path / "bad.mrg")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(ValueError, match="no .mrg file in .*empty.zip"):
        read_treebank(tmp_path / "empty.zip")


def nltk_sample() -> Path | None:
    for folder in filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep)):
        for name in ("treebank.zip", "treebank"):
            if (path := Path(folder) / "corpora" / name).exists():
                return path
    return None


@pytest.mark.skipif(nltk_sample() is None, reason="NLTK_DATA holds no treebank sample")
def test_a_real_treebank() -> None:
    path = nltk_sample()
    assert path is not None
    trees = read_treebank(path)
    assert len(trees) == 3914
    train, held_out = trees[:3514], [c for c in map(clean, trees[3514:]) if c is not None]
    assert sum(len(t) for t in trees) > sum(len(c) for c in map(clean, trees) if c is not None) == 94084
    grammar = estimate(train)
    assert len(grammar.preterminals) == 146
    assert 80 <= len(grammar.nonterminals) <= 100
    assert grammar.spectral_radius() < 1
    short = [t for t in held_out if 2 <= len(t) <= 15][:25]
    words = [replace_unknown(t.leaves(), grammar.vocabulary) for t in short]
    result = inside_outside(grammar, grammar.encode(words), lengths=[len(w) for w in words])
    found = [debinarise(t) for t in labelled_recall(result)]
    gold = [with_words(t, w) for t, w in zip(short, words, strict=True)]
    assert tree_f1(gold, found) > 0.65


def with_words(tree: Tree, words: list[str]) -> Tree:
    rest = iter(words)

    def copied(node: Tree) -> Tree:
        return Tree(node.label, tuple(next(rest) if isinstance(c, str) else copied(c) for c in node.children))

    return copied(tree)
