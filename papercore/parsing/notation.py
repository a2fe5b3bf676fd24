"""Grammars as text, in the notation of NLTK's PCFG.fromstring, and back.

    S  -> NP VP [1.0]                       # a comment; the first rule's left side is the start symbol
    NP -> D N [0.5] | 'dogs' [0.3]          | alternatives of one symbol
    NP -> N [0.2]                           a rule of one symbol: removed exactly, see unaries.py
    VP -> V NP 'up' [1.0]                   words between symbols, and rules of three and more: split exactly, see below
    %start S                                names the start symbol

A word among symbols gets a symbol of its own that is always this word. A rule A -> B C D becomes A -> B @A:C_D and
@A:C_D -> C D [1.0]. Both leave the probability of every sentence as it is, and the spans of trees too once nodes named @... are
spliced out (`papercore.parsing.debinarise`).

Beyond NLTK: a symbol may hold any characters but blanks, quotes, brackets and bars; numbers may have an exponent; with
normalize=True numbers are weights, and a missing one is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from papercore.parsing.grammar import PCFG
from papercore.parsing.unaries import LooseRule, eliminate_unaries

__all__ = ["loose_rules", "read", "to_nltk", "write"]

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<word>"[^"]*"|'[^']*')
    | \[(?P<number>[^\]\[]*)\]
    | (?P<bar>\|)
    | (?P<arrow>->|→)
    | (?P<symbol>(?:(?!->)[^\s"'|\[\]→])+)
    )""",
    re.VERBOSE,
)

# (children, whether each is a word, number)
_Side = tuple[list[str], list[bool], float]


def read(
    text: Any,
    *,
    start: str | None = None,
    normalize: bool = False,
    single_words: str = "refuse",
    dtype: torch.dtype | None = None,
) -> PCFG:
    """The grammar that `text` describes.

    Args:
        text: rules in the notation above, or an nltk.PCFG.
        start: the start symbol; default: what %start names, else the left side of the first rule.
        normalize: divide each symbol's numbers by their sum in place of refusing sums other than 1.
        single_words: "refuse", "condition" or "drop": sentences of one word, see `eliminate_unaries`.
        dtype: of the grammar's tensors; default torch.get_default_dtype().

    Raises:
        ValueError: with the line that cannot be read; and all that `eliminate_unaries` refuses.
        TypeError: neither text nor a grammar of NLTK's.

    >>> grammar = read('''
    ...     S -> NP VP [1.0]
    ...     NP -> D N [0.6] | N [0.4]
    ...     VP -> V NP [0.7] | V [0.3]
    ...     D -> 'the' [1.0]
    ...     N -> 'dogs' [0.5] | 'cats' [0.5]
    ...     V -> 'chase' [1.0]
    ... ''')
    >>> grammar
    PCFG(3 in-terminals, 3 pre-terminals, 4 words, 7 binary rules, torch.float32, cpu)
    """
    rules, first = loose_rules(text, weights=normalize)
    return eliminate_unaries(
        rules,
        start=first if start is None else start,
        normalize=normalize,
        single_words=single_words,
        dtype=dtype,
    )


def loose_rules(text: Any, *, weights: bool = False) -> tuple[list[LooseRule], str]:
    """The rules as written, long ones and those that mix words and symbols split, and the start symbol.

    Args:
        text: as in `read`.
        weights: a missing number is 1; otherwise it is refused.
    """
    if isinstance(text, str):
        sides, start = _from_text(text, weights)
    elif callable(getattr(text, "productions", None)):
        sides, start = _from_nltk(text, weights), str(text.start())
    else:
        raise TypeError(f"expected a grammar as text or as an nltk.PCFG, got {type(text).__name__}.")
    rules: list[LooseRule] = []
    made: dict[LooseRule, None] = {}
    for parent, side in sides:
        first, *others = _shortened(parent, side)
        rules.append(first)
        made.update(dict.fromkeys(others))
    return [*rules, *made], start


