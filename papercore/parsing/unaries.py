"""Grammars as people write them, with rules of one symbol, made into PCFGs of the strict form without changing any probability.

The strict form (Zhao et al., 2023, arXiv 2303.08117, section 2.1) splits symbols into in-terminals with binary rules and
pre-terminals with words. People write NP -> Pronoun [0.2], S -> VP [0.1], NP -> 'dogs' [0.1] beside NP -> D N [0.6]. From a symbol
A one such rule after another is taken until a binary rule or a word ends the chain. With U(A, B) = p(A -> B) the chains add up to
a geometric series,

    N = 1 + U + U^2 + ... = (1 - U)^-1          expected visits of B in a chain that starts at A
    long(A, D) = N(A, D) sum over B, C of p(D -> B C)     the chain from A ends with a binary rule of D
    word(A, T) = N(A, T) sum over w of p(T -> w)          the chain from A ends with a word of T

and each rule D -> B C is split by where the chains of its two children end. In-terminals are the symbols with binary rules,
pre-terminals those with words; a symbol with both becomes two, NP and NP<word>. Cycles of such rules are no obstacle as long as
they can be left.

In the trees of the resulting grammar a chain is named by its last symbol: (NP (Pronoun she)) becomes (Pronoun she).

Glossary
    unit      U             [N, N], N symbols of the loose grammar
    closure   (1 - U)^-1    [N, N]
    ends      long and word side by side, children's axis [in-terminals | pre-terminals]     [N, S]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.parsing.grammar import PCFG

__all__ = ["LooseRule", "eliminate_unaries"]

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LooseRule:
    """parent -> children with a probability. `children` are one word (`lexical`), or one or two symbols."""

    parent: str
    children: tuple[str, ...]
    probability: float
    lexical: bool = False

    def __str__(self) -> str:
        right = repr(self.children[0]) if self.lexical else " ".join(self.children)
        return f"{self.parent} -> {right} [{self.probability:g}]"


def eliminate_unaries(
    rules: Iterable[LooseRule],
    *,
    start: str | None = None,
    normalize: bool = False,
    single_words: str = "refuse",
    dtype: torch.dtype | None = None,
) -> PCFG:
    """The PCFG of the strict form that gives every sentence of two or more words the probability that the loose rules give it.

    Args:
        rules: with one word, one symbol, or two symbols on the right. The same rule may occur more than once: probabilities add up.
        start: the start symbol; default: the left side of the first rule.
        normalize: take the numbers as weights and divide them by their sum, symbol by symbol.
        single_words: what to do when the start symbol can become a sentence of one word, which the strict form cannot hold.
            "refuse": ValueError. "condition": probabilities given two or more words. "drop": these sentences are missing, the
            probabilities of all others stay (the root distribution then adds up to less than 1).
        dtype: of the grammar, default torch.get_default_dtype(). All steps are computed in float64.

    Raises:
        ValueError: a rule is empty, longer than two, or has a number that is no probability; a symbol's rules do not add up to 1; a
            symbol has no rules; a cycle of one-symbol rules cannot be left; the start symbol is unknown; no binary rule at all;
            sentences of one word as above.

    >>> rules = [LooseRule("S", ("NP", "V"), 1.0), LooseRule("NP", ("N",), 0.7), LooseRule("NP", ("A", "N"), 0.3)]
    >>> rules += [LooseRule(tag, (word,), 1.0, lexical=True) for tag, word in [("N", "dogs"), ("A", "big"), ("V", "bark")]]
    >>> grammar = eliminate_unaries(rules)
    >>> grammar.nonterminals, grammar.preterminals
    (('S', 'NP'), ('V', 'N', 'A'))
    >>> round(float(grammar.rules[0, grammar.symbols.index("N"), grammar.symbols.index("V")]), 6)
    0.7
    """
    if single_words not in ("refuse", "condition", "drop"):
        raise ValueError(f"single_words {single_words!r}: expected 'refuse', 'condition' or 'drop'.")
    rules = _checked_rules(rules, normalize)
    start = rules[0].parent if start is None else start
    names = list(
        dict.fromkeys(
            name for r in rules for name in ((r.parent, *r.children) if not r.lexical else (r.parent,))
        )
    )
    if start not in names:
        raise ValueError(f"the start symbol {start!r} has no rules; symbols with rules: {_few(names)}.")
    _check_defined(rules)
    place = {name: i for i, name in enumerate(names)}
    unit = torch.zeros(len(names), len(names), dtype=torch.float64)
    long_mass, word_mass = torch.zeros(2, len(names), dtype=torch.float64)
    for r in rules:
        if r.lexical:
            word_mass[place[r.parent]] += r.probability
        elif len(r.children) == 1:
            unit[place[r.parent], place[r.children[0]]] += r.probability
        else:
            long_mass[place[r.parent]] += r.probability
    _check_cycles(names, unit, long_mass + word_mass)
    inner, leaves = long_mass.nonzero().squeeze(1).tolist(), word_mass.nonzero().squeeze(1).tolist()
    if not inner:
        raise ValueError(
            "no rule has two symbols on the right: a grammar of the strict form needs at least one, such as S -> NP VP."
        )
    closure = _closure(unit)
    ends = torch.cat([closure[:, inner] * long_mass[inner], closure[:, leaves] * word_mass[leaves]], 1)
    root = ends[place[start], : len(inner)]
    root, proper = _without_single_words(root, start, single_words)
    binary = _split(rules, place, inner, ends) / long_mass[inner].view(-1, 1, 1)
    words = list(dict.fromkeys(r.children[0] for r in rules if r.lexical))
    emissions = torch.zeros(len(leaves), len(words), dtype=torch.float64)
    row, column = {names[at]: k for k, at in enumerate(leaves)}, {w: k for k, w in enumerate(words)}
    for r in rules:
        if r.lexical:
            emissions[row[r.parent], column[r.children[0]]] += r.probability
    emissions /= word_mass[leaves].unsqueeze(1)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    both = set(inner) & set(leaves)
    return PCFG(
        root.to(dtype),
        binary.to(dtype),
        emissions.to(dtype),
        nonterminals=[names[at] for at in inner],
        preterminals=_word_names([names[at] for at in leaves], {names[at] for at in both}, set(names)),
        vocabulary=words,
        proper=proper,
    )


def _closure(unit: Tensor) -> Tensor:
    """(1 - U)^-1, with exact zeros where no chain leads."""
    eye = torch.eye(len(unit), dtype=unit.dtype)
    reached = eye + unit > 0
    while not torch.equal(further := reached.double() @ reached.double() > 0, reached):
        reached = further
    return torch.linalg.inv(eye - unit).clamp(min=0) * reached


def _split(rules: Sequence[LooseRule], place: dict[str, int], inner: list[int], ends: Tensor) -> Tensor:
    """Binary rules, each spread over the symbols where the chains of its children end: [I, S, S]."""
    row = {at: k for k, at in enumerate(inner)}
    split = ends.new_zeros(len(inner), ends.shape[1], ends.shape[1])
    for r in rules:
        if not r.lexical and len(r.children) == 2:
            left, right = (ends[place[child]] for child in r.children)
            used_left, used_right = left.nonzero(), right.nonzero().squeeze(1)
            split[row[place[r.parent]], used_left, used_right] += r.probability * (
                left[used_left] * right[used_right]
            )
    return split


def _without_single_words(root: Tensor, start: str, how: str) -> tuple[Tensor, bool]:
    """The root distribution over in-terminals, and whether it adds up to 1."""
    missing = 1 - float(root.sum())
    if missing < 1e-9:
        return root / root.sum(), True
    if how == "refuse" or missing > 1 - 1e-9:
        raise ValueError(
            f"the start symbol {start!r} becomes a single word with probability {missing:.4g}, and sentences here have two or more words. "
            "single_words='condition' gives probabilities among longer sentences, single_words='drop' leaves the single words out."
        )
    return (root / root.sum(), True) if how == "condition" else (root, False)


def _word_names(leaves: Sequence[str], both: set[str], taken: set[str]) -> list[str]:
    """Pre-terminals keep their symbol's name, or get <word> behind it when an in-terminal has it."""
    named = []
    for name in leaves:
        if name in both:
            name += "<word>"
            while name in taken:
                name += ">"
            taken.add(name)
        named.append(name)
    return named


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:8])) + (", ..." if len(listed) > 8 else "")


