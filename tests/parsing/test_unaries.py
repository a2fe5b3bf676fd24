"""Rules of one symbol: probabilities of strings before and after their removal, by a chart that knows such rules."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papercore.parsing import LooseRule, eliminate_unaries, inside_outside, length_distribution


def loose_inside(rules: Sequence[LooseRule], start: str, words: Sequence[str]) -> float:
    """P(words) under loose rules: each span's one-symbol rules applied over and over until nothing changes any more."""
    n = len(words)
    chart: dict[tuple[int, int], dict[str, float]] = {}
    for width in range(1, n + 1):
        for i in range(n - width + 1):
            base: dict[str, float] = defaultdict(float)
            for r in rules:
                if r.lexical and width == 1 and r.children[0] == words[i]:
                    base[r.parent] += r.probability
                elif not r.lexical and len(r.children) == 2:
                    left, right = r.children
                    for k in range(1, width):
                        p = chart[i, k].get(left, 0.0) * chart[i + k, width - k].get(right, 0.0)
                        base[r.parent] += r.probability * p
            value = dict(base)
            for _ in range(2000):
                following = dict(base)
                for r in rules:
                    if not r.lexical and len(r.children) == 1:
                        following[r.parent] = following.get(r.parent, 0.0) + r.probability * value.get(
                            r.children[0], 0.0
                        )
                moved = max((abs(following[a] - value.get(a, 0.0)) for a in following), default=0.0)
                value = following
                if moved < 1e-16:
                    break
            chart[i, width] = value
    return chart[0, n].get(start, 0.0)


def rules_of(*lines: tuple[str, str, float]) -> list[LooseRule]:
    """('NP', 'D N', 0.5) or ('N', '=dog', 1.0) with = before a word."""
    return [
        LooseRule(a, (b[1:],), p, lexical=True) if b.startswith("=") else LooseRule(a, tuple(b.split()), p)
        for a, b, p in lines
    ]


CHAINS = rules_of(
    ("S", "NP VP", 0.6), ("S", "VP", 0.1), ("S", "S S", 0.3),
    ("NP", "N", 0.3), ("NP", "N N", 0.3), ("NP", "=a", 0.2), ("NP", "S", 0.2),
    ("VP", "V", 0.2), ("VP", "V NP", 0.7), ("VP", "=c", 0.1),
    ("N", "=a", 0.5), ("N", "=b", 0.5),
    ("V", "=b", 0.5), ("V", "=c", 0.5),
)  # fmt: skip
CYCLE = rules_of(
    ("S", "A B", 0.5), ("S", "A", 0.5),
    ("A", "B", 0.4), ("A", "A", 0.2), ("A", "B B", 0.2), ("A", "=a", 0.2),
    ("B", "A", 0.5), ("B", "S", 0.1), ("B", "=b", 0.4),
)  # fmt: skip


def check(rules: list[LooseRule], words: str, longest: int) -> None:
    grammar = eliminate_unaries(rules, single_words="drop", dtype=torch.float64)
    for n in range(2, longest + 1):
        strings = list(itertools.product(words, repeat=n))
        log_z = inside_outside(grammar, grammar.encode([list(s) for s in strings])).log_z
        truth = torch.tensor([loose_inside(rules, "S", s) for s in strings], dtype=torch.float64)
        torch.testing.assert_close(log_z.exp(), truth, rtol=1e-10, atol=1e-15)
        assert n > 2 or float(truth.sum()) > 0


def test_every_short_string_keeps_its_probability() -> None:
    check(CHAINS, "abc", 4)


def test_cycles_that_can_be_left_are_summed_up() -> None:
    check(CYCLE, "ab", 5)


@settings(max_examples=25)
@given(st.data())
def test_random_loose_grammars(data: st.DataObject) -> None:
    """Every kind of rule between three symbols, some of them missing."""
    numbers = st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])
    rules = []
    for a in "SAB":
        for child in "SAB":
            rules.append(LooseRule(a, (child,), data.draw(numbers)))
        for pair in itertools.product("SAB", repeat=2):
            rules.append(LooseRule(a, pair, data.draw(numbers)))
        for word in "xy":
            rules.append(LooseRule(a, (word,), 0.3, lexical=True))
    rules.append(LooseRule("S", ("A", "B"), 0.5))
    sums = {a: sum(r.probability for r in rules if r.parent == a) for a in "SAB"}
    rules = [LooseRule(r.parent, r.children, r.probability / sums[r.parent], r.lexical) for r in rules]
    check(rules, "xy", 3)