def _shortened(parent: str, side: _Side) -> list[LooseRule]:
    """A rule of at most two symbols or one word, and rules of probability 1 for the symbols that this took."""
    children, are_words, probability = side
    if are_words == [True]:
        return [LooseRule(parent, (children[0],), probability, lexical=True)]
    symbols = [f"<{child}>" if is_word else child for child, is_word in zip(children, are_words, strict=True)]
    rests = [f"@{parent}:{'_'.join(symbols[k:])}" for k in range(1, len(symbols) - 1)]
    ends = [*rests, symbols[-1]]
    rules = [LooseRule(parent, (symbols[0], ends[0]) if len(symbols) > 1 else (symbols[0],), probability)]
    rules += [LooseRule(rest, (symbols[k + 1], ends[k + 1]), 1.0) for k, rest in enumerate(rests)]
    words = [
        (symbol, child)
        for symbol, child, is_word in zip(symbols, children, are_words, strict=True)
        if is_word
    ]
    return rules + [LooseRule(symbol, (word,), 1.0, lexical=True) for symbol, word in words]


def _from_text(text: str, weights: bool) -> tuple[list[tuple[str, _Side]], str]:
    sides: list[tuple[str, _Side]] = []
    start: str | None = None
    held = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = held + line.strip()
        held = ""
        if line.endswith("\\"):
            held = line[:-1] + " "
            continue
        if not line or line.startswith("#"):
            continue
        if line.startswith("%"):
            words = line.split()
            if words[0] != "%start" or len(words) != 2:
                raise ValueError(f"line {number}: {line!r}: the only directive is %start SYMBOL.")
            start = words[1]
            continue
        tokens = _tokens(line, number)
        if tokens[0] == ("bar", "|") and sides:
            parent, tokens = sides[-1][0], tokens[1:]
        elif len(tokens) >= 2 and tokens[0][0] == "symbol" and tokens[1][0] == "arrow":
            parent, tokens = tokens[0][1], tokens[2:]
        else:
            raise ValueError(f"line {number}: {line!r}: expected SYMBOL -> ..., or | ... behind such a line.")
        sides.extend((parent, side) for side in _alternatives(tokens, number, line, weights))
    if held or not sides:
        raise ValueError(
            f"the text ends after {held.strip()!r}."
            if held
            else "no rules in the text: expected lines such as S -> NP VP [1.0]."
        )
    return sides, sides[0][0] if start is None else start


def _tokens(line: str, number: int) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(line.rstrip()):
        found = _TOKEN.match(line, at)
        if found is None or found.lastgroup is None:
            raise ValueError(
                f"line {number}: cannot read {line[at:].strip()[:30]!r} of {line!r}: is a quote or a bracket left open?"
            )
        kind = found.lastgroup
        if kind == "symbol" and found[kind].startswith("#"):
            break
        tokens.append((kind, found[kind][1:-1] if kind == "word" else found[kind]))
        at = found.end()
    return tokens


def _alternatives(tokens: list[tuple[str, str]], number: int, line: str, weights: bool) -> Iterator[_Side]:
    """What stands between bars: children, which of them are words, and the number."""
    children: list[str] = []
    are_words: list[bool] = []
    value: float | None = None
    for kind, text in [*tokens, ("bar", "|")]:
        if kind == "bar":
            if not children or (are_words == [True] and not children[0]):
                raise ValueError(
                    f"line {number}: {line!r}: an alternative is empty; every rule needs a word or symbols on the right."
                )
            if value is None and not weights:
                raise ValueError(
                    f"line {number}: {line!r}: the probability of {' '.join(children)!r} is missing, such as [0.5]; "
                    "normalize=True gives all alternatives without one the same weight."
                )
            yield children, are_words, 1.0 if value is None else value
            children, are_words, value = [], [], None
        elif value is not None or kind == "arrow":
            raise ValueError(f"line {number}: {line!r}: expected | or the end of the line before {text!r}.")
        elif kind == "number":
            try:
                value = float(text)
            except ValueError:
                raise ValueError(f"line {number}: [{text}] is not a number.") from None
        else:
            children.append(text)
            are_words.append(kind == "word")


