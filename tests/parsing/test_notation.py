"""Grammars as text: against NLTK's reader, round trips, and errors that name the line."""

from __future__ import annotations

import math

import nltk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papercore.parsing import PCFG, english, inside_outside, read, to_nltk, write
from tests.parsing.reference import random_grammar

TEXT = """
# A grammar with rules of one, two and three symbols.
S -> NP VP [0.9] | NP VP 'today' [0.1]
NP -> D N [0.5] | 'dogs' [0.2] | N [0.2]
    | NP PP PP [0.1]
PP -> "of" NP [1.]
VP -> V NP [0.7] | V [.2] | \\
      V [1e-1]
D -> 'the' [1.0]
N -> 'dogs' [0.5] | "cat's" [0.5]   # a word with a quote
V -> 'chase' [1.0]
"""


def log_z(grammar: PCFG, sentence: str) -> float:
    return float(inside_outside(grammar, grammar.encode(sentence)[None]).log_z)


def test_probabilities_by_hand() -> None:
    grammar = read(TEXT, dtype=torch.float64)
    # S -> NP VP, NP -> dogs (0.2 as a word, 0.2 * 0.5 as N), VP -> V (0.2 + 0.1)
    assert math.exp(log_z(grammar, "dogs chase")) == pytest.approx(0.9 * 0.3 * 0.3)
    # S -> NP VP today
    assert math.exp(log_z(grammar, "dogs chase today")) == pytest.approx(0.1 * 0.3 * 0.3)
    # NP -> NP PP PP is one way only: no attachment of the second PP to the first NP of its own
    np, vp = 0.3, 0.3
    once = 0.9 * vp * 0.1 * np * np * np
    assert math.exp(log_z(grammar, "dogs of dogs of dogs chase")) == pytest.approx(once)


def test_symbols_made_for_words_and_long_rules() -> None:
    grammar = read(TEXT)
    assert grammar.nonterminals == ("S", "NP", "VP", "@S:VP_<today>", "@NP:PP_PP", "PP")
    assert grammar.preterminals == ("NP<word>", "D", "N", "<of>", "V", "<today>")
    assert grammar.vocabulary == ("dogs", "the", "cat's", "chase", "today", "of")


def test_the_start_symbol() -> None:
    text = "A -> B B [1.0]\nB -> 'x' [1.0]\nC -> A A [1.0]"
    assert read(text).root.tolist() == [1.0, 0.0]
    assert read("%start C\n" + text).root.tolist() == [0.0, 1.0]
    assert read("%start C\n" + text, start="A").root.tolist() == [1.0, 0.0]


def test_weights() -> None:
    grammar = read("S -> A A [3] | A S [1]\nA -> 'x' | 'y' [3]", normalize=True)
    assert grammar.rules[0, 1].tolist() == [0.25, 0.75]
    assert grammar.emissions.tolist() == [[0.25, 0.75]]


NLTK_TEXT = """
S -> NP VP [1.0]
VP -> V NP [0.59] | V [0.4] | VP PP [0.01]
NP -> Det N [0.41] | Name [0.28] | NP PP [0.31]
PP -> P NP [1.0]
V -> 'saw' [0.21] | 'ate' [0.51] | 'ran' [0.28]
N -> 'boy' [0.11] | 'cookie' [0.12] | 'table' [0.13] | 'telescope' [0.14] | 'hill' [0.5]
Name -> 'Jack' [0.52] | 'Bob' [0.48]
P -> 'with' [0.61] | 'under' [0.39]
Det -> 'the' [0.41] | 'a' [0.31] | 'my' [0.28]
"""
SENTENCES = ["Jack ran", "Jack saw the boy with a telescope", "Bob ate my cookie under the table with Jack"]


def nltk_sum(grammar: nltk.PCFG, sentence: str) -> float:
    """Sum over all trees that NLTK's chart parser finds, their probabilities multiplied out here."""
    weights = {(p.lhs(), p.rhs()): p.prob() for p in grammar.productions()}
    parser = nltk.ChartParser(nltk.CFG(grammar.start(), grammar.productions()))
    return sum(
        math.prod(weights[p.lhs(), p.rhs()] for p in tree.productions())
        for tree in parser.parse(sentence.split())
    )


@pytest.mark.parametrize("sentence", SENTENCES)
def test_nltk_reads_the_same_grammar(sentence: str) -> None:
    theirs = nltk.PCFG.fromstring(NLTK_TEXT)
    truth = nltk_sum(theirs, sentence)
    assert truth > 0
    for ours in (read(NLTK_TEXT, dtype=torch.float64), read(theirs, dtype=torch.float64)):
        assert math.exp(log_z(ours, sentence)) == pytest.approx(truth, rel=1e-10)
        assert nltk_sum(to_nltk(ours), sentence) == pytest.approx(truth, rel=1e-10)


