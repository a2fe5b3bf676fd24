"""Splitting symbols: what stays exactly, and what noise does."""

from __future__ import annotations

import pytest
import torch

from papercore.parsing import PCFG, Tree, english, inside_outside, merge_symbols, sample, split_symbols
from tests.parsing.reference import random_grammar


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_noise_sentences_keep_their_probabilities() -> None:
    grammar = random_grammar(2, 3, 4, seed=0)
    split = split_symbols(grammar, 3, noise=0.0, generator=seeded())
    ids = torch.randint(4, (20, 5), generator=seeded(1))
    before, after = inside_outside(grammar, ids), inside_outside(split, ids)
    torch.testing.assert_close(after.log_z, before.log_z)
    # Each variant has a third of its symbol's marginal.
    merged = after.span_marginals.unflatten(-1, (2, 3)).sum(-1)
    torch.testing.assert_close(merged, before.span_marginals)
    assert split.spectral_radius() == pytest.approx(grammar.spectral_radius())


def test_noise_makes_variants_differ_but_adds_no_rule() -> None:
    grammar = english()
    split = split_symbols(grammar, 2, noise=0.5, generator=seeded())
    assert len(split.nonterminals) == 52
    assert split.nonterminals[:3] == ("S#0", "S#1", "Q#0")
    assert split.preterminals[-1] == "BY#1"
    allowed = (grammar.rules > 0).repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(split.rules > 0, allowed)
    assert float((split.rules[0] - split.rules[1]).abs().sum()) > 0.2
    again = split_symbols(grammar, 2, noise=0.5, generator=seeded())
    assert torch.equal(split.rules, again.rules)
    assert split.spectral_radius() == pytest.approx(grammar.spectral_radius(), abs=0.1)


def test_factors_have_mean_1_and_the_variance_asked_for() -> None:
    """One symbol with many equal words: shares / mean share have variance close to the noise."""
    words = 4000
    names = {"nonterminals": ["S"], "preterminals": ["A"], "vocabulary": [f"w{k}" for k in range(words)]}
    rules = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    grammar = PCFG(
        torch.ones(1, dtype=torch.float64),
        rules,
        torch.full((1, words), 1 / words, dtype=torch.float64),
        **names,
    )
    for noise in (0.1, 1.0):
        split = split_symbols(grammar, 2, noise=noise, generator=seeded(2))
        assert float((split.emissions * words).var()) == pytest.approx(noise, rel=0.15)


def test_strong_noise_leaves_proper_rows() -> None:
    split = split_symbols(english(), 2, noise=1000.0, generator=seeded())
    assert split.proper
    sample(split, 5, max_length=10, generator=seeded())


def test_merged_trees_are_trees_of_the_old_grammar() -> None:
    grammar = random_grammar(3, 2, 4, seed=2, keep=0.3)
    split = split_symbols(grammar, 4, noise=1.0, generator=seeded())
    _, trees = sample(split, 100, max_length=8, generator=seeded(1))
    place = {name: k for k, name in enumerate(grammar.symbols)}
    for tree in map(merge_symbols, trees):
        for _, _, node in tree.nodes():
            if not node.is_preterminal:
                left, right = (place[c.label] for c in node.children)  # type: ignore[union-attr]
                assert grammar.rules[place[node.label], left, right] > 0
    assert merge_symbols(Tree("##0", ("x",))) == Tree("#", ("x",))


def test_refusals() -> None:
    grammar = english()
    with pytest.raises(ValueError, match="k = 0: expected 1 or more variants"):
        split_symbols(grammar, 0, noise=0.1, generator=seeded())
    with pytest.raises(ValueError, match="noise = -0.1: expected a variance of 0 or more"):
        split_symbols(grammar, 2, noise=-0.1, generator=seeded())
    with pytest.raises(
        ValueError, match="k = 100 makes .* possible rules of 2600 in-terminals .* use a smaller k"
    ):
        split_symbols(grammar, 100, noise=0.1, generator=seeded())
    with pytest.raises(ValueError, match="it is truncated.: split the whole one"):
        split_symbols(grammar.truncate(5, 5), 2, noise=0.1, generator=seeded())