def _checked_rules(rules: Iterable[LooseRule], normalize: bool) -> list[LooseRule]:
    listed = list(rules)
    if not listed:
        raise ValueError("no rules: a grammar needs at least one.")
    for r in listed:
        if not r.children or (r.lexical and not r.children[0]):
            raise ValueError(
                f"the rule {r.parent!r} -> (nothing) makes an empty string: every rule needs a word or symbols on the right."
            )
        if len(r.children) > (1 if r.lexical else 2):
            raise ValueError(
                f"the rule {r} has {len(r.children)} children: expected one word, or one or two symbols."
            )
        if not 0 <= r.probability < float("inf") or (r.probability > 1 + _TOLERANCE and not normalize):
            raise ValueError(
                f"the rule {r}: {r.probability:g} is not a probability from 0 to 1; normalize=True takes weights of any size."
            )
    listed = [r for r in listed if r.probability > 0]
    sums: Counter[str] = Counter()
    for r in listed:
        sums[r.parent] += r.probability  # type: ignore[assignment]
    if normalize:
        return [LooseRule(r.parent, r.children, r.probability / sums[r.parent], r.lexical) for r in listed]
    for parent, total in sums.items():
        if abs(total - 1) > _TOLERANCE:
            raise ValueError(
                f"the rules of {parent!r} add up to {total:.6g}, expected 1: correct them, or pass normalize=True."
            )
    return listed


def _check_defined(rules: Sequence[LooseRule]) -> None:
    defined = {r.parent for r in rules}
    for r in rules:
        for child in () if r.lexical else r.children:
            if child not in defined:
                raise ValueError(
                    f"{child!r} in the rule {r} has no rules of its own. If it is a word, put it in quotes: {child!r}."
                )


def _check_cycles(names: Sequence[str], unit: Tensor, ending: Tensor) -> None:
    """ValueError if some symbol's one-symbol rules lead to no binary rule and to no word."""
    can_end = ending > 0
    for _ in names:
        can_end = can_end | ((unit > 0) & can_end).any(1)
    if bool(can_end.all()):
        return
    seen: list[int] = [int((~can_end).nonzero()[0])]
    while True:
        following = int((unit[seen[-1]] > 0).nonzero()[0])
        if following in seen:
            cycle = [names[at] for at in [*seen[seen.index(following) :], following]]
            raise ValueError(
                f"the rules {' -> '.join(cycle)} form a cycle that no rule leaves: no sentence ever comes out of it. "
                f"Give one of these symbols a rule with a word or with two symbols."
            )
        seen.append(following)
