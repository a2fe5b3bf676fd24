"""Sampled sentences: frequencies of rules, words and lengths, exact conditioning on length, the trees' own consistency."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from papercore.parsing import PCFG, english, inside_outside, length_distribution, sample
from tests.parsing.reference import random_grammar

SMALL = PCFG.from_string(
    """
    S -> S S [0.2] | A B [0.5] | A S [0.3]
    A -> 'x' [0.7] | 'y' [0.3]
    B -> 'x' [0.1] | 'z' [0.9]
    """,
    dtype=torch.float64,
)
EXPLOSIVE = PCFG.from_string("S -> S S [0.6] | A A [0.4]\nA -> 'x' [1.0]")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within(count: float, trials: float, p: float, errors: float = 4.0) -> bool:
    """A binomial count within some standard errors of its mean."""
    return abs(count - trials * p) <= errors * math.sqrt(trials * p * (1 - p)) + 1e-9


def test_rules_and_words_have_their_frequencies() -> None:
    grammar = english()
    _, trees = sample(grammar, 4000, generator=seeded())
    rules: Counter[tuple[str, str, str]] = Counter()
    words: Counter[tuple[str, str]] = Counter()
    for tree in trees:
        for _, _, node in tree.nodes():
            if node.is_preterminal:
                words[node.label, str(node.children[0])] += 1
            else:
                rules[node.label, node.children[0].label, node.children[1].label] += 1  # type: ignore[union-attr]
    inner = Counter(dict.fromkeys(grammar.nonterminals, 0))
    for (a, _, _), count in rules.items():
        inner[a] += count
    place = {name: k for k, name in enumerate(grammar.symbols)}
    checked = 0
    for a, b, c in grammar.rules.nonzero().tolist():
        names = grammar.symbols[a], grammar.symbols[b], grammar.symbols[c]
        assert within(rules[names], inner[names[0]], float(grammar.rules[a, b, c]))
        checked += rules[names] > 20
    assert checked > 100
    assert all(grammar.rules[place[a], place[b], place[c]] > 0 for a, b, c in rules)
    outer: Counter[str] = Counter()
    for (tag, _), count in words.items():
        outer[tag] += count
    for t, w in grammar.emissions.nonzero().tolist():
        tag, word = grammar.preterminals[t], grammar.vocabulary[w]
        assert within(words[tag, word], outer[tag], float(grammar.emissions[t, w]), errors=4.5)
    assert sum(words.values()) == sum(len(tree) for tree in trees)


def test_root_distribution() -> None:
    grammar = random_grammar(3, 2, 3, seed=1)
    _, trees = sample(grammar, 20000, max_length=6, generator=seeded())
    # Given length <= 6 a root is as frequent as its prior times its own share of short sentences.
    share = []
    for a in range(3):
        root = torch.zeros(3, dtype=torch.float64)
        root[a] = 1
        names = {k: getattr(grammar, k) for k in ("nonterminals", "preterminals", "vocabulary")}
        one = PCFG(root, grammar.rules, grammar.emissions, **names)
        share.append(float(grammar.root[a] * length_distribution(one, 6).sum()))
    counts = Counter(tree.label for tree in trees)
    for a, p in enumerate(share):
        assert within(counts[f"N{a}"], 20000, p / sum(share))


@pytest.mark.parametrize("grammar", [SMALL, EXPLOSIVE], ids=["small", "explosive"])
def test_lengths_follow_the_recursion_given_the_limit(grammar: PCFG) -> None:
    ids, lengths = sample(grammar, 30000, max_length=9, generator=seeded(), trees=False)
    truth = length_distribution(grammar, 9)
    assert float(truth.sum()) < 0.95  # the limit matters
    for length, p in enumerate((truth / truth.sum()).tolist()):
        assert within(int((lengths == length).sum()), 30000, p)
    assert int(lengths.max()) == ids.shape[1] in (8, 9)  # the explosive one makes even lengths only


def test_whole_sentences_have_their_probabilities() -> None:
    """Frequency of every string of up to 3 words against Z."""
    ids, lengths = sample(SMALL, 40000, max_length=3, generator=seeded(), trees=False)
    counts = Counter(tuple(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist(), strict=True))
    strings = [s for n in (2, 3) for s in itertools.product(range(3), repeat=n)]
    z = {s: float(inside_outside(SMALL, torch.tensor([s])).log_z.exp()) for s in strings}
    total = sum(z.values())
    assert total == pytest.approx(float(length_distribution(SMALL, 3).sum()))
    for s in strings:
        assert within(counts[s], 40000, z[s] / total)
    assert sum(counts.values()) == sum(counts[s] for s in strings)


def test_mean_length_is_the_expected_length() -> None:
    _, lengths = sample(english(), 20000, generator=seeded(), trees=False)
    error = float(lengths.double().std()) / math.sqrt(20000)
    assert abs(float(lengths.double().mean()) - english().expected_length()) < 4 * error


def test_trees_are_trees_of_the_grammar_over_the_ids() -> None:
    grammar = english()
    ids, trees = sample(grammar, 500, max_length=15, generator=seeded(3))
    assert ids.dtype == torch.long
    assert ids.shape == (500, max(len(t) for t in trees))
    place = {name: k for k, name in enumerate(grammar.symbols)}
    inner = len(grammar.nonterminals)
    for row, tree in zip(ids, trees, strict=True):
        n = len(tree)
        assert grammar.decode(row[:n]) == tree.leaves()
        assert not row[n:].any()
        assert tree.label in ("S", "Q")
        for _, _, node in tree.nodes():
            if node.is_preterminal:
                word = grammar.encode([str(node.children[0])])
                assert grammar.emissions[place[node.label] - inner, word] > 0
            else:
                left, right = (place[c.label] for c in node.children)  # type: ignore[union-attr]
                assert grammar.rules[place[node.label], left, right] > 0
    assert bool(torch.isfinite(inside_outside(grammar, ids, lengths=[len(t) for t in trees]).log_z).all())


def test_same_seed_same_sentences_with_and_without_trees() -> None:
    ids, trees = sample(SMALL, 200, max_length=12, generator=seeded(4))
    again, lengths = sample(SMALL, 200, max_length=12, generator=seeded(4), trees=False)
    assert torch.equal(ids, again)
    assert lengths.tolist() == [len(tree) for tree in trees]
    method, _ = SMALL.sample(200, max_length=12, generator=seeded(4))
    assert torch.equal(ids, method)
    other, _ = sample(SMALL, 200, max_length=12, generator=seeded(5))
    assert not torch.equal(ids[:, :2], other[:, :2])


def test_the_global_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    sample(SMALL, 50, generator=seeded())
    assert torch.equal(before, torch.get_rng_state())


def test_more_sentences_than_one_round_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from papercore.parsing import sampling

    tries = []
    grow = sampling._Forest.grow
    monkeypatch.setattr(sampling, "_ROUND", 64)
    monkeypatch.setattr(sampling._Forest, "grow", lambda *args: (tries.append(args[1]), grow(*args))[1])
    ids, trees = sample(SMALL, 1000, max_length=5, generator=seeded())
    assert max(tries) == 64
    assert len(ids) == len(trees) == 1000
    assert all(SMALL.decode(row[: len(t)]) == t.leaves() for row, t in zip(ids, trees, strict=True))


def test_a_draw_stays_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """row + u rounds up to the next row when u is the largest number below 1."""
    from papercore.parsing.sampling import _Draw

    rows = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    draw = _Draw.of(rows)
    assert draw.bounds.tolist() == [0.75, 1.0, 1.5, 2.0, 3.0]
    largest = 1 - 2**-53
    assert 1 + largest == 2
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, largest, dtype=torch.float64))
    assert draw(torch.arange(3), seeded()).tolist() == [1, 2, 0]
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    assert draw(torch.arange(3), seeded()).tolist() == [0, 1, 0]


def test_no_sentence_at_all() -> None:
    ids, trees = sample(SMALL, 0, generator=seeded())
    assert ids.shape == (0, 0)
    assert trees == []


def test_length_distribution_adds_up() -> None:
    assert float(length_distribution(SMALL, 400).sum()) == pytest.approx(1, abs=1e-8)
    lengths = torch.arange(401, dtype=torch.float64)
    assert float(length_distribution(SMALL, 400) @ lengths) == pytest.approx(
        SMALL.expected_length(), abs=1e-5
    )
    # A branching process that doubles with 0.6 dies out with probability 0.4 / 0.6.
    assert float(length_distribution(EXPLOSIVE, 600).sum()) == pytest.approx(2 / 3, abs=1e-6)
    with pytest.raises(ValueError, match="max_length = -1: expected 0 or more"):
        length_distribution(SMALL, -1)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"the spectral radius of this grammar is 1\.2000 >= 1: .* Give max_length"
    ):
        sample(EXPLOSIVE, 3, generator=seeded())
    with pytest.raises(ValueError, match=r"generator = None: expected a torch.Generator, such as"):
        sample(SMALL, 3, generator=None)
    with pytest.raises(ValueError, match="n = -1: expected a number of sentences"):
        sample(SMALL, -1, generator=seeded())
    with pytest.raises(ValueError, match="max_length = 1: sentences have two or more words"):
        sample(SMALL, 3, max_length=1, generator=seeded())
    with pytest.raises(
        ValueError, match="add up to less than 1 .it is truncated.: sample from the whole one"
    ):
        sample(english().truncate(5, 10), 3, generator=seeded())
    chain = PCFG.from_string("S -> A T [1.0]\nT -> A U [1.0]\nU -> A A [1.0]\nA -> 'x' [1.0]")
    with pytest.raises(
        ValueError, match="max_length = 3: sentences of this grammar are that short with probability 0, too"
    ):
        sample(chain, 3, max_length=3, generator=seeded())