def test_single_words_are_refused_conditioned_on_or_dropped() -> None:
    with pytest.raises(ValueError, match=r"'S' becomes a single word with probability 0\.\d+, and sentences"):
        eliminate_unaries(CHAINS)
    dropped = eliminate_unaries(CHAINS, single_words="drop", dtype=torch.float64)
    alone = sum(loose_inside(CHAINS, "S", word) for word in "abc")
    assert float(dropped.root.sum()) == pytest.approx(1 - alone, abs=1e-12)
    assert not dropped.proper
    given_longer = eliminate_unaries(CHAINS, single_words="condition", dtype=torch.float64)
    ids = given_longer.encode("a b c a")
    ratio = inside_outside(given_longer, ids[None]).log_z - inside_outside(dropped, ids[None]).log_z
    assert float(ratio.exp()) == pytest.approx(1 / (1 - alone), rel=1e-10)
    assert given_longer.proper


def test_mass_of_lengths_is_kept() -> None:
    """P(length = n) of the loose grammar, by strings, and of the strict one, by its recursion."""
    grammar = eliminate_unaries(CYCLE, single_words="drop", dtype=torch.float64)
    for n, mass in enumerate(length_distribution(grammar, 4).tolist()):
        if n >= 2:
            total = sum(loose_inside(CYCLE, "S", s) for s in itertools.product("ab", repeat=n))
            assert mass == pytest.approx(total, rel=1e-10)


def test_symbols_and_names() -> None:
    grammar = eliminate_unaries(CHAINS, single_words="drop")
    assert grammar.nonterminals == ("S", "NP", "VP")
    assert grammar.preterminals == ("NP<word>", "VP<word>", "N", "V")
    assert grammar.vocabulary == ("a", "c", "b")


def test_no_rule_appears_that_no_chain_makes() -> None:
    """Zeros stay exact zeros: rounding in the inverse must not invent rules."""
    grammar = eliminate_unaries(
        CYCLE + rules_of(("T", "T U", 0.5), ("T", "U", 0.5), ("U", "=u", 1.0)), single_words="drop"
    )
    symbol = {name: k for k, name in enumerate(grammar.symbols)}
    assert not grammar.rules[symbol["T"], symbol["A"]].any()
    assert not grammar.rules[symbol["S"], :, symbol["U"]].any()
    assert float(grammar.rules[symbol["T"], symbol["U"], symbol["U"]]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "no rules: a grammar needs at least one"),
        (rules_of(("S", "A B", 1.0), ("A", "B", 1.0), ("B", "A", 1.0)), r"the rules A -> B -> A form a cycle that no rule leaves"),
        (rules_of(("S", "A A", 1.0), ("A", "A", 1.0)), r"the rules A -> A form a cycle"),
        (rules_of(("S", "A dog", 1.0), ("A", "=a", 1.0)), r"'dog' in the rule S -> A dog \[1\] has no rules of its own\. If it is a word, put it in quotes"),
        (rules_of(("S", "A A", 0.7), ("A", "=a", 1.0)), r"the rules of 'S' add up to 0\.7, expected 1: correct them, or pass normalize=True"),
        (rules_of(("S", "A A", 1.5), ("A", "=a", 1.0)), r"S -> A A \[1\.5\]: 1\.5 is not a probability from 0 to 1; normalize=True"),
        (rules_of(("S", "A A", -0.5), ("A", "=a", 1.0)), r"-0\.5 is not a probability"),
        (rules_of(("S", "A A", float("nan")), ("A", "=a", 1.0)), r"nan is not a probability"),
        ([LooseRule("S", (), 1.0)], r"the rule 'S' -> \(nothing\) makes an empty string"),
        ([LooseRule("S", ("",), 1.0, lexical=True)], r"makes an empty string"),
        ([LooseRule("S", ("A", "A", "A"), 1.0)], r"has 3 children: expected one word, or one or two symbols"),
        (rules_of(("S", "=a", 1.0)), r"no rule has two symbols on the right"),
        (rules_of(("S", "=a", 1.0), ("A", "A A", 0.1), ("A", "=a", 0.9)), r"'S' becomes a single word with probability 1,"),
    ],
)  # fmt: skip
def test_refusals(rules: list[LooseRule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eliminate_unaries(rules)


def test_other_refusals() -> None:
    rules = rules_of(("S", "A A", 1.0), ("A", "=a", 1.0))
    with pytest.raises(ValueError, match=r"start symbol 'X' has no rules; symbols with rules: 'S', 'A'\."):
        eliminate_unaries(rules, start="X")
    with pytest.raises(ValueError, match=r"single_words 'ignore': expected 'refuse', 'condition' or 'drop'"):
        eliminate_unaries(rules, single_words="ignore")
    only = rules_of(("S", "=a", 1.0), ("A", "A A", 0.1), ("A", "=a", 0.9))
    with pytest.raises(ValueError, match="single word with probability 1,"):
        eliminate_unaries(only, single_words="condition")


def test_weights_are_divided_by_their_sum_and_equal_rules_add_up() -> None:
    rules = rules_of(
        ("S", "A A", 2.0), ("S", "A B", 1.0), ("S", "A B", 1.0), ("A", "=a", 7.0), ("B", "=b", 1.0)
    )
    grammar = eliminate_unaries(rules, normalize=True)
    assert grammar.rules[0, 1].tolist() == [0.0, 0.5, 0.5]
