"""The grammars of our own: what the chapter relies on."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch

from papercore.parsing import (
    PCFG,
    branching,
    english,
    english_shifted,
    inside_outside,
    labelled_recall,
    length_distribution,
    sample,
    tree_f1,
)
from papercore.parsing.english import _RULES, _classes, _inflected

BOTH = [english, english_shifted]


def cut_mean(grammar: PCFG, most: int) -> float:
    shares = length_distribution(grammar, most)
    return float(shares @ torch.arange(most + 1, dtype=torch.float64) / shares.sum())


def test_sizes_and_lengths() -> None:
    grammar, shifted = english(), english_shifted()
    assert (len(grammar.nonterminals), len(grammar.preterminals), len(grammar.vocabulary)) == (26, 42, 286)
    assert 0.7 < grammar.spectral_radius() < 0.85 < shifted.spectral_radius() < 0.92
    assert 8 < cut_mean(grammar, 20) < 9.5
    assert cut_mean(shifted, 20) > cut_mean(grammar, 20) + 0.5
    assert shifted.expected_length() > 1.5 * grammar.expected_length()


def test_weights_of_every_symbol_add_up_in_both_columns() -> None:
    for line in _RULES.strip().split("\n"):
        name, _, sides = line.partition(": ")
        columns = [side.split()[-1].split("/") for side in sides.split(" | ")]
        for column in (0, 1):
            assert sum(float(c[column]) for c in columns) == pytest.approx(1, abs=1e-9), name


def test_the_second_grammar_has_the_same_support_and_other_probabilities() -> None:
    a, b = english(), english_shifted()
    for kind in ("nonterminals", "preterminals", "vocabulary"):
        assert getattr(a, kind) == getattr(b, kind)
    assert torch.equal(a.rules > 0, b.rules > 0)
    assert torch.equal(a.emissions > 0, b.emissions > 0)
    nouns = a.preterminals.index("NNs")
    assert a.emissions[nouns].argmax() != b.emissions[nouns].argmax()
    assert float((a.rules - b.rules).abs().sum()) > 3


@pytest.mark.parametrize("make", BOTH)
def test_every_symbol_occurs(make) -> None:
    grammar = make()
    assert bool((grammar.expected_counts() > 1e-3).all())
    assert grammar.dtype == torch.float32
    assert make(dtype=torch.float64).dtype == torch.float64


def test_words_are_shared_between_categories() -> None:
    classes = _classes()
    homes = defaultdict(set)
    for name, words in classes.items():
        assert len(set(words)) == len(words), name
        for word in words:
            homes[word].add(name)
    assert {"NNs", "VTp", "VTb"} <= homes["paint"]
    assert {"DTs", "PRNs", "COMP", "WH"} <= homes["that"]
    assert {"IN", "SUB"} <= homes["before"]
    assert {"VTs", "VTp", "VTn"} <= homes["visited"]
    assert {"NAME", "MOD", "DOs"} <= homes["will"]
    shared = Counter(len(kinds) > 1 for kinds in homes.values())
    assert shared[True] > 100


def test_inflection() -> None:
    assert _inflected("judge") == ("judges", "judging", "judged", "judged")
    assert _inflected("watch") == ("watches", "watching", "watched", "watched")
    assert _inflected("see") == ("sees", "seeing", "saw", "seen")
    irregular = [
        word
        for words in _classes().values()
        for word in words
        if word in {"runned", "seed", "tryed", "childs"}
    ]
    assert irregular == []


def test_agreement_reaches_across_a_relative_clause() -> None:
    """A verb's number is the head noun's, not that of the noun beside it."""
    grammar = english(dtype=torch.float64)
    good = "the dog that followed the cats was sleeping"
    bad = "the dog that followed the cats were sleeping"
    log_z = inside_outside(grammar, grammar.encode([good.split(), bad.split()])).log_z
    assert float(log_z[0] - log_z[1]) > 2


def test_sentences_can_be_parsed_but_not_by_branching() -> None:
    """Inside-outside finds most constituents, one-sided branching does not: the room in which models are compared."""
    grammar = english()
    ids, gold = sample(grammar, 150, max_length=16, generator=torch.Generator().manual_seed(0))
    found = labelled_recall(inside_outside(grammar, ids, lengths=[len(t) for t in gold]))
    best = tree_f1(gold, found)
    assert 0.8 < best < 0.99
    for side in ("left", "right"):
        assert tree_f1(gold, [branching(t.leaves(), side=side) for t in gold]) < best - 0.2