def test_nltk_grammar_without_probabilities() -> None:
    theirs = nltk.CFG.fromstring("S -> A A | A S\nA -> 'x'")
    assert read(theirs, normalize=True).rules[0, 1].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="S -> A A has no probability: give an nltk.PCFG, or normalize=True"):
        read(theirs)


def same(a: PCFG, b: PCFG) -> None:
    """Equal up to the order of symbols and words."""
    i = [b.nonterminals.index(name) for name in a.nonterminals]
    p = [b.preterminals.index(name) for name in a.preterminals]
    s = [*i, *(len(i) + k for k in p)]
    v = [b.vocabulary.index(word) for word in a.vocabulary]
    torch.testing.assert_close(b.root[i], a.root)
    torch.testing.assert_close(b.rules[i][:, s][:, :, s], a.rules)
    torch.testing.assert_close(b.emissions[p][:, v], a.emissions)


@pytest.mark.parametrize("start", [0, 1])
def test_write_and_read(start: int) -> None:
    grammar = random_grammar(3, 4, 5, seed=start, keep=0.4)
    root = torch.zeros(3, dtype=torch.float64)
    root[start] = 1
    names = {k: getattr(grammar, k) for k in ("nonterminals", "preterminals", "vocabulary")}
    grammar = PCFG(root, grammar.rules, grammar.emissions, **names)
    same(grammar, read(write(grammar), dtype=torch.float64))


def test_a_root_distribution_survives() -> None:
    grammar = random_grammar(3, 2, 3, seed=5)
    text = write(grammar)
    assert text.startswith("ROOT -> N0 [0.")
    same(grammar, read(text, dtype=torch.float64))


def test_the_english_grammar_survives() -> None:
    grammar = english()
    text = write(grammar)
    assert 'POS -> "\'s" [1.0]' in text
    same(grammar, read(text))


@settings(max_examples=60)
@given(st.text(alphabet="AB->|'\"[]01. %#\n", max_size=40))
def test_any_text_is_read_or_refused_with_a_message(text: str) -> None:
    try:
        grammar = read(text)
    except ValueError as error:
        assert len(str(error)) > 20
    else:
        assert len(grammar.nonterminals) >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rules in the text: expected lines such as S -> NP VP"),
        ("S NP VP [1.0]", r"line 1: 'S NP VP \[1\.0\]': expected SYMBOL -> \.\.\."),
        ("| A [1.0]", "line 1: .* expected SYMBOL ->"),
        ("\nS -> A A [1.0] B\n", r"line 2: .* expected \| or the end of the line before 'B'"),
        ("S -> A A [1.0] -> B", "expected . or the end of the line before '->'"),
        ("S -> A A", r"the probability of 'A A' is missing, such as \[0\.5\]; normalize=True gives all"),
        ("S -> A A [half]", r"line 1: \[half\] is not a number"),
        ("S -> A A [1.0] |", "line 1: .* an alternative is empty"),
        ("S -> [1.0]", "an alternative is empty; every rule needs a word or symbols"),
        ("S -> '' [1.0]", "an alternative is empty"),
        ("S -> 'a [1.0]", "line 1: cannot read .* is a quote or a bracket left open"),
        ("S -> A A [1.0", "cannot read .* is a quote or a bracket left open"),
        ("%begin S", "line 1: '%begin S': the only directive is %start SYMBOL"),
        ("S -> A A \\", "the text ends after 'S -> A A'"),
        ("S -> A dog [1.0]\nA -> 'x' [1.0]", "'dog' in the rule S -> A dog .* has no rules of its own"),
        ("S -> A A [0.5]\nA -> 'x' [1.0]", "the rules of 'S' add up to 0.5, expected 1"),
        ("S -> A [1.0]\nA -> S [1.0]", "the rules S -> A -> S form a cycle that no rule leaves"),
        ("S -> S S [0.4] | 'a' [0.6]", "'S' becomes a single word with probability 0.6, and sentences here"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(text)


def test_refusals_of_other_kinds() -> None:
    with pytest.raises(TypeError, match="expected a grammar as text or as an nltk.PCFG, got int"):
        read(3)
    grammar = read("S -> A A [1.0]\nA -> 'x' [0.5] | 'y' [0.5]")
    with pytest.raises(ValueError, match="add up to less than 1: the notation cannot hold it"):
        write(read("S -> S S [0.4] | 'a' [0.6]", single_words="drop"))
    names = {"nonterminals": ["S"], "preterminals": ["A B"], "vocabulary": ["x", "y"]}
    with pytest.raises(ValueError, match="has a symbol with a blank, quote"):
        write(PCFG(grammar.root, grammar.rules, grammar.emissions, **names))
    names = {"nonterminals": ["S"], "preterminals": ["A"], "vocabulary": ["x", "'\""]}
    with pytest.raises(ValueError, match="holds both kinds of quotes"):
        write(PCFG(grammar.root, grammar.rules, grammar.emissions, **names))