def _from_nltk(grammar: Any, weights: bool) -> list[tuple[str, _Side]]:
    sides: list[tuple[str, _Side]] = []
    for production in grammar.productions():
        right = production.rhs()
        if not right:
            raise ValueError(
                f"the rule {production} makes an empty string: every rule needs a word or symbols on the right."
            )
        if not hasattr(production, "prob") and not weights:
            raise ValueError(
                f"the rule {production} has no probability: give an nltk.PCFG, or normalize=True for equal weights."
            )
        probability = float(production.prob()) if hasattr(production, "prob") else 1.0
        sides.append(
            (
                str(production.lhs()),
                ([str(c) for c in right], [isinstance(c, str) for c in right], probability),
            )
        )
    return sides


def _written_rules(grammar: PCFG) -> Iterator[LooseRule]:
    """Rules with probabilities in float64, each symbol's divided by their sum; a root distribution becomes rules of a symbol ROOT."""
    if not grammar.proper:
        raise ValueError(
            "the probabilities of this grammar add up to less than 1: the notation cannot hold it."
        )
    root, rules, emissions = (t.double().cpu() for t in (grammar.root, grammar.rules, grammar.emissions))
    used = root.nonzero().squeeze(1).tolist()
    order = list(range(len(grammar.nonterminals)))
    if len(used) == 1:
        order.remove(used[0])
        order.insert(0, used[0])
    else:
        start = "ROOT"
        while start in grammar.symbols:
            start += "'"
        for a in used:
            yield LooseRule(start, (grammar.nonterminals[a],), float(root[a] / root.sum()))
    for a in order:
        for b, c in rules[a].nonzero().tolist():
            children = (grammar.symbols[b], grammar.symbols[c])
            yield LooseRule(grammar.nonterminals[a], children, float(rules[a, b, c] / rules[a].sum()))
    for a, name in enumerate(grammar.preterminals):
        for w in emissions[a].nonzero().squeeze(1).tolist():
            yield LooseRule(
                name, (grammar.vocabulary[w],), float(emissions[a, w] / emissions[a].sum()), lexical=True
            )


def write(grammar: PCFG) -> str:
    """The grammar in the notation that `read` takes, one rule a line. ValueError if it is not proper or a word holds both quotes.

    >>> print(write(read("S -> A A [1.0]\\nA -> 'x' [0.25] | 'y' [0.75]")))
    S -> A A [1.0]
    A -> 'x' [0.25]
    A -> 'y' [0.75]
    """
    lines = []
    for r in _written_rules(grammar):
        right = " ".join(r.children)
        if r.lexical:
            if "'" in right and '"' in right:
                raise ValueError(
                    f"the word {right!r} holds both kinds of quotes: the notation cannot hold it."
                )
            right = f'"{right}"' if "'" in right else f"'{right}'"
        elif any(re.search(r"[\s\"'|\[\]→]|->|^#", child) for child in (r.parent, *r.children)):
            raise ValueError(
                f"the rule {r} has a symbol with a blank, quote, bracket, bar or arrow: the notation cannot hold it."
            )
        lines.append(f"{r.parent} -> {right} [{r.probability!r}]")
    return "\n".join(lines)


def to_nltk(grammar: PCFG) -> Any:
    """The same grammar as an nltk.PCFG, for NLTK's parsers. ValueError if NLTK is not installed or the grammar is not proper."""
    try:
        from nltk.grammar import PCFG as NltkPCFG
        from nltk.grammar import Nonterminal, ProbabilisticProduction
    except ImportError:
        raise ValueError("to_nltk needs NLTK: pip install nltk") from None
    productions = []
    for r in _written_rules(grammar):
        right = r.children if r.lexical else tuple(Nonterminal(c) for c in r.children)
        productions.append(ProbabilisticProduction(Nonterminal(r.parent), right, prob=r.probability))
    return NltkPCFG(productions[0].lhs(), productions)
